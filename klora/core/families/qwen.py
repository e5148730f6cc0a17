"""Qwen-Image and Qwen-Image-Edit.

diffusers' names are the native ones: the checkpoints are published in them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from klora.core.families.base import ATTENTION_WIDTHS, Block, Family, Row, has_transformer, modules_of
from klora.core.topology import NORM, Module

BLOCKS = 60
_ROWS = (
    Row("img_in"),
    Row("txt_in"),
    Row("txt_norm", kind=NORM),
    Row("time_text_embed.timestep_embedder.linear_{1,2}"),
    Row("transformer_blocks.#.attn.{to_q,to_k,to_v,to_out.0}"),
    Row("transformer_blocks.#.attn.{add_q_proj,add_k_proj,add_v_proj,to_add_out}"),
    Row("transformer_blocks.#.attn.{norm_q,norm_k,norm_added_q,norm_added_k}", kind=NORM),
    Row("transformer_blocks.#.{img,txt}_mlp.net.{0.proj,2}"),
    Row("transformer_blocks.#.{img,txt}_mod.1"),
    Row("norm_out.linear"),
    Row("proj_out"),
)


def qwen_modules() -> Iterator[Module]:
    """All modules of Qwen-Image's transformer: 60 blocks of two streams, 3072 wide."""
    return modules_of(_ROWS, BLOCKS)


def _other_by_size(name: str, rows: int, columns: int) -> str | None:
    if ".attn." not in name or columns == 3072:
        return None
    grouped = name.endswith((".to_k", ".to_v")) and columns == 4 * rows
    return "Krea 2" if grouped else ATTENTION_WIDTHS.get(columns)


def _is_checkpoint(model: Any, denoiser: Any) -> bool:
    return hasattr(denoiser, "transformer_blocks") and hasattr(denoiser, "txt_norm")


QWEN = Family(
    key="qwen",
    name="Qwen-Image",
    short_name="Qwen-Image",
    words=("qwen",),
    list_modules=qwen_modules,
    blocks={
        **dict.fromkeys(("img_in", "txt_in", "txt_norm", "time_text_embed"), Block("in")),
        "transformer_blocks": Block("block", numbered=True),
        **dict.fromkeys(("norm_out", "proj_out"), Block("out")),
    },
    component="transformer",
    text_encoders={},
    readable=("kohya", "dotted native", "diffusers PEFT"),
    is_checkpoint=_is_checkpoint,
    is_pipeline=has_transformer("QwenImageTransformer2DModel"),
    other_by_size=_other_by_size,
    namesakes=((r"flux[-_. ]?1|^flux$", "FLUX.1"), (r"^(stable-diffusion-3|sd_?3)", "Stable Diffusion 3")),
    image_input="img_in",
    schedule="s*",
    guidance="true_cfg_scale",
)
