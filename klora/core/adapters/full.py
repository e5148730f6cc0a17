"""Full differences of a weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from klora.core.adapters.base import (
    Adapter,
    DeltaShape,
    Shapes,
    Tensors,
    columns_of,
    flat,
    matrix,
    no_larger,
)
from klora.core.deltas import Dense


class Full(Adapter):
    """ΔW = diff."""

    name = "full diff"
    suffixes: ClassVar[Mapping[str, str]] = {".diff": "diff"}
    marks = ("diff",)
    needed = (("diff",),)
    terms = (("diff",),)
    row_role = "diff"
    cut_roles = ("diff",)

    def delta_shape(self, shapes: Shapes) -> DeltaShape:
        diff = matrix(shapes, "diff")
        return DeltaShape(no_larger("diff", diff[0], columns_of(diff)), None, None)

    def delta(self, get: Tensors, shapes: Shapes, scale: float, rank: int | None) -> Dense:
        return Dense(flat(get("diff")), scale, rank)
