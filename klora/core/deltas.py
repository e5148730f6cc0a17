"""The change ΔW that one LoRA makes to one layer, kept in factors and evaluated in blocks of rows.

A delta is a matrix of shape (rows, columns). A convolution (out, in, kh, kw) is treated as the matrix
(out, in * kh * kw), as K-LoRA only looks at the magnitudes of the entries. All factors are float32 on one
device. `scale` multiplies every entry; for an up/down pair it is network_alpha / rank. Forms that only one
kind of LoRA has are in that kind's file in `adapters`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import Field, dataclass
from typing import Any, ClassVar

from numpy.typing import NDArray
from torch import Tensor

from klora.core.products import product


@dataclass(frozen=True)
class Scan:
    """Sum and sum of squares of a delta's magnitudes |ΔW|, and its k largest, shape (k,), descending."""

    abs_sum: float
    squared_sum: float
    largest: NDArray[Any]


class Delta(ABC):
    """ΔW = scale · f(factors). Subclasses are frozen dataclasses whose tensors are the factors.

    Attributes:
        scale: what every entry is multiplied by.
        rank: the rank that enters K in eq. (5); None for a delta that has none.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    scale: float
    rank: int | None

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop without `scale`, shape (stop - start, columns)."""

    def row_slice(self, start: int, stop: int) -> Delta:
        """The piece of a fused layer in rows start..stop."""
        return Dense(self.rows(start, stop), self.scale, self.rank)

    def with_halves_swapped(self) -> Delta:
        """The delta with the upper and the lower half of its rows exchanged."""
        half = self.shape[0] // 2
        return Dense(self.rows(0, 2 * half).roll(half, 0), self.scale, self.rank)

    def scan(self, k: int) -> Scan | None:
        """The sums and the k largest, without `scale`, if they follow from the factors alone; else None."""
        return None


@dataclass(frozen=True)
class LowRank(Delta):
    """ΔW = scale · left @ right: LoRA, DoRA, and LoCon with its Tucker core multiplied into `right`.

    Attributes:
        left: (rows, inner); `up` in LoRA files.
        right: (inner, columns); `down` in LoRA files.
        scale: network_alpha / rank of the file.
        rank: the rank that enters K in eq. (5).
    """

    left: Tensor
    right: Tensor
    scale: float
    rank: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    def rows(self, start: int, stop: int) -> Tensor:
        return product(self.left[start:stop], self.right)

    def row_slice(self, start: int, stop: int) -> LowRank:
        """The piece of a fused layer in rows start..stop.

        Columns of `left` that are zero in all these rows do not count towards the rank.
        """
        left = self.left[start:stop]
        used = left.ne(0).any(dim=0)
        return LowRank(left[:, used], self.right[used], self.scale, int(used.sum()))

    def with_halves_swapped(self) -> LowRank:
        return LowRank(self.left.roll(self.shape[0] // 2, 0), self.right, self.scale, self.rank)


@dataclass(frozen=True)
class Dense(Delta):
    """ΔW = scale · values: a full difference, or rows cut from a delta that cannot be cut by its factors."""

    values: Tensor
    scale: float
    rank: int | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def rows(self, start: int, stop: int) -> Tensor:
        return self.values[start:stop]

    def row_slice(self, start: int, stop: int) -> Dense:
        """The piece of a fused layer in rows start..stop."""
        return Dense(self.values[start:stop], self.scale, self.rank)


def dense(delta: Delta) -> Tensor:
    """The whole ΔW, scale included, float32, shape (rows, columns)."""
    return delta.rows(0, delta.shape[0]) * delta.scale
