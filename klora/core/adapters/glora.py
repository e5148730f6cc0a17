"""GLoRA (arXiv 2306.07967), as LyCORIS implements it."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import ClassVar

from klora.core.adapters.base import (
    Adapter,
    DeltaShape,
    ShapeMismatch,
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


class GLoRA(Adapter):
    """The delta is B = b1 @ b2 of ΔW = W a1 a2 + b1 b2, the part that needs no base weights.

    The scale is alpha / rank, as in LyCORIS and Forge. A1111 does not apply it, which makes no difference to
    a comparison within one file.
    """

    name = "GLoRA"
    suffixes: ClassVar[Mapping[str, str]] = {
        f".{name}.weight": name for name in ("a1", "a2", "b1", "b2", "bm")
    }
    marks = ("a1", "a2", "b1", "b2")
    needed = (marks,)
    terms = (("b1", "bm", "b2"), ("a1", "a2"))
    needs_alpha = True

    def delta_shape(self, shapes: Shapes) -> DeltaShape:
        up, down = _order(shapes)
        rank = shapes[down][0]
        left, right = matrix(shapes, up.replace("b", "a")), matrix(shapes, down.replace("b", "a"))
        meet(up.replace("b", "a"), columns_of(left), right[0], down.replace("b", "a"))
        no_larger(up.replace("b", "a"), left[0], columns_of(right))
        columns = columns_of(shapes[down])
        if "bm" in shapes:
            middle = core(shapes, "bm")
            meet("bm", middle[0], columns_of(shapes[up]), up)
            meet("bm", middle[1], rank, down)
            _, columns = no_larger("bm", middle[0], columns * prod(middle[2:]))
        return DeltaShape(no_larger(up, shapes[up][0], columns), rank, rank)

    def delta(self, get: Tensors, shapes: Shapes, scale: float, rank: int | None) -> LowRank:
        up, down = _order(shapes)
        right = flat(get(down))
        if "bm" in shapes:
            right = second_axis_product(get("bm"), right).flatten(1)
        return LowRank(flat(get(up)), right, scale, rank or 0)

    def input_factor(self, get: Tensors, shapes: Shapes, scale: float) -> LowRank:
        """A = a1 @ a2, by which a weight (out, in) or (out, in, kh, kw) is multiplied along `in`."""
        left, right = ("a1", "a2") if _order(shapes) == ("b1", "b2") else ("a2", "a1")
        return LowRank(flat(get(left)), flat(get(right)), scale, shapes[right][0])


def _order(shapes: Shapes) -> tuple[str, str]:
    """The roles (up, down): (b1, b2) in LyCORIS today, but (b2, b1) in its first files, which A1111 reads."""
    b1, b2 = matrix(shapes, "b1"), matrix(shapes, "b2")
    today, first = columns_of(b1) == b2[0], b2[1] == b1[0] and columns_of(b2) == b1[0]
    if today and (not first or b2[0] <= b1[0]):
        return "b1", "b2"
    if first:
        return "b2", "b1"
    raise ShapeMismatch("b1", f"of shape {list(b1)} does not fit b2 of shape {list(b2)}")
