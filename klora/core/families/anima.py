"""Anima, which is built as NVIDIA's Cosmos-Predict2 2B.

Native names are those of Cosmos, as ComfyUI and Forge Neo have them; the others are those of
diffusers' conversion of LoRAs. Of pipelines, diffusers has only modular blocks for it, and they tell nobody
when a step ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from klora.core.families.base import Block, Family, Row, modules_of
from klora.core.topology import NORM, Module

BLOCKS = 28
_ROWS = (
    Row("x_embedder.proj.1", "patch_embed.proj"),
    Row("t_embedder.1.linear_{1,2}", "time_embed.t_embedder.linear_{1,2}"),
    Row("t_embedding_norm", "time_embed.norm", NORM),
    Row(
        "blocks.#.{self,cross}_attn.{q_proj,k_proj,v_proj,output_proj}",
        "transformer_blocks.#.attn{1,2}.{to_q,to_k,to_v,to_out.0}",
    ),
    Row("blocks.#.{self,cross}_attn.{q,k}_norm", "transformer_blocks.#.attn{1,2}.norm_{q,k}", NORM),
    Row("blocks.#.mlp.{layer1,layer2}", "transformer_blocks.#.ff.net.{0.proj,2}"),
    Row(
        "blocks.#.adaln_modulation_{self_attn,cross_attn,mlp}.{1,2}",
        "transformer_blocks.#.{norm1,norm2,norm3}.linear_{1,2}",
    ),
    Row("final_layer.adaln_modulation.{1,2}", "norm_out.linear_{1,2}"),
    Row("final_layer.linear", "proj_out"),
)


def anima_modules() -> Iterator[Module]:
    """All modules of Anima's transformer: 28 blocks, 2048 wide, with a text of 1024 columns."""
    return modules_of(_ROWS, BLOCKS)


def _other_by_size(name: str, rows: int, columns: int) -> str | None:
    """By the width of the text, which is half that of the image here, and by that of the larger Cosmos."""
    if name.endswith((".cross_attn.k_proj", ".cross_attn.v_proj")) and rows == columns:
        return "LTX-Video or PixArt"
    return "Cosmos-Predict2 14B" if columns == 5120 and "_attn." in name else None


def _is_checkpoint(model: Any, denoiser: Any) -> bool:
    return hasattr(denoiser, "blocks") and hasattr(denoiser, "t_embedding_norm")


ANIMA = Family(
    key="anima",
    name="Anima",
    short_name="Anima",
    words=("anima",),
    list_modules=anima_modules,
    blocks={
        **dict.fromkeys(("x_embedder", "t_embedder", "t_embedding_norm"), Block("in")),
        "blocks": Block("block", numbered=True),
        "final_layer": Block("out"),
    },
    component="transformer",
    text_encoders={"qwen3": "text_encoder", "llm_adapter": "text_conditioner"},
    readable=("kohya", "dotted native"),
    is_checkpoint=_is_checkpoint,
    other_by_size=_other_by_size,
    namesakes=((r"cosmos", "Cosmos-Predict2"),),
    image_input="x_embedder.proj.1",
    schedule="s*",
)
