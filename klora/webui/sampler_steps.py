"""Which step of a sampling pass an evaluation of the denoiser belongs to, for every sampler of the hosts.

The hosts' own `sampling_step` lags behind, so the evaluations are counted. A second-order sampler evaluates
twice in each step, as the host's list of samplers says. Some evaluate more often in some steps than in
others, which is not in that list but in the hosts' k_diffusion/sampling.py.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from itertools import accumulate

EVALUATIONS: Mapping[str, Callable[[int, int], int]] = {
    "HeunPP2": lambda step, steps: min(3, steps - step),
    "Kohaku LoNyu Yog": lambda step, steps: 3 if step <= steps / 2 else 1,
    "DPM++ 2s a RF": lambda step, steps: 2 if step < steps - 1 else 1,
    "Flux Realistic": lambda step, steps: 2 if step < steps - 1 else 1,
}
"""{sampler: the number of evaluations in a step, from its 0-based index and the number of steps}."""

UNBOUNDED = ("DPM adaptive",)
"""Samplers whose number of evaluations depends on the image."""


def step_of(evaluation: int, sampler: str, *, steps: int, order: int) -> int:
    """The 0-based step of a pass of `steps` steps that the 0-based `evaluation` belongs to.

    Args:
        order: the evaluations in each step according to the host's list of samplers.
    """
    if sampler not in EVALUATIONS:
        return evaluation // order
    ends = list(accumulate(EVALUATIONS[sampler](step, steps) for step in range(steps)))
    return min(bisect_right(ends, evaluation), steps - 1)
