"""Scores and γ of a pair of LoRA files (K-LoRA eqs. 1-5 and 9), from one pass over each file.

The pass makes a profile of each layer that covers the K of any usual partner, so files seen before are scored
without reading them again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from threading import Event, Thread
from typing import Literal, Protocol

from torch import device as Device

from klora.core.deltas import Delta
from klora.core.file_state import FileState
from klora.core.layer_pass import SECONDS_BETWEEN_CHECKS, Result, Work, over_layers, scoring_device
from klora.core.pair_scores import LayerScore, PairScores
from klora.core.profiles import FileProfile, LayerProfile, table_k
from klora.core.score_cache import ScoreCache
from klora.core.topk import profile, top_sum
from klora.errors import Cancelled, LoraFileError, PairError

Progress = Callable[[int, int], object]
IsCancelled = Callable[[], bool]
Turn = Callable[[], AbstractContextManager[object]]
"""Entered around every pass over a file, as a host lets only one thread at a time use the machine."""


class LayerShape(Protocol):
    """What `LoraSource.layers` says of a layer: the shape (rows, columns) of its ΔW."""

    @property
    def shape(self) -> tuple[int, int]: ...


class LoraSource(Protocol):
    """What scoring needs of a LoRA file; `klora.core.lora_file.LoraFile` is one."""

    @property
    def path(self) -> Path: ...

    @property
    def state(self) -> FileState | None: ...

    @property
    def layers(self) -> Mapping[str, LayerShape]: ...

    def open(self) -> AbstractContextManager[Callable[[str], Delta]]: ...

    def check_unscored(self) -> None: ...


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
        cancelled: asked at least every 0.05 s, or before every layer on a GPU, on the caller's thread.
        workers: CPU threads; by default one per core, at most 8.

    Returns:
        {canonical layer: profile}, sorted by name.

    Raises:
        Cancelled: `cancelled` returned True.
        LoraFileError: a tensor holds NaN or Inf, or numbers too large to be summed.
    """
    job = _ScoringJob(device, progress, cancelled, nullcontext, workers)
    job.expect(len(lora.layers))
    return _profile(lora, job)


def score_pair(
    subject: LoraSource,
    style: LoraSource,
    *,
    k_scale: float = 1.0,
    cache: ScoreCache | None = None,
    device: Device | None = None,
    progress: Progress | None = None,
    cancelled: IsCancelled | None = None,
    turn: Turn = nullcontext,
) -> PairScores:
    """Scores of all layers of a pair, and γ.

    Args:
        subject, style: the two files; they may be the same.
        k_scale: multiplies K; 1 is the paper's K.
        cache: where profiles are looked up and stored; None does without.
        device, progress, cancelled: as for `profile_file`; `progress` counts the layers of both files that
            must be read.
        turn: entered around every pass over a file; not used for a pair that is in the cache.

    Raises:
        PairError: the files share no layer, disagree on a layer's shape or differ too much in magnitude, or
            one of them changes nothing on the shared layers.
        Cancelled: `cancelled` returned True.
        LoraFileError: a tensor holds NaN or Inf, or numbers too large to be summed. This includes tensors
            that are not scored: text encoders, norms, biases and magnitudes.
    """
    shared = _shared_layers(subject, style)
    job = _ScoringJob(device, progress, cancelled, turn, None)
    sides = _Side(subject, cache, job), _Side(style, cache, job)
    files = sides[:1] if subject.path == style.path else sides
    job.expect(sum(len(side.lora.layers) for side in files if not side.known.layers))
    for side in files:
        side.complete_profiles(job)
    sides = files[0], files[-1]
    gamma = _gamma(*sides, shared)
    ours, theirs = (side.known.layers for side in sides)
    ks = {name: _k(ours[name], theirs[name], subject.layers[name].shape, k_scale) for name in shared}
    missing = [side.missing(ks) for side in files]
    job.expect(sum(map(len, missing)))
    for side, missing_ks in zip(files, missing, strict=True):
        side.complete_sums(missing_ks, job)
    names = sorted({*subject.layers, *style.layers})
    return PairScores(tuple(_layer_score(name, ks.get(name), *sides) for name in names), gamma)


class _ScoringJob:
    """One call's device, progress and cancellation, over all its passes."""

    def __init__(
        self,
        device: Device | None,
        progress: Progress | None,
        cancelled: IsCancelled | None,
        turn: Turn,
        workers: int | None,
    ) -> None:
        self._device = device or scoring_device()
        self._workers = workers
        self._progress = progress
        self._cancelled = cancelled
        self._turn = turn
        self._given_up = Event()
        self._done = self._total = 0

    def expect(self, layers: int) -> None:
        """Adds layers to the total of `progress`."""
        self._total += layers

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Inside the block this call has the machine to itself."""
        self._check()
        with self._turn():
            yield

    def over(self, lora: LoraSource, names: Sequence[str], work: Work[Result]) -> dict[str, Result]:
        """One pass over these layers, {layer: result of work}."""
        return over_layers(
            lora,
            names,
            work,
            device=self._device,
            workers=self._workers,
            layer_done=self._layer_done,
            check=self._check,
        )

    def raise_if_cancelled(self) -> None:
        """Raises Cancelled after a cancellation; for worker threads, which must not call `cancelled`."""
        if self._given_up.is_set():
            raise Cancelled

    def wait_for(self, work: Callable[[], Result]) -> Result:
        """The result of work that cannot be stopped, such as hashing; it runs on after a cancellation."""
        future: Future[Result] = Future()

        def do() -> None:
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 raised again by `future.result`
                future.set_exception(error)

        Thread(target=do, daemon=True).start()
        while not wait([future], SECONDS_BETWEEN_CHECKS).done:
            self._check()
        return future.result()

    def _layer_done(self) -> None:
        self._done += 1
        if self._progress:
            self._progress(self._done, self._total)

    def _check(self) -> None:
        if self._cancelled and self._cancelled():
            self._given_up.set()
            raise Cancelled


class _Side:
    """The subject or the style file and what is known of it, from the cache or from passes over it."""

    def __init__(self, lora: LoraSource, cache: ScoreCache | None, job: _ScoringJob) -> None:
        self.lora = lora
        self.known = FileProfile({})
        self._cache = cache
        self._content = job.wait_for(self._present_content)
        self._look_up()

    def complete_profiles(self, job: _ScoringJob) -> None:
        """One pass over the file, unless its profiles are known, or another call stored them in the meantime.

        If they are known, the tensors that are not scored were checked before, too.
        """
        if self.known.layers:
            return
        with job.turn():
            self._look_up()
            if self.known.layers:
                job.expect(-len(self.lora.layers))
            else:
                job.wait_for(self.lora.check_unscored)
                self._learn(FileProfile(_profile(self.lora, job)))

    def missing(self, ks: Mapping[str, int]) -> dict[str, int]:
        """{layer: K} where the Top-K sum at this K is not known."""
        return {name: k for name, k in ks.items() if self.known.top_sum(name, k) is None}

    def complete_sums(self, ks: Mapping[str, int], job: _ScoringJob) -> None:
        """One pass over these layers, if any, for their Top-K sums."""
        if ks:
            with job.turn():
                sums = job.over(
                    self.lora,
                    list(ks),
                    lambda name, delta, buffer: top_sum(delta, ks[name], buffer, job.raise_if_cancelled),
                )
            extra = {**self.known.extra_sums, **{(name, ks[name]): value for name, value in sums.items()}}
            self._learn(FileProfile(self.known.layers, extra))

    def top_sum(self, name: str, k: int) -> float:
        """The layer's Top-K sum, after `complete_sums`."""
        value = self.known.top_sum(name, k)
        if value is None:
            raise KeyError((name, k))
        return value

    def _look_up(self) -> None:
        known = self._cache.load(self._content) if self._cache and self._content else None
        if known and _fits(known, self.lora):
            self.known = known

    def _learn(self, known: FileProfile) -> None:
        self.known = known
        if self._cache and self._content and self._content == self._present_content():
            self._cache.store(self._content, known)

    def _present_content(self) -> str | None:
        """The file's key in the cache; None without a cache, or if the file changed after `lora` was read."""
        return self._cache.content(self.lora.path, self.lora.state) if self._cache else None


def _fits(known: FileProfile, lora: LoraSource) -> bool:
    """Whether a stored profile has the layers that are read from the file now."""
    return {name: layer.numel for name, layer in known.layers.items()} == {
        n: math.prod(layer.shape) for n, layer in lora.layers.items()
    }


def _profile(lora: LoraSource, job: _ScoringJob) -> dict[str, LayerProfile]:
    found = job.over(
        lora,
        list(lora.layers),
        lambda name, delta, buffer: profile(delta, buffer, job.raise_if_cancelled),
    )
    for name, layer in found.items():
        if not math.isfinite(layer.abs_sum) or not math.isfinite(layer.squared_sum):
            raise LoraFileError(
                f'The numbers of "{lora.path.name}" in layer {name} are too large to be summed: '
                "take another file in its place."
            )
    return dict(sorted(found.items()))


def _shared_layers(subject: LoraSource, style: LoraSource) -> list[str]:
    """The layers that both files change; raises PairError if there is none or a shape differs."""
    shared = sorted(subject.layers.keys() & style.layers.keys())
    if not shared:
        raise PairError(
            f'"{subject.path.name}" and "{style.path.name}" change different parts of the model and have no '
            "layer in common, so there is nothing to choose between: put both into the prompt, where each "
            "applies in full to its own part."
        )
    for name in shared:
        ours, theirs = subject.layers[name].shape, style.layers[name].shape
        if ours != theirs:
            raise PairError(
                f'"{subject.path.name}" and "{style.path.name}" were made for different base models: layer '
                f"{name} is {ours[0]}×{ours[1]} in the first and {theirs[0]}×{theirs[1]} in the second. Take "
                "two LoRAs for the same base model."
            )
    return shared


def _k(subject: LayerProfile, style: LayerProfile, shape: tuple[int, int], k_scale: float) -> int:
    """K of K-LoRA eq. (5): r_subject · r_style, scaled, at least 1 and at most the number of entries.

    If neither delta has a rank, both count with the full rank of the matrix, min(rows, columns).
    """
    if subject.rank is None:
        k = table_k(None, min(shape) if style.rank is None else style.rank)
    else:
        k = table_k(subject.rank, subject.rank if style.rank is None else style.rank)
    return min(max(1, round(k * k_scale)), subject.numel)


def _gamma(subject: _Side, style: _Side, shared: Sequence[str]) -> float:
    """K-LoRA eq. (9): Σ|ΔW_subject| / Σ|ΔW_style| over the shared layers.

    Raises PairError if a sum is 0 or the ratio is not a positive, finite number.
    """
    totals = [math.fsum(side.known.layers[name].abs_sum for name in shared) for side in (subject, style)]
    for side, other, total in ((subject, style, totals[0]), (style, subject, totals[1])):
        if total == 0:
            raise PairError(
                f'"{side.lora.path.name}" changes nothing on the layers it shares with '
                f'"{other.lora.path.name}" (all its values there are zero), so the two cannot be balanced: '
                "take another file in its place."
            )
    gamma = totals[0] / totals[1]
    if not 0 < gamma < math.inf:
        raise PairError(
            f'"{subject.lora.path.name}" and "{style.lora.path.name}" differ so much in magnitude '
            f"({totals[0]:.1g} and {totals[1]:.1g}) that they cannot be balanced: take another file in place "
            "of one."
        )
    return gamma


def _layer_score(name: str, k: int | None, subject: _Side, style: _Side) -> LayerScore:
    """The score of one layer; `k` is None where only one of the two changes it."""
    if k is None:
        only: Literal["subject", "style"] = "subject" if name in subject.known.layers else "style"
        rank_subject, rank_style = (
            side.known.layers[name].rank if name in side.known.layers else 0 for side in (subject, style)
        )
        return LayerScore(name, 0, rank_subject, rank_style, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, only)
    ours, theirs = subject.known.layers[name], style.known.layers[name]
    return LayerScore(
        name=name,
        k=k,
        rank_subject=ours.rank,
        rank_style=theirs.rank,
        subject_score=subject.top_sum(name, k),
        style_score=style.top_sum(name, k),
        subject_abs_sum=ours.abs_sum,
        style_abs_sum=theirs.abs_sum,
        subject_energy=ours.squared_sum,
        style_energy=theirs.squared_sum,
        only=None,
    )
