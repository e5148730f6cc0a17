"""K-LoRA's hold on one processing object `p` of the host: the methods of `p` that it overrides, and what they tell the host of the pair.

The hold is made of attributes of that very object. Other extensions override methods of it in the same way, before K-LoRA does or after it:
ControlNet its `sample`. So `let_go` takes back what is K-LoRA's and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import HTTPException

from klora.core.file_state import version_of
from klora.errors import KLoraError
from klora.settings import Settings
from klora.webui.loras import HostLora
from klora.webui.passes import Passes

OVERRIDDEN = ("init", "parse_extra_network_prompts", "cached_params", "setup_conds", "sample")


class Hold:
    """Has the host load the pair, encode text with it, and sample within its passes.

    Args:
        pair: {role: the host's LoRA}.
    """

    def __init__(self, p: Any, settings: Settings, pair: Mapping[str, HostLora], passes: Passes) -> None:
        self._p = p
        self._settings = settings
        self._pair = pair
        self._passes = passes
        self._warnings: list[str] = []
        self._originals = {name: getattr(p, name) for name in OVERRIDDEN}
        override(p, "parse_extra_network_prompts", self._parse_extra_network_prompts)
        override(p, "cached_params", self._cached_params)
        override(p, "setup_conds", self._setup_conds)
        override(p, "sample", self._sample)

    def warn(self, sentence: str) -> None:
        """Tell the user what is worth knowing of a run that goes on."""
        self._p.comment(sentence)
        if sentence not in self._warnings:
            self._warnings.append(sentence)

    def tell_warnings(self, processed: Any) -> None:
        """Put the warnings into the info of the answer, not of the pictures: the host shows comments in its page, but its API has none."""
        if self._warnings:
            processed.extra_generation_params = {
                **processed.extra_generation_params,
                "K-LoRA warnings": " ".join(self._warnings),
            }

    def clean_hashes(self) -> None:
        """Take the pair out of the prompt's "Lora hashes" (ours are under names of our own), unless the prompt has it too."""
        hashes = getattr(self._p, "lora_hashes", None)
        if not hashes:
            return
        tagged = "".join(self._p.all_prompts)
        for lora in self._pair.values():
            if f"<lora:{lora.name}:" not in tagged:
                hashes.pop(lora.name.replace(":", "").replace(",", ""), None)
        if hashes:
            self._p.extra_generation_params["Lora hashes"] = ", ".join(
                f"{name}: {value}" for name, value in hashes.items()
            )
        else:
            self._p.extra_generation_params.pop("Lora hashes", None)

    def _parse_extra_network_prompts(self, *args: Any, **kwargs: Any) -> Any:
        result = self._originals["parse_extra_network_prompts"](*args, **kwargs)
        self._add_tags(self._p.extra_network_data)
        if getattr(self._p, "enable_hr", False) and self._settings.hires != "off":
            self._add_tags(self._p.hr_extra_network_data)
        return result

    def _cached_params(self, *args: Any, **kwargs: Any) -> tuple:
        return (*self._originals["cached_params"](*args, **kwargs), self._conditioning_key())

    def _setup_conds(self, *args: Any, **kwargs: Any) -> Any:
        with self._passes.around_encoding():
            return self._originals["setup_conds"](*args, **kwargs)

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        with self._passes.around_sampling():
            return self._originals["sample"](*args, **kwargs)

    def _add_tags(self, data: Any) -> None:
        """Have the host load the pair once, after the prompt's own networks."""
        from modules.extra_networks import ExtraNetworkParams

        own = [params for params in data["lora"] if not self._is_of_pair(params)]
        if len(own) < len(data["lora"]):
            self.warn(
                "K-LoRA: the prompt names a LoRA of the pair too; it is applied once, by K-LoRA, at the weight chosen there, and nothing else of "
                "its tag counts."
            )
        data["lora"] = own
        data["lora"] += [
            ExtraNetworkParams(items=[name, str(weight)]) for name, weight in self._passes.tags()
        ]

    def _is_of_pair(self, params: Any) -> bool:
        """Whether <lora:…> of the prompt names a file of the pair, by the name or the alias that the host knows."""
        import networks

        named = networks.available_network_aliases.get(params.positional[0]) if params.positional else None
        return named is not None and any(Path(named.filename) == lora.path for lora in self._pair.values())

    def _conditioning_key(self) -> tuple:
        """What makes this run's text conditioning differ from another's, for the host's cache of it."""
        pair = tuple(
            (version_of(lora.path), self._settings.weight(role)) for role, lora in self._pair.items()
        )
        return ("K-LoRA", pair, self._settings.text_encoder_roles(), self._passes.stopped)


class GenerationRefused(HTTPException):
    """Ends a generation with one sentence: the host's API answers with it, its UI and console show it. Its cause is the error."""

    def __init__(self, error: BaseException) -> None:
        status = 422 if isinstance(error, KLoraError) else 500
        super().__init__(status, detail=str(error) or type(error).__name__)
        self.__cause__ = error

    def __str__(self) -> str:
        return str(self.detail)


GenerationRefused.__name__ = "K-LoRA"
"""The hosts' page shows an error as its type's name, a colon and its text."""


def refuse(p: Any, error: BaseException) -> None:
    """Make `p` raise at the next of its own methods that the host calls outside its catch-all around script hooks."""
    refused = GenerationRefused(error)

    def stop(*_args: Any, **_kwargs: Any) -> None:
        raise refused

    for name in ("init", "setup_conds", "sample"):
        override(p, name, stop)


@dataclass(frozen=True)
class Override:
    """What stands in the place of a method of `p`.

    Attributes:
        found: what another extension had put there before; None if it was the method of its class.
    """

    method: Callable
    found: Callable | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.method(*args, **kwargs)


def override(p: Any, name: str, method: Callable) -> None:
    """Put `method` in the place of one of the methods of `p`."""
    setattr(p, name, Override(method, p.__dict__.get(name)))


def let_go(p: Any) -> None:
    """Give `p` the methods back that it had, of whichever hold the overriding ones are."""
    for name in OVERRIDDEN:
        while isinstance(ours := p.__dict__.get(name), Override):
            if ours.found is None:
                del p.__dict__[name]
            else:
                p.__dict__[name] = ours.found
