"""What is known of LoRA files to score them with any partner: values, computed by `topk` and kept by `score_cache`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

TABLE_LENGTH = 128
"""A profile answers K = rank · partner's rank for partners up to this rank."""


@dataclass(frozen=True)
class LayerProfile:
    """What one LoRA's file gives to score one layer with any partner. Values include |scale|, no user multiplier.

    Attributes:
        rank: the rank that counts for K in eq. (5); None for a delta stored full.
        numel: entries of ΔW.
        abs_sum: Σ|ΔW|.
        squared_sum: Σ ΔW², the squared Frobenius norm.
        top_sums: float64 (128,): sums of the K largest |ΔW|, `top_sums[n - 1]` at K = `table_k(rank, n)`.
    """

    rank: int | None
    numel: int
    abs_sum: float
    squared_sum: float
    top_sums: NDArray[np.float64]

    def top_sum(self, k: int) -> float | None:
        """Sum of the k largest |ΔW|, or None if the profile does not tell."""
        if k >= self.numel:
            return self.abs_sum
        if self.abs_sum == 0:
            return 0.0
        n = math.isqrt(k) if self.rank is None else k // self.rank if self.rank else 0
        if not 1 <= n <= TABLE_LENGTH or table_k(self.rank, n) != k:
            return None
        return float(self.top_sums[n - 1])


def table_k(rank: int | None, partner_rank: int) -> int:
    """K-LoRA eq. (5): K for a partner of this rank; a delta without a rank counts with its partner's."""
    return (partner_rank if rank is None else rank) * partner_rank


@dataclass(frozen=True)
class FileProfile:
    """All that is known to score one file with any partner.

    Attributes:
        layers: {layer: profile} of all its layers.
        extra_sums: {(layer, K): Top-K sum} where a pair's K was not in the profile.
    """

    layers: Mapping[str, LayerProfile]
    extra_sums: Mapping[tuple[str, int], float] = field(default_factory=dict)

    def top_sum(self, name: str, k: int) -> float | None:
        """Sum of the k largest |ΔW| of a layer, None if not known."""
        known = self.layers[name].top_sum(k)
        return self.extra_sums.get((name, k)) if known is None else known
