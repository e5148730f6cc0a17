"""LoKr (LyCORIS)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from klora.core.adapters.base import (
    Adapter,
    DeltaShape,
    Shapes,
    Tensors,
    columns_of,
    flat,
    matrix,
    meet,
    no_larger,
    tucker,
    tucker_shape,
)
from klora.core.deltas import Delta, Scan
from klora.core.products import product


@dataclass(frozen=True)
class Kronecker(Delta):
    """ΔW = scale · first ⊗ second.

    Attributes:
        first: shape (m1, n1).
        second: shape (m2, n2, spatial), where `spatial` is kh * kw for a convolution, whose positions stay
            innermost, and 1 for a linear layer.
        rank: the rank of a factor that is itself a product; None if both factors are stored in full.
    """

    first: Tensor
    second: Tensor
    scale: float
    rank: int | None

    @property
    def shape(self) -> tuple[int, int]:
        (m1, n1), (m2, n2, spatial) = self.first.shape, self.second.shape
        return m1 * m2, n1 * n2 * spatial

    def rows(self, start: int, stop: int) -> Tensor:
        m2 = self.second.shape[0]
        index = torch.arange(start, stop, device=self.first.device)
        first, second = self.first[index // m2], self.second[index % m2]
        return (first[:, :, None, None] * second[:, None]).flatten(1)

    def row_slice(self, start: int, stop: int) -> Delta:
        """The piece of a fused layer in rows start..stop; a Kronecker product if it is whole blocks."""
        block = self.second.shape[0]
        if start % block == 0 and stop % block == 0:
            return Kronecker(self.first[start // block : stop // block], self.second, self.scale, self.rank)
        return super().row_slice(start, stop)

    def scan(self, k: int) -> Scan:
        """Sums and norms of a Kronecker product are the products of those of its factors.

        With the entries of both |factors| in descending order, (i + 1)(j + 1) products are no smaller than
        the one at (i, j), so the k largest are among those with (i + 1)(j + 1) <= k.
        """
        factors = sorted((self.first, self.second), key=Tensor.numel)
        few, many = (np.sort(factor.abs().double().cpu().numpy(), axis=None)[::-1] for factor in factors)
        candidates = [few[i] * many[: k // (i + 1)] for i in range(min(k, few.size))]
        products = np.concatenate([*candidates, np.empty(0)])
        largest = (
            np.sort(np.partition(products, products.size - k)[products.size - k :])[::-1] if k else products
        )
        return Scan(float(few.sum() * many.sum()), float(np.dot(few, few) * np.dot(many, many)), largest)


class LoKr(Adapter):
    """ΔW = w1 ⊗ w2, each stored in full or as a product.

    The scale is alpha / rank, with the rank of w2 if that is a product, else of w1; it is 1 if both are
    stored in full.
    """

    name = "LoKr"
    suffixes: ClassVar[Mapping[str, str]] = {
        f".lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    }
    marks = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
    needed = (
        ("lokr_w1", "lokr_w2"),
        ("lokr_w1", "lokr_w2_a", "lokr_w2_b"),
        ("lokr_w1_a", "lokr_w1_b", "lokr_w2"),
        ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"),
    )
    terms = (("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),)

    def delta_shape(self, shapes: Shapes) -> DeltaShape:
        (m1, n1), rank1 = _factor(shapes, "lokr_w1", None)
        (m2, n2), rank2 = _factor(shapes, "lokr_w2", "lokr_t2")
        rank = rank2 if rank2 is not None else rank1
        return DeltaShape(
            no_larger("lokr_w1" if "lokr_w1" in shapes else "lokr_w1_a", m1 * m2, n1 * n2), rank, rank
        )

    def delta(self, get: Tensors, shapes: Shapes, scale: float, rank: int | None) -> Kronecker:
        first = (
            flat(get("lokr_w1"))
            if "lokr_w1" in shapes
            else product(flat(get("lokr_w1_a")), flat(get("lokr_w1_b")))
        )
        if "lokr_w2" in shapes:
            second = get("lokr_w2").flatten(2) if len(shapes["lokr_w2"]) > 2 else get("lokr_w2").unsqueeze(2)
        elif "lokr_t2" in shapes:
            left, right = tucker(get, shapes, "lokr_t2", "lokr_w2_a", "lokr_w2_b")
            second = product(left, right).reshape(left.shape[0], shapes["lokr_w2_b"][1], -1)
        else:
            second = product(flat(get("lokr_w2_a")), flat(get("lokr_w2_b"))).unsqueeze(2)
        return Kronecker(first, second, scale, rank)


def _factor(shapes: Shapes, name: str, middle: str | None) -> tuple[tuple[int, int], int | None]:
    if name in shapes:
        full = matrix(shapes, name)
        return (full[0], columns_of(full)), None
    a, b = matrix(shapes, f"{name}_a"), matrix(shapes, f"{name}_b")
    if middle is not None and middle in shapes:
        return tucker_shape(shapes, middle, f"{name}_a", f"{name}_b"), b[0]
    meet(f"{name}_a", columns_of(a), b[0], f"{name}_b")
    return no_larger(f"{name}_a", a[0], columns_of(b)), b[0]
