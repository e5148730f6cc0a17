"""FLUX.2 Klein, 4B and 9B: two networks built alike, of different depth and width.

Native names are Black Forest Labs' (black-forest-labs/flux2, model.py). The other names are those of
diffusers' Flux2Transformer2DModel, where linear1 of a single block is one module as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from klora.core.families.base import Alias, Block, Family
from klora.core.families.flux_blocks import (
    BLOCKS,
    depths,
    double_blocks,
    fused_projections,
    namesakes,
    other_by_size,
    single_norms,
)
from klora.core.topology import Module

_CUT_OFF = "diffusers, cut off"
"""Some exports say sformer_blocks for transformer_blocks, and diffusers reads them."""

_MODULATIONS = ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")


def _modules(doubles: int, singles: int) -> Iterator[Module]:
    yield Module("img_in", ("x_embedder",))
    yield Module("txt_in", ("context_embedder",))
    for native, diffusers in (("in_layer", "linear_1"), ("out_layer", "linear_2")):
        yield Module(
            f"time_in.{native}", (f"time_guidance_embed.timestep_embedder.{diffusers}",), unread=True
        )
    for name in _MODULATIONS:
        yield Module(f"{name}.lin", (f"{name}.linear",), unread=True)
    yield from double_blocks(doubles, mlp=("linear_in", "linear_out"), modulated=False)
    for block in range(singles):
        native, diffusers = f"single_blocks.{block}", f"single_transformer_blocks.{block}.attn"
        pieces = ("q", "k", "v", "mlp")
        yield Module(
            f"{native}.linear1", (f"{diffusers}.to_qkv_mlp_proj",), pieces=pieces, square=3, widths=9
        )
        yield Module(f"{native}.linear2", (f"{diffusers}.to_out",))
        yield from single_norms(block)
    yield Module("final_layer.linear", ("proj_out",))
    yield Module("final_layer.adaLN_modulation.1", ("norm_out.linear",), halves_swapped=True)


def _layers_apart(module: Module) -> list[tuple[str, ...]]:
    """The layers of each of a module's modules in diffusers."""
    return [module.layers] if len(module.diffusers) == 1 else [(layer,) for layer in module.layers]


def _klein(size: str, doubles: int, singles: int, width: int) -> Family:
    def aliases() -> Iterator[Alias]:
        yield from fused_projections(family.modules)
        for module in family.modules:
            for name, layers in zip(module.diffusers, _layers_apart(module), strict=True):
                if name.startswith("transformer_blocks."):
                    yield Alias(name.removeprefix("tran"), module, layers, _CUT_OFF)

    def is_checkpoint(model: Any, denoiser: Any) -> bool:
        return depths(denoiser) == (doubles, singles) and hasattr(denoiser, _MODULATIONS[0])

    def is_pipeline(pipeline: Any) -> bool:
        transformer: Any = getattr(pipeline, "transformer", None)
        if type(transformer).__name__ != "Flux2Transformer2DModel":
            return False
        blocks = len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)
        return blocks == (doubles, singles)

    name = f"FLUX.2 Klein {size}"
    family = Family(
        key=f"klein{size.lower()}",
        name=name,
        short_name=name,
        words=("flux", "klein"),
        list_modules=partial(_modules, doubles, singles),
        list_aliases=aliases,
        blocks={
            **dict.fromkeys(("img_in", "txt_in", "time_in"), Block("in")),
            **dict.fromkeys(_MODULATIONS, Block("modulation")),
            **BLOCKS,
        },
        component="transformer",
        text_encoders={},
        readable=("kohya", "diffusers PEFT"),
        is_checkpoint=is_checkpoint,
        is_pipeline=is_pipeline,
        other_by_size=partial(other_by_size, width, True),
        namesakes=namesakes(name),
        image_input="img_in",
        schedule="s*",
    )
    return family


KLEIN_4B = _klein("4B", doubles=5, singles=20, width=3072)
KLEIN_9B = _klein("9B", doubles=8, singles=24, width=4096)
