"""The K largest magnitudes of one ΔW, its abs-sum and its squared Frobenius norm: exact, without ever holding ΔW whole.

K-LoRA eqs. (1)-(5) and (9) need, of every layer, the sum of the K largest |ΔW| and the sum of all |ΔW|. ΔW is evaluated
in blocks of rows in float32 and summed in float64, which agrees with a float64 evaluation to about 1e-7.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from klora.core.deltas import Delta, Kronecker, LowRank

TABLE_LENGTH = 128
"""A profile answers K = rank · partner's rank for partners up to this rank."""

BLOCK_NUMEL = 1 << 18
"""Entries in one block on the CPU: 1 MiB stays in the cache between the product and the passes over it."""

GPU_BLOCK_NUMEL = 1 << 25
"""Entries in one block on a GPU: 128 MiB, and as much again at most while a block is evaluated."""

SAMPLE_NUMEL = 4096
"""Entries from which the first bound is guessed."""

BOUND_MARGIN = 1.001
"""Lets a float32 dot product exceed the product of its norms by rounding."""


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
        if self.rank is None:
            n = math.isqrt(k)
        else:
            n = k // self.rank if self.rank else 0
        if not 1 <= n <= TABLE_LENGTH or table_k(self.rank, n) != k:
            return None
        return float(self.top_sums[n - 1])


def table_k(rank: int | None, partner_rank: int) -> int:
    """K-LoRA eq. (5): K for a partner of this rank; a delta without a rank counts with its partner's."""
    return (partner_rank if rank is None else rank) * partner_rank


def profile(delta: Delta, buffer: Tensor) -> LayerProfile:
    """The profile of one layer.

    Args:
        delta: ΔW, on the device of `buffer`.
        buffer: from `new_buffer`, reused from layer to layer; never shared between threads.
    """
    numel = math.prod(delta.shape)
    table = [min(table_k(delta.rank, n), numel) for n in range(1, TABLE_LENGTH + 1)]
    scan = _scan(delta, table[-1], buffer)
    running = np.concatenate([[0.0], np.cumsum(scan.largest, dtype=np.float64)])
    return LayerProfile(delta.rank, numel, scan.abs_sum, scan.squared_sum, running[table])


def top_sum(delta: Delta, k: int, buffer: Tensor) -> float:
    """Sum of the k largest |ΔW| (K-LoRA eqs. 1-4), arguments as for `profile`."""
    return float(_scan(delta, min(k, math.prod(delta.shape)), buffer).largest.sum(dtype=np.float64))


def new_buffer(device: torch.device) -> Tensor:
    """Working memory for `profile` and `top_sum`."""
    return torch.empty(BLOCK_NUMEL if device.type == "cpu" else 0, dtype=torch.float32, device=device)


@contextmanager
def full_precision_matmul() -> Iterator[None]:
    """Keeps TF32 out of CUDA's float32 products inside the block, then puts the setting back.

    torch 2.9 has a new switch and refuses to read the old one where a host has used the new.
    """
    matmul = torch.backends.cuda.matmul
    name, exact = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    before = getattr(matmul, name)
    setattr(matmul, name, exact)
    try:
        yield
    finally:
        setattr(matmul, name, before)


# --- one pass over one delta


@dataclass(frozen=True)
class _Scan:
    """abs_sum and squared_sum of ΔW, and its k largest magnitudes, float64 (k,), falling."""

    abs_sum: float
    squared_sum: float
    largest: NDArray[np.float64]


def _scan(delta: Delta, k: int, buffer: Tensor) -> _Scan:
    delta = _moderate(delta)
    if isinstance(delta, Kronecker):
        scan = _scan_kronecker(delta, k)
    elif buffer.device.type == "cpu":
        scan = _scan_cpu(delta, k, buffer)
    else:
        scan = _scan_gpu(delta, k)
    scale = abs(delta.scale)
    return _Scan(scan.abs_sum * scale, scan.squared_sum * scale**2, scan.largest * scale)


def _moderate(delta: Delta) -> Delta:
    """The same ΔW with factors whose product neither overflows float32 nor sinks into its denormals.

    Powers of two move from the factors to the scale, a float64, so nothing is rounded.
    """
    scale = float(delta.scale)
    moved = {}
    for field in fields(delta):
        factor = getattr(delta, field.name)
        if not isinstance(factor, Tensor) or not factor.numel():
            continue
        low, high = (float(value) for value in torch.aminmax(factor))
        exponent = math.frexp(max(-low, high))[1]
        if abs(exponent) > 20:
            moved[field.name] = (factor.double() * 2.0**-exponent).float()
            scale *= 2.0**exponent
    return replace(delta, scale=scale, **moved)


def _scan_kronecker(delta: Kronecker, k: int) -> _Scan:
    """Products of |first| and |second|: with both sorted falling, (i + 1)(j + 1) products are no smaller than the one at
    (i, j), so the k largest are found where (i + 1)(j + 1) <= k.
    """
    first, second = (np.sort(factor.abs().double().cpu().numpy(), axis=None)[::-1] for factor in (delta.first, delta.second))
    products = [first[i] * second[: k // (i + 1)] for i in range(min(k, first.size))]
    largest = Largest(k)
    largest.add(np.concatenate([*products, np.empty(0)]))
    squared_sum = float(np.dot(first, first) * np.dot(second, second))
    return _Scan(float(first.sum() * second.sum()), squared_sum, largest.falling())


def _scan_cpu(delta: Delta, k: int, buffer: Tensor) -> _Scan:
    gram = isinstance(delta, LowRank) and _gram_is_cheaper(delta)
    largest = Largest(k)
    abs_sum = squared_sum = 0.0
    blocks = _low_rank_blocks(delta, buffer) if isinstance(delta, LowRank) else _blocks(delta)
    for block, limit in blocks:
        abs_sum += float(block.sum())
        if not gram:
            squared_sum += float(torch.dot(block, block))
        if limit > largest.bound:
            largest.add(block.numpy())
    if gram:
        squared_sum = _gram_squared_sum(delta)
    return _Scan(abs_sum, squared_sum, largest.falling())
