"""SDXL, and the models trained from it, such as Pony, Illustrious and NoobAI.

Native names are SGM's (sgm/modules/diffusionmodules/openaimodel.py with sd_xl_base.yaml). The other names are
those of diffusers' conversion script.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from klora.core.families.base import DIFFUSERS, NATIVE, OLD_PROCESSOR, Alias, Block, Family
from klora.core.topology import CONV, LINEAR, NORM, Module


def sdxl_modules() -> Iterator[Module]:
    """All modules of SDXL's UNet: 320, 640 and 1280 channels with 0, 2 and 10 transformer blocks."""
    pairs = [
        ("time_embed.0", "time_embedding.linear_1", LINEAR),
        ("time_embed.2", "time_embedding.linear_2", LINEAR),
        ("label_emb.0.0", "add_embedding.linear_1", LINEAR),
        ("label_emb.0.2", "add_embedding.linear_2", LINEAR),
        ("input_blocks.0.0", "conv_in", CONV),
        ("out.0", "conv_norm_out", NORM),
        ("out.2", "conv_out", CONV),
        *_down(),
        *_residual("middle_block.0", "mid_block.resnets.0", widens=False),
        *_transformer("middle_block.1", "mid_block.attentions.0", depth=10),
        *_residual("middle_block.2", "mid_block.resnets.1", widens=False),
        *_up(),
    ]
    for native, diffusers, kind in pairs:
        yield Module(native, (diffusers,), kind)


_Pairs = Iterator[tuple[str, str, str]]
_DEPTHS = (0, 2, 10)


def _down() -> _Pairs:
    for level, depth in enumerate(_DEPTHS):
        for index in range(2):
            native, diffusers = f"input_blocks.{1 + 3 * level + index}", f"down_blocks.{level}"
            yield from _residual(
                f"{native}.0", f"{diffusers}.resnets.{index}", widens=level > 0 and index == 0
            )
            yield from _transformer(f"{native}.1", f"{diffusers}.attentions.{index}", depth)
        if level < 2:
            yield f"input_blocks.{3 * level + 3}.0.op", f"down_blocks.{level}.downsamplers.0.conv", CONV


def _up() -> _Pairs:
    for level, depth in enumerate(reversed(_DEPTHS)):
        for index in range(3):
            native, diffusers = f"output_blocks.{3 * level + index}", f"up_blocks.{level}"
            yield from _residual(f"{native}.0", f"{diffusers}.resnets.{index}", widens=True)
            yield from _transformer(f"{native}.1", f"{diffusers}.attentions.{index}", depth)
        if level < 2:
            yield f"output_blocks.{3 * level + 2}.2.conv", f"up_blocks.{level}.upsamplers.0.conv", CONV


def _residual(native: str, diffusers: str, widens: bool) -> _Pairs:
    yield f"{native}.in_layers.0", f"{diffusers}.norm1", NORM
    yield f"{native}.in_layers.2", f"{diffusers}.conv1", CONV
    yield f"{native}.emb_layers.1", f"{diffusers}.time_emb_proj", LINEAR
    yield f"{native}.out_layers.0", f"{diffusers}.norm2", NORM
    yield f"{native}.out_layers.3", f"{diffusers}.conv2", CONV
    if widens:
        yield f"{native}.skip_connection", f"{diffusers}.conv_shortcut", CONV


def _transformer(native: str, diffusers: str, depth: int) -> _Pairs:
    if depth == 0:
        return
    for name, kind in (("norm", NORM), ("proj_in", LINEAR), ("proj_out", LINEAR)):
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


def _aliases() -> Iterator[Alias]:
    """Attention as diffusers wrote it before PEFT: `attn1.processor.to_q_lora.up.weight`, `to_out_lora.…`."""
    for module in SDXL.modules:
        for name, naming in ((module.diffusers[0], DIFFUSERS), (module.native, NATIVE)):
            block, dot, projection = name.rpartition(".to_")
            if not dot:
                continue
            short = projection.removesuffix(".0")
            yield Alias(f"{block}.processor.to_{short}", module, module.layers, OLD_PROCESSOR)
            if short != projection:
                yield Alias(f"{block}.to_{short}", module, module.layers, naming)


_CONTEXTS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "the SDXL refiner"}
"""{columns of a key projection in cross-attention: model}; SDXL has 2048."""


def _other_by_size(name: str, rows: int, columns: int) -> str | None:
    return _CONTEXTS.get(columns) if name.endswith((".attn2.to_k", ".attn2.to_v")) else None


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
    blocks={
        "time_embed": Block("time"),
        "label_emb": Block("label"),
        "input_blocks": Block("down", numbered=True),
        "middle_block": Block("mid"),
        "output_blocks": Block("up", numbered=True),
        "out": Block("out"),
    },
    component="unet",
    text_encoders={"te1": "text_encoder", "te2": "text_encoder_2"},
    readable=("kohya", "kohya with diffusers names"),
    is_checkpoint=_is_checkpoint,
    is_pipeline=_is_pipeline,
    other_by_size=_other_by_size,
)
