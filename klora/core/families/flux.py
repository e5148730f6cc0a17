"""FLUX.1: dev, schnell, Krea, Kontext and Fill."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial
from typing import Any

from klora.core.families.base import XLABS, Alias, Block, Family, LayerShapes, has_transformer
from klora.core.families.flux_blocks import (
    BLOCKS,
    depths,
    double_blocks,
    fused_projections,
    namesakes,
    other_by_size,
    single_blocks,
)
from klora.core.topology import Module

DOUBLE_BLOCKS, SINGLE_BLOCKS = 19, 38


def flux_modules() -> Iterator[Module]:
    """All modules of FLUX.1's transformer: 19 double and 38 single blocks, 304 fused matrices inside them."""
    yield from _ends()
    yield from double_blocks(DOUBLE_BLOCKS)
    yield from single_blocks(SINGLE_BLOCKS)


def _ends() -> Iterator[Module]:
    for native, diffusers in (
        ("time_in", "timestep_embedder"),
        ("vector_in", "text_embedder"),
        ("guidance_in", "guidance_embedder"),
    ):
        yield Module(f"{native}.in_layer", (f"time_text_embed.{diffusers}.linear_1",))
        yield Module(f"{native}.out_layer", (f"time_text_embed.{diffusers}.linear_2",))
    yield Module("img_in", ("x_embedder",))
    yield Module("txt_in", ("context_embedder",))
    yield Module("final_layer.linear", ("proj_out",))
    yield Module("final_layer.adaLN_modulation.1", ("norm_out.linear",), halves_swapped=True)


_XLABS = {
    ".img_attn.qkv": "qkv_lora1",
    ".img_attn.proj": "proj_lora1",
    ".txt_attn.qkv": "qkv_lora2",
    ".txt_attn.proj": "proj_lora2",
    ".linear1": "qkv",
    ".linear2": "proj",
}


def _aliases() -> Iterator[Alias]:
    """XLabs' processors (XLabs-AI/x-flux), and diffusers' fused projections."""
    yield from fused_projections(FLUX.modules)
    for module in FLUX.modules:
        for end, processor in _XLABS.items():
            if module.native.endswith(end):
                block = module.native.removesuffix(end)
                yield Alias(f"{block}.processor.{processor}", module, module.layers[:3], XLABS)


def _control_of(unknown_keys: Collection[str], shapes: LayerShapes) -> str | None:
    """Black Forest Labs' Depth and Canny replace norms and widen the image input, as LoRAs for Fill do."""
    is_control = any(key.endswith("_norm.scale") for key in unknown_keys) or (
        "img_in" in shapes and shapes["img_in"][1] in (128, 384)
    )
    return "a control LoRA (FLUX.1 Depth or Canny, or for FLUX.1 Fill)" if is_control else None


def _is_checkpoint(model: Any, denoiser: Any) -> bool:
    return depths(denoiser) == (DOUBLE_BLOCKS, SINGLE_BLOCKS) and hasattr(denoiser, "vector_in")


FLUX = Family(
    key="flux",
    name="FLUX.1",
    short_name="FLUX",
    words=("flux", "dev"),
    list_modules=flux_modules,
    list_aliases=_aliases,
    blocks={
        **dict.fromkeys(("img_in", "txt_in", "time_in", "vector_in", "guidance_in"), Block("in")),
        **BLOCKS,
    },
    component="transformer",
    text_encoders={"te1": "text_encoder", "t5": "text_encoder_2"},
    readable=("kohya", "diffusers PEFT"),
    is_checkpoint=_is_checkpoint,
    is_pipeline=has_transformer("FluxTransformer2DModel"),
    other_by_size=partial(other_by_size, 3072, False),
    namesakes=namesakes("FLUX.1"),
    control_of=_control_of,
    image_input="img_in",
    in_paper=True,
    schedule="s*",
)
