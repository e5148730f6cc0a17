"""The base models whose LoRAs K-LoRA fuses, one file each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from klora.core.families.base import Family
from klora.core.families.flux import FLUX
from klora.core.families.sdxl import SDXL

FAMILIES: Mapping[str, Family] = {family.key: family for family in (SDXL, FLUX)}


def listed(word: str, short: bool = False) -> str:
    """The names of all families for a sentence, `word` before the last: "SDXL and FLUX.1"."""
    *names, last = [family.short_name if short else family.name for family in FAMILIES.values()]
    return f"{', '.join(names)} {word} {last}" if names else last


def of_checkpoint(model: Any, denoiser: Any) -> str | None:
    """The key of a WebUI's loaded checkpoint's family, None if it is of none.

    Args:
        model: the WebUI's record of it.
        denoiser: its network.
    """
    return next((family.key for family in FAMILIES.values() if family.is_checkpoint(model, denoiser)), None)


def of_pipeline(pipeline: Any) -> str | None:
    """The key of a diffusers pipeline's family, None if it is of none."""
    return next((family.key for family in FAMILIES.values() if family.is_pipeline(pipeline)), None)
