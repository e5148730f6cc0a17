"""The K largest |ΔW| of one layer, Σ|ΔW| and Σ ΔW²: exact, and without all of ΔW in memory.

K-LoRA eqs. (1)-(5) and (9) need the sum of the K largest |ΔW| and the sum of all |ΔW| for every layer. ΔW is
evaluated in float32 in blocks of rows and summed in float64, which agrees with a float64 evaluation to about
1e-7.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from klora.core.deltas import Delta, LowRank, Scan
from klora.core.products import product
from klora.core.profiles import TABLE_LENGTH, LayerProfile, table_k

Check = Callable[[], object]
"""Called repeatedly during long work; an exception from it ends the work."""

BLOCK_NUMEL = 1 << 18
"""Entries in one block on the CPU: its 1 MiB stays in the cache from the product to the last pass over it."""

GPU_BLOCK_NUMEL = 1 << 25
"""Entries in one block on a GPU: 128 MiB, and at most as much again while the block is being evaluated."""

SAMPLE_NUMEL = 4096
"""How many entries the first bound is guessed from."""

MODERATE_EXPONENT = 12
"""Binary exponent that no factor's largest entry exceeds. The four factors of a Hadamard product, each below
2^12, make entries below 2^48, and the sum of the squares of 2^30 of them stays below 2^127."""

BOUND_MARGIN = 1.001
"""Room for rounding, by which a float32 dot product may exceed the product of the norms."""


def no_check() -> None:
    """A `Check` that ends nothing."""


def profile(delta: Delta, buffer: Tensor, check: Check = no_check) -> LayerProfile:
    """The profile of one layer.

    Args:
        delta: ΔW, on the device of `buffer`.
        buffer: from `new_buffer`; it may be used for many layers, but only by one thread.
        check: called between blocks.
    """
    numel = math.prod(delta.shape)
    table = [min(table_k(delta.rank, n), numel) for n in range(1, TABLE_LENGTH + 1)]
    scan = _scan(delta, table[-1], buffer, check)
    running = np.concatenate([[0.0], np.cumsum(scan.largest, dtype=np.float64)])
    return LayerProfile(delta.rank, numel, scan.abs_sum, scan.squared_sum, running[table])


def top_sum(delta: Delta, k: int, buffer: Tensor, check: Check = no_check) -> float:
    """The sum of the k largest |ΔW| (K-LoRA eqs. 1-4); the other arguments are as for `profile`."""
    return float(_scan(delta, min(k, math.prod(delta.shape)), buffer, check).largest.sum(dtype=np.float64))


def new_buffer(device: torch.device) -> Tensor:
    """Working memory for `profile` and `top_sum`; empty for a GPU, where they need none."""
    return torch.empty(BLOCK_NUMEL if device.type == "cpu" else 0, dtype=torch.float32, device=device)


def _scan(delta: Delta, k: int, buffer: Tensor, check: Check) -> Scan:
    delta = _moderate(delta)
    scan = delta.scan(k)
    if scan is None:
        on_cpu = buffer.device.type == "cpu"
        scan = _scan_cpu(delta, k, buffer, check) if on_cpu else _scan_gpu(delta, k, check)
    scale = abs(delta.scale)
    return Scan(
        scan.abs_sum * scale, scan.squared_sum * scale * scale, scan.largest.astype(np.float64) * scale
    )


def _moderate(delta: Delta) -> Delta:
    """The same ΔW with factors whose product, and its square, neither overflow nor underflow in float32.

    Powers of two move from the factors to `scale`, a Python float, so nothing is rounded.
    """
    scale = float(delta.scale)
    moved: dict[str, Any] = {}
    for field in fields(delta):
        factor = getattr(delta, field.name)
        if not isinstance(factor, Tensor) or not factor.numel():
            continue
        low, high = (float(value) for value in torch.aminmax(factor))
        exponent = math.frexp(max(-low, high))[1]
        if abs(exponent) > MODERATE_EXPONENT:
            moved[field.name] = (factor.double() * 2.0**-exponent).float()
            scale *= 2.0**exponent
    return replace(delta, scale=scale, **moved)


def _scan_cpu(delta: Delta, k: int, buffer: Tensor, check: Check) -> Scan:
    squared_sum = _gram_squared_sum(delta) if isinstance(delta, LowRank) and _gram_is_cheap(delta) else None
    blocks = _low_rank_blocks(delta, buffer) if isinstance(delta, LowRank) else _plain_blocks(delta)
    largest = RunningTopK(k)
    abs_sum, block_squares = 0.0, 0.0
    for block, limit in blocks:
        check()
        abs_sum += float(block.sum())
        if squared_sum is None:
            block_squares += float(torch.dot(block, block))
        if limit > largest.bound:
            largest.add(block.numpy())
    check()
    return Scan(abs_sum, block_squares if squared_sum is None else squared_sum, largest.descending())


def _low_rank_blocks(delta: LowRank, buffer: Tensor) -> Iterator[tuple[Tensor, float]]:
    """|left @ right| in flat blocks, each with a limit that no entry of this block or a later one exceeds.

    Rows are sorted by descending norm; the limit is Cauchy-Schwarz's: |left_i · right_j| <= ‖left_i‖
    ‖right_j‖.
    """
    row_norms, order = delta.left.square().sum(dim=1).sqrt().sort(descending=True)
    left, right = delta.left.index_select(0, order), delta.right
    longest_column = math.sqrt(right.square().sum(dim=0).max()) * BOUND_MARGIN
    columns = delta.shape[1]
    step = _rows_per_block(columns, BLOCK_NUMEL)
    if buffer.numel() < step * columns:
        buffer = buffer.new_empty(step * columns)
    for part, longest_row in zip(left.split(step), row_norms[::step].tolist(), strict=True):
        block = buffer[: part.shape[0] * columns]
        product(part, right, out=block.view(-1, columns))
        yield block.abs_(), longest_row * longest_column


def _plain_blocks(delta: Delta) -> Iterator[tuple[Tensor, float]]:
    """|ΔW| / |scale| in flat blocks, without a limit."""
    rows, columns = delta.shape
    step = _rows_per_block(columns, BLOCK_NUMEL)
    for start in range(0, rows, step):
        yield delta.rows(start, min(start + step, rows)).abs().flatten(), math.inf


def _rows_per_block(columns: int, numel: int) -> int:
    return max(1, numel // max(1, columns))


def _gram_is_cheap(delta: LowRank) -> bool:
    """Whether two float64 Gram matrices cost less than a float32 pass over ΔW (about a product per entry)."""
    (rows, inner), columns = delta.left.shape, delta.right.shape[1]
    return (rows + columns) * inner**2 < rows * columns


def _gram_squared_sum(delta: LowRank) -> float:
    """‖left @ right‖² = Σ (leftᵀ left) ∘ (right rightᵀ), float64."""
    left, right = delta.left.double(), delta.right.double()
    return float(((left.T @ left) * (right @ right.T)).sum())


def _scan_gpu(delta: Delta, k: int, check: Check) -> Scan:
    """Every entry goes through torch.topk, which is so fast on a GPU that no bound is needed."""
    rows, columns = delta.shape
    step = _rows_per_block(columns, GPU_BLOCK_NUMEL)
    abs_sum = squared_sum = 0.0
    largest = delta.rows(0, 0).flatten()
    for start in range(0, rows, step):
        check()
        block = delta.rows(start, min(start + step, rows)).abs().flatten()
        abs_sum += float(block.sum(dtype=torch.float64))
        squared_sum += float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2
        found = block.topk(min(k, block.numel()), sorted=False).values
        largest = torch.cat([largest, found])
        largest = largest.topk(min(k, largest.numel())).values
    return Scan(abs_sum, squared_sum, largest.cpu().numpy())


class RunningTopK:
    """The k largest of a stream of magnitudes, exact for any bound.

    As soon as `bound` is above 0, at least k entries of the stream are >= `bound`. So only entries above it
    need to be kept, and if fewer than k are left at the end, the missing ones equal it. Ties with the bound
    cost nothing.
    """

    def __init__(self, k: int) -> None:
        self.bound = np.float32(0)
        self._k = k
        self._kept = np.empty(0, np.float32)
        self._new: list[NDArray[Any]] = []
        self._new_count = 0

    def add(self, block: NDArray[Any]) -> None:
        """Takes the next magnitudes of the stream, float32, shape (n,), and keeps no reference to them."""
        if not self.bound:
            self._guess_bound(block)
        found = block[np.flatnonzero(block > self.bound)]
        self._new.append(found)
        self._new_count += found.size
        if self._new_count >= self._k:
            self._raise_bound()

    def descending(self) -> NDArray[Any]:
        """The k largest in descending order, float32, shape (k,)."""
        self._raise_bound()
        missing = np.full(self._k - self._kept.size, self.bound)
        return np.concatenate([np.sort(self._kept)[::-1], missing])

    def _guess_bound(self, block: NDArray[Any]) -> None:
        """Takes a bound from a sample of the block, if at least k entries of the whole block reach it."""
        sample = block[:: block.size // SAMPLE_NUMEL | 1]
        for margin in (1.3, 2.0, 4.0):
            place = sample.size - 1 - int(margin * sample.size * self._k / max(1, block.size))
            if place < 0:
                return
            guess = np.partition(sample, place)[place]
            if np.count_nonzero(block >= guess) >= self._k:
                self.bound = guess
                return

    def _raise_bound(self) -> None:
        """Keeps only the k largest; if there are k, the smallest of them is the new bound."""
        kept = np.concatenate([self._kept, *self._new])
        if kept.size >= self._k > 0:
            kept = np.partition(kept, kept.size - self._k)[kept.size - self._k :]
            self.bound = kept[0]
        self._kept, self._new, self._new_count = kept, [], 0
