"""PEFT's adapter settings that diffusers stores as JSON in the safetensors header under "lora_adapter_metadata"."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

_METADATA_KEY = "lora_adapter_metadata"
_PEFT_DEFAULT_ALPHA = 8
_COMPONENTS = {
    "sdxl": ("unet",),
    "flux": ("transformer",),
    "te1": ("text_encoder",),
    "te2": ("text_encoder_2",),
    "t5": ("text_encoder_2", "text_encoder_3"),
}


class AdapterConfig:
    """lora_alpha, alpha_pattern and use_rslora of each component, as diffusers' loader reads them.

    Args:
        metadata: the file's __metadata__. Without the entry, or with a broken one, every scale is None.
    """

    def __init__(self, metadata: Mapping[str, str]) -> None:
        try:
            content = json.loads(metadata.get(_METADATA_KEY, "{}"))
        except ValueError:
            content = {}
        self._settings: dict[str, Any] = content if isinstance(content, dict) else {}

    def scale(self, base: str, path: str, rank: int) -> float | None:
        """lora_alpha / rank (/ √rank with rank-stabilised LoRA) of the module `path`; None if the file does not say.

        Args:
            base: "sdxl", "flux", "te1", "te2" or "t5".
            path: the module's dotted name in diffusers.
            rank: rows of its down.
        """
        settings = self._component(base)
        if not settings:
            return None
        alpha = settings.get("lora_alpha", _PEFT_DEFAULT_ALPHA)
        for pattern, value in (settings.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                alpha = value
                break
        return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)

    def _component(self, base: str) -> dict[str, Any]:
        for component in _COMPONENTS[base]:
            opening = f"{component}."
            found = {key.removeprefix(opening): value for key, value in self._settings.items() if key.startswith(opening)}
            if found:
                return found
        return self._settings if "lora_alpha" in self._settings or "r" in self._settings else {}
