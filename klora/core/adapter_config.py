"""PEFT's adapter settings, which diffusers stores as JSON under "lora_adapter_metadata" in the header."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from klora.core.families.base import Family
from klora.core.text_encoders import TEXT_ENCODERS
from klora.errors import LoraFileError

_METADATA_KEY = "lora_adapter_metadata"
_PEFT_DEFAULT_ALPHA = 8
_LARGEST_ALPHA = 1e30
_MODULE_NAME = re.compile(r"\^?[\w.]+")


class AdapterConfig:
    """lora_alpha, alpha_pattern and use_rslora of each component, as diffusers' loader reads them.

    Args:
        metadata: the file's __metadata__. If the entry is missing or broken, every scale is None.
        name: the file's name, for error messages.
        family: of the file's denoiser.

    Raises:
        LoraFileError: alpha_pattern holds something other than module names.
    """

    def __init__(self, metadata: Mapping[str, str], name: str, family: Family) -> None:
        self._name = name
        try:
            content = json.loads(metadata.get(_METADATA_KEY, "{}"))
        except (ValueError, RecursionError):
            content = {}
        self._settings: dict[str, Any] = content if isinstance(content, dict) else {}
        names = {
            family.key: (family.component,),
            **{encoder.key: encoder.components for encoder in TEXT_ENCODERS.values()},
        }
        self._components = {base: self._component(components) for base, components in names.items()}
        self._patterns = {base: self._alpha_pattern(settings) for base, settings in self._components.items()}

    def scale(self, base: str, path: str, rank: int) -> float | None:
        """lora_alpha / rank of a module, or lora_alpha / √rank with rank-stabilised LoRA.

        Args:
            base: the key of that family or of a text encoder.
            path: the module's dotted name in diffusers.
            rank: the number of rows of its `down`.

        Returns:
            None if the file has no settings for this component.

        Raises:
            LoraFileError: the alpha that applies to the module is not a number.
        """
        settings = self._components[base]
        if not settings:
            return None
        alpha = settings.get("lora_alpha", _PEFT_DEFAULT_ALPHA)
        patterns = self._patterns[base]
        alpha = next((patterns[name] for name in (f"^{path}", *_endings(path)) if name in patterns), alpha)
        if (
            isinstance(alpha, bool)
            or not isinstance(alpha, (int, float))
            or not -_LARGEST_ALPHA <= alpha <= _LARGEST_ALPHA
        ):
            raise self._wrong("lora_alpha")
        return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)

    def _alpha_pattern(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """{end of a module's name, or "^" and the full name: its alpha}.

        PEFT accepts any regular expression here, but trainers only write names.
        """
        given = settings.get("alpha_pattern") or {}
        if not isinstance(given, dict):
            raise self._wrong("alpha_pattern")
        patterns = {pattern.removesuffix("$").replace("\\.", "."): alpha for pattern, alpha in given.items()}
        if not all(map(_MODULE_NAME.fullmatch, patterns)):
            raise self._wrong("alpha_pattern")
        return patterns

    def _wrong(self, field: str) -> LoraFileError:
        return LoraFileError(
            f'"{field}" in the header of "{self._name}" ("{_METADATA_KEY}") is not one number for each '
            "module name: export the LoRA again."
        )

    def _component(self, names: Sequence[str]) -> dict[str, Any]:
        for component in names:
            opening = f"{component}."
            found = {
                key.removeprefix(opening): value
                for key, value in self._settings.items()
                if key.startswith(opening)
            }
            if found:
                return found
        return self._settings if "lora_alpha" in self._settings or "r" in self._settings else {}


def _endings(path: str) -> Iterator[str]:
    """A dotted name, and what is left of it after each dot: PEFT lets a pattern match any of these."""
    while path:
        yield path
        _, _, path = path.partition(".")
