"""What must be known of a LoRA file to score it with any partner: made by `topk`, kept by `score_cache`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

TABLE_LENGTH = 128
"""A profile gives Top-K sums for K = rank · partner's rank, for partners up to this rank."""


@dataclass(frozen=True)
class LayerProfile:
    """What must be known of one layer of a LoRA to score it with any partner.

    All values include |scale| but no user multiplier.

    Attributes:
        rank: the rank that enters K in eq. (5); None for a delta stored in full.
        numel: the number of entries of ΔW.
        abs_sum: Σ|ΔW|.
        squared_sum: Σ ΔW², the squared Frobenius norm.
        top_sums: float64, shape (128,): `top_sums[n - 1]` is the sum of the K = `table_k(rank, n)` largest
            |ΔW|.
    """

    rank: int | None
    numel: int
    abs_sum: float
    squared_sum: float
    top_sums: NDArray[np.float64]

    def top_sum(self, k: int) -> float | None:
        """The sum of the k largest |ΔW|, or None if the profile does not include this k."""
        if k >= self.numel:
            return self.abs_sum
        if self.abs_sum == 0:
            return 0.0
        n = math.isqrt(k) if self.rank is None else k // self.rank if self.rank else 0
        if not 1 <= n <= TABLE_LENGTH or table_k(self.rank, n) != k:
            return None
        return float(self.top_sums[n - 1])


def table_k(rank: int | None, partner_rank: int) -> int:
    """K of K-LoRA eq. (5) with a partner of this rank; a delta without a rank takes its partner's."""
    return (partner_rank if rank is None else rank) * partner_rank


@dataclass(frozen=True)
class FileProfile:
    """What is known of one file to score it with any partner.

    Attributes:
        layers: {layer: profile}, either of all its layers or empty if the file has not been read yet.
        extra_sums: {(layer, K): Top-K sum} for values of K that are not in the profiles.
    """

    layers: Mapping[str, LayerProfile]
    extra_sums: Mapping[tuple[str, int], float] = field(default_factory=dict)

    def top_sum(self, name: str, k: int) -> float | None:
        """The sum of the k largest |ΔW| of a layer, None if not known."""
        known = self.layers[name].top_sum(k)
        return self.extra_sums.get((name, k)) if known is None else known
