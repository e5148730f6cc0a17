"""LoRA (arXiv 2106.09685), and LoCon, which is LoRA on a convolution."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import ClassVar

from klora.core.adapters.base import (
    Adapter,
    DeltaShape,
    Shapes,
    Tensors,
    columns_of,
    core,
    flat,
    matrix,
    meet,
    no_larger,
)
from klora.core.deltas import LowRank
from klora.core.products import second_axis_product


class LoRA(Adapter):
    """ΔW = up @ down; with LoCon's `mid`, a Tucker core, (mid ×₂ down) takes the place of down."""

    name = "LoRA"
    suffixes: ClassVar[Mapping[str, str]] = {
        ".lora_up.weight": "up", ".lora_down.weight": "down", ".lora_mid.weight": "mid",
        ".lora_B.weight": "up", ".lora_A.weight": "down", ".lora_B.bias": "up_bias",
        "_lora.up.weight": "up", "_lora.down.weight": "down", "_lora.alpha": "alpha",
        ".lora.up.weight": "up", ".lora.down.weight": "down", ".lora.alpha": "alpha",
        ".lora_linear_layer.up.weight": "up", ".lora_linear_layer.down.weight": "down",
        ".lora_linear_layer.alpha": "alpha",
        ".up.weight": "up", ".down.weight": "down",
    }  # fmt: skip
    marks = ("up", "down", "mid")
    needed = (("up", "down"),)
    terms = (("up", "mid", "down"),)
    row_role = "up"
    cut_roles = ("up",)
    rank_of_rows = True
    scale_in_header = True

    def name_of(self, is_convolution: bool) -> str:
        return "LoCon" if is_convolution else self.name

    def delta_shape(self, shapes: Shapes) -> DeltaShape:
        up, down = matrix(shapes, "up"), matrix(shapes, "down")
        if "mid" not in shapes:
            meet("up", columns_of(up), down[0], "its down")
            return DeltaShape(no_larger("up", up[0], columns_of(down)), down[0], down[0])
        mid = core(shapes, "mid")
        meet("up", columns_of(up), mid[0], "its mid")
        meet("mid", mid[1], down[0], "its down")
        _, columns = no_larger("mid", mid[0], columns_of(down) * prod(mid[2:]))
        return DeltaShape(no_larger("up", up[0], columns), down[0], down[0])

    def delta(self, get: Tensors, shapes: Shapes, scale: float, rank: int | None) -> LowRank:
        down = flat(get("down"))
        if "mid" in shapes:
            down = second_axis_product(get("mid"), down).flatten(1)
        return LowRank(flat(get("up")), down, scale, rank or 0)
