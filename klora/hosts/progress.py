"""What the host shows while a pair is scored, before the first step of a run."""

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
    """Gives what `score_pair` is to report to; however it ends, the host then shows what it did before.

    Args:
        state: `shared.state`. The share of its work done is (job_no + sampling_step / sampling_steps) / job_count, where job_count
            is -1 until the host has counted its jobs, which it does after this. Of its latent, which is the last image's, the host
            draws a new preview each time the steps have grown.
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
