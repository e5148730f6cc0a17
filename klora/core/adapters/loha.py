"""LoHa (LyCORIS; FedPara, arXiv 2108.06098)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from klora.core.adapters.base import (
    Adapter,
    DeltaShape,
    ShapeMismatch,
    Shapes,
    Tensors,
    columns_of,
    matrix,
    meet,
    no_larger,
    tucker,
    tucker_shape,
)
from klora.core.deltas import Delta
from klora.core.products import product


@dataclass(frozen=True)
class Hadamard(Delta):
    """ΔW = scale · (left1 @ right1) ∘ (left2 @ right2)."""

    left1: Tensor
    right1: Tensor
    left2: Tensor
    right2: Tensor
    scale: float
    rank: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.left1.shape[0], self.right1.shape[1]

    def rows(self, start: int, stop: int) -> Tensor:
        return product(self.left1[start:stop], self.right1) * product(self.left2[start:stop], self.right2)

    def row_slice(self, start: int, stop: int) -> Hadamard:
        """The piece of a fused layer in rows start..stop."""
        return self._with_left(self.left1[start:stop], self.left2[start:stop])

    def with_halves_swapped(self) -> Hadamard:
        half = self.shape[0] // 2
        return self._with_left(self.left1.roll(half, 0), self.left2.roll(half, 0))

    def _with_left(self, left1: Tensor, left2: Tensor) -> Hadamard:
        return Hadamard(left1, self.right1, left2, self.right2, self.scale, self.rank)


class LoHa(Adapter):
    """ΔW = (w1_a @ w1_b) ∘ (w2_a @ w2_b).

    With a Tucker core t1 or t2, (w_a)ᵀ ×₁ core ×₂ w_b takes the place of a product.
    """

    name = "LoHa"
    suffixes: ClassVar[Mapping[str, str]] = {
        f".hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
    }
    marks = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    needed = (marks,)
    terms = (("hada_w1_a", "hada_w1_b", "hada_t1", "hada_w2_a", "hada_w2_b", "hada_t2"),)
    cut_roles = ("hada_w1_a", "hada_w2_a")

    def delta_shape(self, shapes: Shapes) -> DeltaShape:
        halves = [_half(shapes, n) for n in "12"]
        if halves[0] != halves[1]:
            raise ShapeMismatch(
                "hada_w2_a",
                f"makes a matrix of {list(halves[1])} where hada_w1_a makes one of {list(halves[0])}",
            )
        rank = shapes["hada_w1_b"][0]
        return DeltaShape(halves[0], rank, rank)

    def delta(self, get: Tensors, shapes: Shapes, scale: float, rank: int | None) -> Hadamard:
        left1, right1 = tucker(get, shapes, "hada_t1", "hada_w1_a", "hada_w1_b")
        left2, right2 = tucker(get, shapes, "hada_t2", "hada_w2_a", "hada_w2_b")
        return Hadamard(left1, right1, left2, right2, scale, rank or 0)


def _half(shapes: Shapes, n: str) -> tuple[int, int]:
    a, b = matrix(shapes, f"hada_w{n}_a"), matrix(shapes, f"hada_w{n}_b")
    if f"hada_t{n}" in shapes:
        return tucker_shape(shapes, f"hada_t{n}", f"hada_w{n}_a", f"hada_w{n}_b")
    meet(f"hada_w{n}_a", columns_of(a), b[0], f"hada_w{n}_b")
    return no_larger(f"hada_w{n}_a", a[0], columns_of(b))
