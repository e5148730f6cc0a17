"""The module names of Stable Diffusion's UNets, and the variants of these names that trainers write.

Native names are CompVis' and SGM's (openaimodel.py). The other names are those of diffusers'
conversion script.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from klora.core.families.base import DIFFUSERS, NATIVE, OLD_PROCESSOR, Alias, Block
from klora.core.topology import CONV, LINEAR, NORM, Module

BLOCKS = {
    "time_embed": Block("time"),
    "label_emb": Block("label"),
    "input_blocks": Block("down", numbered=True),
    "middle_block": Block("mid"),
    "output_blocks": Block("up", numbered=True),
    "out": Block("out"),
}

_Pairs = Iterator[tuple[str, str, str]]


def unet_modules(
    widths: Sequence[int], depths: Sequence[int], middle_depth: int, projection: str, labelled: bool
) -> Iterator[Module]:
    """All modules of a UNet with two residual blocks per level on the way down and three on the way up.

    Args:
        widths: relative number of channels of each level, the outermost first.
        depths: transformer blocks after each residual block of a level; 0 for a level without attention.
        middle_depth: transformer blocks in the middle block.
        projection: kind of the transformers' proj_in and proj_out, LINEAR or CONV.
        labelled: whether image size and crop are embedded beside the time.
    """
    pairs = [
        ("time_embed.0", "time_embedding.linear_1", LINEAR),
        ("time_embed.2", "time_embedding.linear_2", LINEAR),
        *(_labels() if labelled else ()),
        ("input_blocks.0.0", "conv_in", CONV),
        ("out.0", "conv_norm_out", NORM),
        ("out.2", "conv_out", CONV),
        *_down(widths, depths, projection),
        *_residual("middle_block.0", "mid_block.resnets.0", widens=False),
        *_transformer("middle_block.1", "mid_block.attentions.0", middle_depth, projection),
        *_residual("middle_block.2", "mid_block.resnets.1", widens=False),
        *_up(depths, projection),
    ]
    for native, diffusers, kind in pairs:
        yield Module(native, (diffusers,), kind)


def _labels() -> _Pairs:
    yield "label_emb.0.0", "add_embedding.linear_1", LINEAR
    yield "label_emb.0.2", "add_embedding.linear_2", LINEAR


def _down(widths: Sequence[int], depths: Sequence[int], projection: str) -> _Pairs:
    for level, depth in enumerate(depths):
        for index in range(2):
            native, diffusers = f"input_blocks.{1 + 3 * level + index}", f"down_blocks.{level}"
            widens = level > 0 and index == 0 and widths[level] != widths[level - 1]
            yield from _residual(f"{native}.0", f"{diffusers}.resnets.{index}", widens)
            yield from _transformer(f"{native}.1", f"{diffusers}.attentions.{index}", depth, projection)
        if level < len(depths) - 1:
            yield f"input_blocks.{3 * level + 3}.0.op", f"down_blocks.{level}.downsamplers.0.conv", CONV


def _up(depths: Sequence[int], projection: str) -> _Pairs:
    for level, depth in enumerate(reversed(depths)):
        for index in range(3):
            native, diffusers = f"output_blocks.{3 * level + index}", f"up_blocks.{level}"
            yield from _residual(f"{native}.0", f"{diffusers}.resnets.{index}", widens=True)
            yield from _transformer(f"{native}.1", f"{diffusers}.attentions.{index}", depth, projection)
        if level < len(depths) - 1:
            place = 2 if depth else 1
            yield f"output_blocks.{3 * level + 2}.{place}.conv", f"up_blocks.{level}.upsamplers.0.conv", CONV


def _residual(native: str, diffusers: str, widens: bool) -> _Pairs:
    yield f"{native}.in_layers.0", f"{diffusers}.norm1", NORM
    yield f"{native}.in_layers.2", f"{diffusers}.conv1", CONV
    yield f"{native}.emb_layers.1", f"{diffusers}.time_emb_proj", LINEAR
    yield f"{native}.out_layers.0", f"{diffusers}.norm2", NORM
    yield f"{native}.out_layers.3", f"{diffusers}.conv2", CONV
    if widens:
        yield f"{native}.skip_connection", f"{diffusers}.conv_shortcut", CONV


def _transformer(native: str, diffusers: str, depth: int, projection: str) -> _Pairs:
    if depth == 0:
        return
    for name, kind in (("norm", NORM), ("proj_in", projection), ("proj_out", projection)):
        yield f"{native}.{name}", f"{diffusers}.{name}", kind
    attention = [
        f"{attn}.{part}" for attn in ("attn1", "attn2") for part in ("to_q", "to_k", "to_v", "to_out.0")
    ]
    linear = [*attention, "ff.net.0.proj", "ff.net.2"]
    for block in range(depth):
        for name in linear:
            yield (
                f"{native}.transformer_blocks.{block}.{name}",
                f"{diffusers}.transformer_blocks.{block}.{name}",
                LINEAR,
            )
        for name in ("norm1", "norm2", "norm3"):
            yield (
                f"{native}.transformer_blocks.{block}.{name}",
                f"{diffusers}.transformer_blocks.{block}.{name}",
                NORM,
            )


def attention_aliases(modules: Iterable[Module]) -> Iterator[Alias]:
    """Attention as diffusers wrote it before PEFT: `attn1.processor.to_q_lora.up.weight`, `to_out_lora.…`."""
    for module in modules:
        for name, naming in ((module.diffusers[0], DIFFUSERS), (module.native, NATIVE)):
            block, dot, projection = name.rpartition(".to_")
            if not dot:
                continue
            short = projection.removesuffix(".0")
            yield Alias(f"{block}.processor.to_{short}", module, module.layers, OLD_PROCESSOR)
            if short != projection:
                yield Alias(f"{block}.to_{short}", module, module.layers, naming)


_CONTEXTS = {768: "SD 1.5", 1024: "Stable Diffusion 2.x", 1280: "the SDXL refiner", 2048: "SDXL"}
"""{width of the text encoders' output: model}"""

_NARROWER_IN_SDXL = ("output_blocks.3.1.", "output_blocks.4.1.", "output_blocks.5.1.")
"""Transformers that are 640 channels wide in SDXL and 1280 in SD 1.5 and 2.x."""

_HEADERS = (
    (r"^(stable-diffusion-v1|sd_v1)", "SD 1.5"),
    (r"^(stable-diffusion-v2|sd_v2)", "Stable Diffusion 2.x"),
    (r"^(stable-diffusion-xl|sdxl)", "SDXL"),
)


def other_by_size(own: str, name: str, rows: int, columns: int) -> str | None:
    """`Family.other_by_size` of the UNet of this name."""
    found = _CONTEXTS.get(columns) if name.endswith((".attn2.to_k", ".attn2.to_v")) else None
    if found is None and name.startswith(_NARROWER_IN_SDXL):
        found = {640: "SDXL", 1280: "SD 1.5"}.get(rows)
    return None if found == own else found


def namesakes(own: str) -> tuple[tuple[str, str], ...]:
    """`Family.namesakes` of the UNet of this name."""
    return tuple((pattern, other) for pattern, other in _HEADERS if other != own)
