"""The change ΔW that one LoRA makes to one layer, kept in factors and evaluated in blocks of rows.

A delta is a matrix of shape (rows, columns). A convolution of shape (out, in, kh, kw) is the matrix (out, in * kh * kw),
as K-LoRA only looks at the magnitudes of the entries. All factors are float32 on one device. `scale` multiplies every
entry; for an up/down pair it is network_alpha / rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

import torch
from torch import Tensor

from klora.core.products import product


@dataclass(frozen=True)
class LowRank:
    """ΔW = scale · left @ right: LoRA, LoCon (a Tucker mid is folded into `right`), and DoRA before its magnitude.

    Attributes:
        left: (rows, inner); `up` in LoRA files.
        right: (inner, columns); `down` in LoRA files.
        scale: network_alpha / rank of the file.
        rank: the rank that counts for K in eq. (5).
    """

    left: Tensor
    right: Tensor
    scale: float
    rank: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop of left @ right, shape (stop - start, columns), without `scale`."""
        return product(self.left[start:stop], self.right)

    def row_slice(self, start: int, stop: int) -> LowRank:
        """The piece of a fused layer in rows start..stop; columns of `left` that are all zero there do not count as rank."""
        left = self.left[start:stop]
        used = left.ne(0).any(dim=0)
        return LowRank(left[:, used], self.right[used], self.scale, int(used.sum()))


@dataclass(frozen=True)
class Hadamard:
    """LoHa: ΔW = scale · (left1 @ right1) ∘ (left2 @ right2) (LyCORIS; FedPara, arXiv 2108.06098)."""

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
        """Rows start..stop without `scale`, shape (stop - start, columns)."""
        return product(self.left1[start:stop], self.right1) * product(self.left2[start:stop], self.right2)

    def row_slice(self, start: int, stop: int) -> Hadamard:
        """The piece of a fused layer in rows start..stop."""
        return Hadamard(
            self.left1[start:stop], self.right1, self.left2[start:stop], self.right2, self.scale, self.rank
        )


@dataclass(frozen=True)
class Kronecker:
    """LoKr: ΔW = scale · first ⊗ second (LyCORIS).

    Attributes:
        first: (m1, n1).
        second: (m2, n2, spatial): the spatial positions of a convolution stay innermost; spatial is 1 for a linear layer.
        rank: of the factorised factor, None if both factors are stored full.
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
        """Rows start..stop without `scale`, shape (stop - start, columns)."""
        m2 = self.second.shape[0]
        index = torch.arange(start, stop, device=self.first.device)
        first, second = self.first[index // m2], self.second[index % m2]
        return (first[:, :, None, None] * second[:, None]).flatten(1)

    def row_slice(self, start: int, stop: int) -> Dense:
        """The piece of a fused layer in rows start..stop."""
        return Dense(self.rows(start, stop), self.scale, self.rank)


@dataclass(frozen=True)
class Dense:
    """ΔW = scale · values: a full difference."""

    values: Tensor
    scale: float
    rank: int | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop without `scale`, shape (stop - start, columns)."""
        return self.values[start:stop]

    def row_slice(self, start: int, stop: int) -> Dense:
        """The piece of a fused layer in rows start..stop."""
        return Dense(self.values[start:stop], self.scale, self.rank)


Delta = Union[LowRank, Hadamard, Kronecker, Dense]


def dense(delta: Delta) -> Tensor:
    """The whole ΔW with its scale, float32, shape (rows, columns)."""
    return delta.rows(0, delta.shape[0]) * delta.scale
