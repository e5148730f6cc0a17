"""Scores and γ of a pair of LoRA files: K-LoRA eqs. (1)-(5) and (9), once per pair, from one pass over each file.

The pass gives a profile per layer that answers any partner's K, so files seen before pair without reading them again.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from torch import device as Device

from klora.core.deltas import Delta
from klora.core.layer_pass import over_layers, scoring_device
from klora.core.score_cache import FileScores, ScoreCache
from klora.core.topk import LayerProfile, profile, table_k, top_sum
from klora.errors import Cancelled, PairError

__all__ = ["LayerProfile", "LayerScore", "LoraSource", "PairScores", "profile_file", "score_pair", "scoring_device"]

Progress = Callable[[int, int], object]
IsCancelled = Callable[[], bool]


class LayerShape(Protocol):
    """What `LoraSource.layers` tells of a layer: (rows, columns) of its ΔW."""

    @property
    def shape(self) -> tuple[int, int]: ...


class LoraSource(Protocol):
    """A LoRA file as `klora.core.lora_file.LoraFile` gives it."""

    @property
    def path(self) -> Path: ...

    @property
    def layers(self) -> Mapping[str, LayerShape]: ...

    def open(self) -> AbstractContextManager[Callable[[str], Delta]]: ...


@dataclass(frozen=True)
class LayerScore:
    """One layer of a pair. A layer that only one of the two changes is not scored: k and all sums are 0.

    Attributes:
        name: canonical layer name.
        k: K of eq. (5).
        rank_subject, rank_style: None for a delta stored full, 0 for a layer the file does not change.
        subject_score, style_score: sum of the K largest |ΔW|, eqs. (1)-(4).
        subject_abs_sum, style_abs_sum: Σ|ΔW|, for γ.
        subject_frobenius, style_frobenius: Σ ΔW², squared norms.
        only: the one LoRA that changes the layer, None if both do.
    """

    name: str
    k: int
    rank_subject: int | None
    rank_style: int | None
    subject_score: float
    style_score: float
    subject_abs_sum: float
    style_abs_sum: float
    subject_frobenius: float
    style_frobenius: float
    only: Literal["subject", "style"] | None


@dataclass(frozen=True)
class PairScores:
    """Scores of every layer that the subject or the style changes, sorted by name, and γ of eq. (9)."""

    layers: tuple[LayerScore, ...]
    gamma: float


def profile_file(
    lora: LoraSource,
    *,
    device: Device | None = None,
    progress: Progress | None = None,
    cancelled: IsCancelled | None = None,
    workers: int | None = None,
) -> dict[str, LayerProfile]:
    """Profiles of all layers of a file, in one pass over it.

    Args:
        lora: the file.
        device: where to compute; `scoring_device()` if None.
        progress: called with (layers done, layers in all) after each layer, on the caller's thread.
        cancelled: asked after each layer, on the caller's thread.
        workers: threads on the CPU; by default one per core, at most 8.

    Raises:
        Cancelled: `cancelled` said so.
        LoraFileError: broken numbers in the file.
    """
    run = _Run(device, progress, cancelled, workers)
    run.expect(len(lora.layers))
    return _profile(lora, run)


def score_pair(
    subject: LoraSource,
    style: LoraSource,
    *,
    k_scale: float = 1.0,
    cache: ScoreCache | None = None,
    device: Device | None = None,
    progress: Progress | None = None,
    cancelled: IsCancelled | None = None,
) -> PairScores:
    """Scores of all layers of a pair, and γ.

    Args:
        subject, style: the two files; they may be the same.
        k_scale: multiplies K; 1 is the paper's.
        cache: where profiles are looked for and left.
        device, progress, cancelled: as for `profile_file`; `progress` counts the layers of both files that must be read.

    Raises:
        PairError: the files share no layer, disagree on a layer's shape, or one changes nothing on the shared layers.
        Cancelled: `cancelled` said so.
        LoraFileError: broken numbers in a file.
    """
    shared = _shared_layers(subject, style)
    run = _Run(device, progress, cancelled, None)
    of_subject = _Scored(subject, cache)
    of_style = of_subject if style.path == subject.path else _Scored(style, cache)
    files = (of_subject,) if of_style is of_subject else (of_subject, of_style)
    run.expect(sum(len(file.lora.layers) for file in files if not file.profiles))
    for file in files:
        file.read_profiles(run)
    gamma = _gamma(of_subject, of_style, shared)
    ks = {name: _k(of_subject.profiles[name], of_style.profiles[name], subject.layers[name].shape, k_scale) for name in shared}
    missing = [file.missing_sums(ks) for file in files]
    run.expect(sum(map(len, missing)))
    for file, layer_ks in zip(files, missing):
        file.read_sums(layer_ks, run)
    names = sorted({*subject.layers, *style.layers})
    return PairScores(tuple(_layer_score(name, ks.get(name), of_subject, of_style) for name in names), gamma)


class _Run:
    """Where one call computes, and whom it tells and asks, across all its passes."""

    def __init__(self, device: Device | None, progress: Progress | None, cancelled: IsCancelled | None, workers: int | None) -> None:
        self.device = device or scoring_device()
        self.workers = workers
        self._progress = progress
        self._cancelled = cancelled
        self._done = self._total = 0

    def expect(self, layers: int) -> None:
        """Adds layers to the total; asks once before any work."""
        self._total += layers
        if self._cancelled and self._cancelled():
            raise Cancelled

    def layer_done(self) -> None:
        self._done += 1
        if self._progress:
            self._progress(self._done, self._total)
        if self._done < self._total and self._cancelled and self._cancelled():
            raise Cancelled


class _Scored:
    """One file of a pair with what is known of it, from the cache or from passes over it."""

    def __init__(self, lora: LoraSource, cache: ScoreCache | None) -> None:
        self.lora = lora
        self._cache = cache
        self._key = cache.key(lora.path) if cache else None
        known = cache.load(self._key) if cache and self._key else None
        fits = known is not None and {n: p.numel for n, p in known.profiles.items()} == {n: math.prod(i.shape) for n, i in lora.layers.items()}
        self._known = known if known and fits else FileScores({}, {})

    @property
    def profiles(self) -> Mapping[str, LayerProfile]:
        return self._known.profiles

    def read_profiles(self, run: _Run) -> None:
        """One pass over the file, unless the cache had it."""
        if not self.profiles:
            self._remember(FileScores(_profile(self.lora, run), {}))

    def missing_sums(self, ks: Mapping[str, int]) -> dict[str, int]:
        """{layer: K} of the Top-K sums that neither a profile nor an earlier pass tells."""
        return {name: k for name, k in ks.items() if self.profiles[name].top_sum(k) is None and (name, k) not in self._known.sums}

    def read_sums(self, ks: Mapping[str, int], run: _Run) -> None:
        """One pass over these layers only."""
        if ks:
            found = over_layers(self.lora, list(ks), lambda name, delta, buffer: top_sum(delta, ks[name], buffer),
                                device=run.device, workers=run.workers, layer_done=run.layer_done)
            sums = {(name, ks[name]): value for name, value in found.items()}
            self._remember(FileScores(self.profiles, {**self._known.sums, **sums}))

    def top_sum(self, name: str, k: int) -> float:
        value = self.profiles[name].top_sum(k)
        return self._known.sums[name, k] if value is None else value

    def _remember(self, scores: FileScores) -> None:
        self._known = scores
        if self._cache and self._key and self._cache.key(self.lora.path) == self._key:
            self._cache.save(self._key, scores)
