"""Stable Diffusion 1.5, and the models trained from it or from 1.4.

Native names are CompVis' (ldm/modules/diffusionmodules/openaimodel.py with v1-inference.yaml).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from klora.core.families.base import Alias, Family
from klora.core.families.unet import BLOCKS, attention_aliases, namesakes, other_by_size, unet_modules
from klora.core.topology import CONV, Module


def sd15_modules() -> Iterator[Module]:
    """All modules of its UNet: 320, 640, 1280 and 1280 channels with 1, 1, 1 and 0 transformer blocks."""
    return unet_modules(
        widths=(1, 2, 4, 4), depths=(1, 1, 1, 0), middle_depth=1, projection=CONV, labelled=False
    )


def _aliases() -> Iterator[Alias]:
    return attention_aliases(SD15.modules)


def _is_checkpoint(model: Any, denoiser: Any) -> bool:
    return bool(getattr(model, "is_sd1", False))


def _is_pipeline(pipeline: Any) -> bool:
    """By its outermost transformer, which SDXL lacks, with a convolution where SD 2 has a linear layer."""
    unet = getattr(pipeline, "unet", None)
    modules = {} if unet is None else dict(unet.named_modules())
    weight = getattr(modules.get("down_blocks.0.attentions.0.proj_in"), "weight", None)
    return weight is not None and weight.dim() == 4


SD15 = Family(
    key="sd15",
    name="SD 1.5",
    short_name="SD 1.5",
    words=("sd", "sdv", "stable", "diffusion"),
    list_modules=sd15_modules,
    list_aliases=_aliases,
    blocks={name: block for name, block in BLOCKS.items() if name != "label_emb"},
    component="unet",
    text_encoders={"te1": "text_encoder"},
    readable=("kohya", "kohya with diffusers names"),
    is_checkpoint=_is_checkpoint,
    is_pipeline=_is_pipeline,
    single_file="StableDiffusionPipeline",
    image_input="input_blocks.0.0",
    side=512,
    other_by_size=partial(other_by_size, "SD 1.5"),
    namesakes=namesakes("SD 1.5"),
)
