"""The progress that the host shows while a pair is scored, before the first step of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SHOWN = (
    "textinfo",
    "sampling_step",
    "current_image_sampling_step",
    "current_latent",
    "sampling_steps",
    "job_count",
)


@contextmanager
def scoring_progress(state: Any) -> Iterator[Callable[[int, int], None]]:
    """A context that yields the progress function for `score_pair`, and then restores what the host showed.

    Args:
        state: `shared.state`. The host's progress is (job_no + sampling_step / sampling_steps) / job_count.
            It counts its jobs only after scoring, so job_count may be -1. Its latent is still the last
            image's, and the host would draw a preview of that each time sampling_step grows.
    """
    found = {name: getattr(state, name) for name in SHOWN}

    def report(done: int, total: int) -> None:
        state.textinfo = f"K-LoRA: scoring {done} of {total} layers"
        state.sampling_steps, state.sampling_step = total, done

    state.current_latent = None
    state.sampling_step = 0
    if found["job_count"] < 0:
        state.job_count = 1
    try:
        yield report
    finally:
        for name, value in found.items():
            setattr(state, name, value)
