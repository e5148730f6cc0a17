"""Krea 2, Raw and Turbo. (Krea 1, FLUX.1 Krea, is a FLUX.1.)

Native names are Krea's (krea-ai/krea-2), as ComfyUI and Forge Neo have them; the others are those of
diffusers' conversion of LoRAs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from klora.core.families.base import (
    ATTENTION_WIDTHS,
    DIFFUSERS,
    Alias,
    Block,
    Family,
    Row,
    has_transformer,
    modules_of,
)
from klora.core.topology import NORM, Module

BLOCKS = 28
_ROWS = (
    Row("first", "img_in"),
    Row("tmlp.{0,2}", "time_embed.linear_{1,2}"),
    Row("tproj.1", "time_mod_proj"),
    Row("txtmlp.0", "txt_in.norm", NORM),
    Row("txtmlp.{1,3}", "txt_in.linear_{1,2}"),
    Row("txtfusion.projector", "text_fusion.projector"),
    *(
        row
        for native, diffusers in (
            ("txtfusion.{layerwise,refiner}_blocks.{0,1}", "text_fusion.{layerwise,refiner}_blocks.{0,1}"),
            ("blocks.#", "transformer_blocks.#"),
        )
        for row in (
            Row(
                f"{native}.attn.{{wq,wk,wv,gate,wo}}",
                f"{diffusers}.attn.{{to_q,to_k,to_v,to_gate,to_out.0}}",
            ),
            Row(f"{native}.attn.qknorm.{{q,k}}norm", f"{diffusers}.attn.norm_{{q,k}}", NORM),
            Row(f"{native}.mlp.{{gate,up,down}}", f"{diffusers}.ff.{{gate,up,down}}"),
            Row(f"{native}.{{prenorm,postnorm}}", f"{diffusers}.{{norm1,norm2}}", NORM),
        )
    ),
    Row("last.norm", "final_layer.norm", NORM),
    Row("last.linear", "final_layer.linear"),
)  # fmt: skip


def krea_modules() -> Iterator[Module]:
    """All modules of Krea 2's transformer.

    Its 28 blocks are 6144 wide, with 1536 rows for keys and values; 4 before them fuse the text's layers.
    """
    return modules_of(_ROWS, BLOCKS)


def _aliases() -> Iterator[Alias]:
    """`to_out` without its number, as it stands in some files in diffusers' names."""
    for module in KREA.modules:
        (name,) = module.diffusers
        if name.endswith(".to_out.0"):
            yield Alias(name.removesuffix(".0"), module, module.layers, DIFFUSERS)


def _other_by_size(name: str, rows: int, columns: int) -> str | None:
    """Four queries share one key and value here, and nowhere else under these names."""
    if not name.startswith("blocks.") or ".attn." not in name:
        return None
    if name.endswith((".wk", ".wv")) and rows == columns:
        return ATTENTION_WIDTHS.get(columns, "FLUX.1, FLUX.2 or Qwen-Image")
    return None if columns == 6144 else ATTENTION_WIDTHS.get(columns)


def _is_checkpoint(model: Any, denoiser: Any) -> bool:
    return hasattr(denoiser, "blocks") and hasattr(denoiser, "txtfusion")


KREA = Family(
    key="krea",
    name="Krea 2",
    short_name="Krea 2",
    words=("krea",),
    accelerated_names=("krea 2 turbo",),
    list_modules=krea_modules,
    list_aliases=_aliases,
    blocks={
        **dict.fromkeys(("first", "tmlp", "tproj", "txtmlp"), Block("in")),
        "txtfusion": Block("text"),
        "blocks": Block("block", numbered=True),
        "last": Block("out"),
    },
    component="transformer",
    text_encoders={},
    readable=("kohya", "dotted native", "diffusers PEFT"),
    is_checkpoint=_is_checkpoint,
    is_pipeline=has_transformer("Krea2Transformer2DModel"),
    other_by_size=_other_by_size,
    image_input="first",
    schedule="s*",
)
