"""ERNIE-Image and ERNIE-Image-Turbo.

diffusers' names are the native ones: the checkpoints are published in them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from klora.core.families.base import Block, Family, Row, has_transformer, modules_of
from klora.core.topology import CONV, NORM, Module

BLOCKS = 36
_ROWS = (
    Row("x_embedder.proj", kind=CONV),
    Row("text_proj"),
    Row("time_embedding.linear_{1,2}"),
    Row("adaLN_modulation.1"),
    Row("layers.#.self_attention.{to_q,to_k,to_v,to_out.0}"),
    Row("layers.#.self_attention.{norm_q,norm_k}", kind=NORM),
    Row("layers.#.mlp.{gate_proj,up_proj,linear_fc2}"),
    Row("layers.#.{adaLN_sa_ln,adaLN_mlp_ln}", kind=NORM),
    Row("final_norm.linear"),
    Row("final_linear"),
)


def ernie_modules() -> Iterator[Module]:
    """All modules of ERNIE-Image's transformer: 36 layers, 4096 wide."""
    return modules_of(_ROWS, BLOCKS)


def _is_checkpoint(model: Any, denoiser: Any) -> bool:
    return all(hasattr(denoiser, name) for name in ("layers", "final_norm", "final_linear"))


ERNIE = Family(
    key="ernie",
    name="ERNIE-Image",
    short_name="ERNIE-Image",
    words=("ernie",),
    accelerated_names=("ernie image turbo",),
    list_modules=ernie_modules,
    blocks={
        **dict.fromkeys(("x_embedder", "text_proj", "time_embedding", "adaLN_modulation"), Block("in")),
        "layers": Block("layer", numbered=True),
        **dict.fromkeys(("final_norm", "final_linear"), Block("out")),
    },
    component="transformer",
    text_encoders={},
    readable=("kohya", "dotted native", "diffusers PEFT"),
    is_checkpoint=_is_checkpoint,
    is_pipeline=has_transformer("ErnieImageTransformer2DModel"),
    image_input="x_embedder.proj",
    schedule="s*",
)
