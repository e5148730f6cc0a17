"""SDXL, and the models trained from it, such as Pony, Illustrious and NoobAI.

Native names are SGM's (sgm/modules/diffusionmodules/openaimodel.py with sd_xl_base.yaml).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from klora.core.families.base import Alias, Family
from klora.core.families.unet import BLOCKS, attention_aliases, namesakes, other_by_size, unet_modules
from klora.core.topology import LINEAR, Module


def sdxl_modules() -> Iterator[Module]:
    """All modules of SDXL's UNet: 320, 640 and 1280 channels with 0, 2 and 10 transformer blocks."""
    return unet_modules(
        widths=(1, 2, 4), depths=(0, 2, 10), middle_depth=10, projection=LINEAR, labelled=True
    )


def _aliases() -> Iterator[Alias]:
    return attention_aliases(SDXL.modules)


def _is_checkpoint(model: Any, denoiser: Any) -> bool:
    return bool(getattr(model, "is_sdxl", False))


def _is_pipeline(pipeline: Any) -> bool:
    return hasattr(pipeline, "unet") and hasattr(pipeline, "text_encoder_2")


SDXL = Family(
    key="sdxl",
    name="SDXL",
    short_name="SDXL",
    words=("sdxl", "xl"),
    list_modules=sdxl_modules,
    list_aliases=_aliases,
    blocks=BLOCKS,
    component="unet",
    text_encoders={"te1": "text_encoder", "te2": "text_encoder_2"},
    readable=("kohya", "kohya with diffusers names"),
    is_checkpoint=_is_checkpoint,
    is_pipeline=_is_pipeline,
    single_file="StableDiffusionXLPipeline",
    image_input="input_blocks.0.0",
    in_paper=True,
    other_by_size=partial(other_by_size, "SDXL"),
    namesakes=namesakes("SDXL"),
)
