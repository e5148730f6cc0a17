"""Wan 2.1 and 2.2: 1.3B, 5B and 14B, from text and from images.

Native names are Alibaba's (Wan-Video/Wan2.1, wan/modules/model.py); the others are those of
diffusers' conversion script.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from klora.core.families.base import Block, Family, Row, has_transformer, modules_of
from klora.core.topology import CONV, NORM, Module

BLOCKS = 40
_ROWS = (
    Row("patch_embedding", kind=CONV),
    Row("text_embedding.{0,2}", "condition_embedder.text_embedder.linear_{1,2}"),
    Row("time_embedding.{0,2}", "condition_embedder.time_embedder.linear_{1,2}"),
    Row("time_projection.1", "condition_embedder.time_proj"),
    Row("img_emb.proj.{0,4}", "condition_embedder.image_embedder.{norm1,norm2}", NORM),
    Row("img_emb.proj.{1,3}", "condition_embedder.image_embedder.ff.net.{0.proj,2}"),
    Row("blocks.#.{self,cross}_attn.{q,k,v,o}", "blocks.#.attn{1,2}.{to_q,to_k,to_v,to_out.0}"),
    Row("blocks.#.cross_attn.{k,v}_img", "blocks.#.attn2.add_{k,v}_proj"),
    Row("blocks.#.{self,cross}_attn.norm_{q,k}", "blocks.#.attn{1,2}.norm_{q,k}", NORM),
    Row("blocks.#.cross_attn.norm_k_img", "blocks.#.attn2.norm_added_k", NORM),
    Row("blocks.#.norm3", "blocks.#.norm2", NORM),
    Row("blocks.#.ffn.{0,2}", "blocks.#.ffn.net.{0.proj,2}"),
    Row("head.head", "proj_out"),
)


def wan_modules() -> Iterator[Module]:
    """All modules of the largest Wan, of 40 blocks; the others have 30. They are 1536, 3072 or 5120 wide."""
    return modules_of(_ROWS, BLOCKS)


def _is_checkpoint(model: Any, denoiser: Any) -> bool:
    return all(hasattr(denoiser, name) for name in ("blocks", "time_projection", "text_embedding"))


WAN = Family(
    key="wan",
    name="Wan",
    short_name="Wan",
    words=("wan",),
    list_modules=wan_modules,
    blocks={
        **dict.fromkeys(
            ("patch_embedding", "text_embedding", "time_embedding", "time_projection", "img_emb"), Block("in")
        ),
        "blocks": Block("block", numbered=True),
        "head": Block("out"),
    },
    component="transformer",
    text_encoders={},
    readable=("kohya", "dotted native"),
    is_checkpoint=_is_checkpoint,
    is_pipeline=has_transformer("WanTransformer3DModel"),
    image_input="patch_embedding",
    schedule="s*",
)
