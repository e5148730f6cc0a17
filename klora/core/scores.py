"""Scores and γ of a pair of LoRA files: K-LoRA eqs. (1)-(5) and (9), once per pair, from one pass over each file.

The pass gives a profile per layer that answers any partner's K, so files seen before pair without reading them again.
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
"""Entered around every pass over a file: a host lets one thread at a time have the machine."""


class LayerShape(Protocol):
    """What `LoraSource.layers` tells of a layer: (rows, columns) of its ΔW."""

    @property
    def shape(self) -> tuple[int, int]: ...


class LoraSource(Protocol):
    """A LoRA file as `klora.core.lora_file.LoraFile` gives it."""

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
        cancelled: asked all the time, at least every 0.05 s or GPU layer, on the caller's thread.
        workers: threads on the CPU; by default one per core, at most 8.

    Raises:
        Cancelled: `cancelled` said so.
        LoraFileError: broken numbers in the file.
    """
    run = _Run(device, progress, cancelled, nullcontext, workers)
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
    turn: Turn = nullcontext,
) -> PairScores:
    """Scores of all layers of a pair, and γ.

    Args:
        subject, style: the two files; they may be the same.
        k_scale: multiplies K; 1 is the paper's.
        cache: where profiles are looked for and left.
        device, progress, cancelled: as for `profile_file`; `progress` counts the layers of both files that must be read.
        turn: entered around every pass over a file, and not at all for a pair that the cache knows.

    Raises:
        PairError: the files share no layer, disagree on a layer's shape, or one changes nothing on the shared layers.
        Cancelled: `cancelled` said so.
        LoraFileError: broken numbers in a file, in what is not scored (text encoders, norms, biases, magnitudes) too.
    """
    shared = _shared_layers(subject, style)
    run = _Run(device, progress, cancelled, turn, None)
    sides = _Side(subject, cache, run), _Side(style, cache, run)
    files = sides[:1] if subject.path == style.path else sides
    run.expect(sum(len(side.lora.layers) for side in files if not side.known.layers))
    for side in files:
        side.complete_profiles(run)
    sides = files[0], files[-1]
    gamma = _gamma(*sides, shared)
    ours, theirs = (side.known.layers for side in sides)
    ks = {name: _k(ours[name], theirs[name], subject.layers[name].shape, k_scale) for name in shared}
    missing = [side.missing(ks) for side in files]
    run.expect(sum(map(len, missing)))
    for side, missing_ks in zip(files, missing, strict=True):
        side.complete_sums(missing_ks, run)
    names = sorted({*subject.layers, *style.layers})
    return PairScores(tuple(_layer_score(name, ks.get(name), *sides) for name in names), gamma)


class _Run:
    """Where and when one call computes, whom it tells and whom it asks, over all its passes."""

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
        """Within it the machine is this call's."""
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

    def go_on(self) -> None:
        """Raises Cancelled once the call is given up; for its other threads, which must not ask `cancelled` themselves."""
        if self._given_up.is_set():
            raise Cancelled

    def waited_for(self, work: Callable[[], Result]) -> Result:
        """The result of work that cannot be told to stop, as hashing a file: when the call is cancelled it is left to end alone."""
        future: Future[Result] = Future()

        def do() -> None:
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 raised where it is waited for
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
    """One file of a pair and what is known of it, from the cache or from passes over it."""

    def __init__(self, lora: LoraSource, cache: ScoreCache | None, run: _Run) -> None:
        self.lora = lora
        self.known = FileProfile({})
        self._cache = cache
        self._content = run.waited_for(self._present_content)
        self._look_up()

    def complete_profiles(self, run: _Run) -> None:
        """One pass over the file, unless its profile is known, or has become so while this call waited for its turn.

        Where it is known, the numbers that are not scored have been looked at too.
        """
        if self.known.layers:
            return
        with run.turn():
            self._look_up()
            if self.known.layers:
                run.expect(-len(self.lora.layers))
            else:
                run.waited_for(self.lora.check_unscored)
                self._learn(FileProfile(_profile(self.lora, run)))

    def missing(self, ks: Mapping[str, int]) -> dict[str, int]:
        """{layer: K} where the Top-K sum at this K is not known."""
        return {name: k for name, k in ks.items() if self.known.top_sum(name, k) is None}

    def complete_sums(self, ks: Mapping[str, int], run: _Run) -> None:
        """One pass over these layers, if any, for their Top-K sums."""
        if ks:
            with run.turn():
                sums = run.over(
                    self.lora,
                    list(ks),
                    lambda name, delta, buffer: top_sum(delta, ks[name], buffer, run.go_on),
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
        """What the file is known by in the cache; None if it is no longer the file that `lora` was read from."""
        return self._cache.content(self.lora.path, self.lora.state) if self._cache else None


def _fits(known: FileProfile, lora: LoraSource) -> bool:
    """Whether a stored profile is of the layers that the file is now read as."""
    return {name: layer.numel for name, layer in known.layers.items()} == {
        n: math.prod(layer.shape) for n, layer in lora.layers.items()
    }


def _profile(lora: LoraSource, run: _Run) -> dict[str, LayerProfile]:
    found = run.over(lora, list(lora.layers), lambda name, delta, buffer: profile(delta, buffer, run.go_on))
    for name, layer in found.items():
        if not math.isfinite(layer.abs_sum) or not math.isfinite(layer.squared_sum):
            raise LoraFileError(
                f"The numbers of “{lora.path.name}” in layer {name} are too large to be summed: take another file in its place."
            )
    return dict(sorted(found.items()))


def _shared_layers(subject: LoraSource, style: LoraSource) -> list[str]:
    """The layers that both change; raises PairError if there is none or a shape differs."""
    shared = sorted(subject.layers.keys() & style.layers.keys())
    if not shared:
        raise PairError(
            f"“{subject.path.name}” and “{style.path.name}” change different parts of the model and have no layer in common, so there is "
            "nothing to choose between: put both into the prompt, where each applies in full to its own part."
        )
    for name in shared:
        ours, theirs = subject.layers[name].shape, style.layers[name].shape
        if name == "img_in" and ours != theirs:
            raise PairError(
                f"“{subject.path.name}” and “{style.path.name}” were made for different inputs (img_in is {ours[0]}×{ours[1]} in the first and "
                f"{theirs[0]}×{theirs[1]} in the second): one of them is a control LoRA (FLUX.1 Depth or Canny) or was made for FLUX.1 Fill. "
                "Take another LoRA in its place."
            )
        if ours != theirs:
            raise PairError(
                f"“{subject.path.name}” and “{style.path.name}” were made for different base models: layer {name} is "
                f"{ours[0]}×{ours[1]} in the first and {theirs[0]}×{theirs[1]} in the second. Take two LoRAs for the same base model."
            )
    return shared


def _k(subject: LayerProfile, style: LayerProfile, shape: tuple[int, int], k_scale: float) -> int:
    """K-LoRA eq. (5): r_subject · r_style, scaled, at least 1 and at most all entries; a full matrix has rank min(rows, columns)."""
    if subject.rank is None:
        k = table_k(None, min(shape) if style.rank is None else style.rank)
    else:
        k = table_k(subject.rank, subject.rank if style.rank is None else style.rank)
    return min(max(1, round(k * k_scale)), subject.numel)


def _gamma(subject: _Side, style: _Side, shared: Sequence[str]) -> float:
    """K-LoRA eq. (9): Σ|ΔW_subject| / Σ|ΔW_style| over the shared layers; raises PairError if one is 0."""
    totals = [math.fsum(side.known.layers[name].abs_sum for name in shared) for side in (subject, style)]
    for side, other, total in ((subject, style, totals[0]), (style, subject, totals[1])):
        if total == 0:
            raise PairError(
                f"“{side.lora.path.name}” changes nothing on the layers it shares with “{other.lora.path.name}” (all its values there "
                "are zero), so the two cannot be balanced: take another file in its place."
            )
    gamma = totals[0] / totals[1]
    if not 0 < gamma < math.inf:
        raise PairError(
            f"“{subject.lora.path.name}” and “{style.lora.path.name}” differ so much in magnitude ({totals[0]:.1g} and {totals[1]:.1g}) that "
            "they cannot be balanced: take another file in the place of one."
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
