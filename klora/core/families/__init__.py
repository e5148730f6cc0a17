"""The base models whose LoRAs K-LoRA fuses, one file each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from klora.core.families.anima import ANIMA
from klora.core.families.base import Family
from klora.core.families.chroma import CHROMA
from klora.core.families.ernie import ERNIE
from klora.core.families.flux import FLUX
from klora.core.families.flux2 import KLEIN_4B, KLEIN_9B
from klora.core.families.krea import KREA
from klora.core.families.nextdit import LUMINA_2, Z_IMAGE
from klora.core.families.qwen import QWEN
from klora.core.families.sd15 import SD15
from klora.core.families.sdxl import SDXL
from klora.core.families.wan import WAN

FAMILIES: Mapping[str, Family] = {
    family.key: family
    for family in (
        SDXL,
        SD15,
        FLUX,
        CHROMA,
        KLEIN_4B,
        KLEIN_9B,
        Z_IMAGE,
        LUMINA_2,
        ANIMA,
        QWEN,
        KREA,
        WAN,
        ERNIE,
    )
}


def listed(word: str) -> str:
    """The names of all families as part of a sentence, with `word` before the last: "SDXL and FLUX.1"."""
    return _joined([family.name for family in FAMILIES.values()], word)


def _joined(all_names: list[str], word: str) -> str:
    *names, last = all_names
    return f"{', '.join(names)} {word} {last}" if names else last


def with_pipelines(word: str) -> str:
    """The names of the families that diffusers has a pipeline for, as part of a sentence."""
    return _joined(
        [family.short_name for family in FAMILIES.values() if family.is_pipeline is not None], word
    )


def models_taken() -> str:
    """What diffusers opens a model of these from, for a sentence."""
    files = [family.short_name for family in FAMILIES.values() if family.single_file]
    return f"a diffusers folder of {with_pipelines('or')}, or a single file of {_joined(files, 'or')}"


def of_checkpoint(model: Any, denoiser: Any) -> Family | None:
    """The family of a WebUI's loaded checkpoint, None if it belongs to none.

    Args:
        model: the WebUI's record of the checkpoint.
        denoiser: the network that is sampled.
    """
    return next((family for family in FAMILIES.values() if family.is_checkpoint(model, denoiser)), None)


def of_pipeline(pipeline: Any) -> Family | None:
    """A diffusers pipeline's family, None if it belongs to none."""
    for family in FAMILIES.values():
        if family.is_pipeline is not None and family.is_pipeline(pipeline):
            return family
    return None
