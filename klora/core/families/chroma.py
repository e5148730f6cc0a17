"""Chroma: FLUX.1's blocks without modulations of their own; a small network makes them for all blocks.

Native names are those of ComfyUI, Forge and Forge Neo; the others are those of diffusers'
ChromaTransformer2DModel.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from klora.core.families.base import Alias, Block, Family, has_transformer
from klora.core.families.flux import DOUBLE_BLOCKS, SINGLE_BLOCKS
from klora.core.families.flux_blocks import (
    BLOCKS,
    depths,
    double_blocks,
    fused_projections,
    namesakes,
    other_by_size,
    single_blocks,
)
from klora.core.topology import NORM, Module

_GUIDANCE = "distilled_guidance_layer"


def chroma_modules() -> Iterator[Module]:
    """All modules of Chroma's transformer, whose blocks get their modulations from the guidance layer."""
    yield Module("img_in", ("x_embedder",))
    yield Module("txt_in", ("context_embedder",))
    yield Module(f"{_GUIDANCE}.in_proj", (f"{_GUIDANCE}.in_proj",))
    for layer in range(5):
        path = f"{_GUIDANCE}.layers.{layer}"
        yield Module(f"{path}.in_layer", (f"{path}.linear_1",), unread=True)
        yield Module(f"{path}.out_layer", (f"{path}.linear_2",), unread=True)
        yield Module(f"{_GUIDANCE}.norms.{layer}", (f"{_GUIDANCE}.norms.{layer}",), NORM)
    yield Module(f"{_GUIDANCE}.out_proj", (f"{_GUIDANCE}.out_proj",))
    yield from double_blocks(DOUBLE_BLOCKS, modulated=False)
    yield from single_blocks(SINGLE_BLOCKS, modulated=False)
    yield Module("final_layer.linear", ("proj_out",))


def _aliases() -> Iterator[Alias]:
    return fused_projections(CHROMA.modules)


def _is_checkpoint(model: Any, denoiser: Any) -> bool:
    return depths(denoiser) == (DOUBLE_BLOCKS, SINGLE_BLOCKS) and hasattr(denoiser, _GUIDANCE)


CHROMA = Family(
    key="chroma",
    name="Chroma",
    short_name="Chroma",
    words=("chroma",),
    list_modules=chroma_modules,
    list_aliases=_aliases,
    blocks={
        **dict.fromkeys(("img_in", "txt_in"), Block("in")),
        _GUIDANCE: Block("guidance"),
        **BLOCKS,
    },
    component="transformer",
    text_encoders={"t5": "text_encoder"},
    # Forge Neo reads diffusers' names of it too, but Forge only those of FLUX.1 (model_lora_keys_unet).
    readable=("kohya",),
    is_checkpoint=_is_checkpoint,
    is_pipeline=has_transformer("ChromaTransformer2DModel"),
    other_by_size=partial(other_by_size, 3072, False),
    namesakes=namesakes("Chroma"),
    image_input="img_in",
    schedule="s*",
)
