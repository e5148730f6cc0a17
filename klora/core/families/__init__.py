"""The base models whose LoRAs K-LoRA fuses, one file each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from klora.core.families.anima import ANIMA
from klora.core.families.base import Family
from klora.core.families.ernie import ERNIE
from klora.core.families.flux import FLUX
from klora.core.families.krea import KREA
from klora.core.families.qwen import QWEN
from klora.core.families.sdxl import SDXL
from klora.core.families.wan import WAN

FAMILIES: Mapping[str, Family] = {
    family.key: family for family in (SDXL, FLUX, ANIMA, QWEN, KREA, WAN, ERNIE)
}


def listed(word: str, short: bool = False) -> str:
    """The names of all families as part of a sentence, with `word` before the last: "SDXL and FLUX.1"."""
    *names, last = [family.short_name if short else family.name for family in FAMILIES.values()]
    return f"{', '.join(names)} {word} {last}" if names else last


def of_checkpoint(model: Any, denoiser: Any) -> str | None:
    """The key of the family of a WebUI's loaded checkpoint, None if it belongs to none.

    Args:
        model: the WebUI's record of the checkpoint.
        denoiser: the network that is sampled.
    """
    return next((family.key for family in FAMILIES.values() if family.is_checkpoint(model, denoiser)), None)


def of_pipeline(pipeline: Any) -> str | None:
    """The key of a diffusers pipeline's family, None if it belongs to none."""
    return next((family.key for family in FAMILIES.values() if family.is_pipeline(pipeline)), None)
