"""One sampling pass of a generation: its session, and the step that each evaluation belongs to."""

from __future__ import annotations

from typing import Any, NamedTuple

from klora.core.plan import Plan
from klora.hosts.base import PairSwitch, PassSchedule
from klora.session import Session
from klora.webui import sampler_steps
from klora.webui.selection_record import FIRST, HIRES, AppliedPass


class PassName(NamedTuple):
    """A pass of a generation: every batch has a first one, and with hires. fix a second one."""

    name: str
    batch: int


def is_hires(p: Any) -> bool:
    """Whether the pass that `p` is about to run, or runs, is the hires pass."""
    return bool(getattr(p, "is_hr_pass", False))


def pass_of(p: Any) -> PassName:
    """The pass that `p` is about to run, or runs."""
    return PassName(HIRES if is_hires(p) else FIRST, int(p.iteration))


def seed_of(p: Any) -> int:
    """The seed of the first image in the batch that `p` is making."""
    return int((getattr(p, "seeds", None) or [0])[0])


class SamplingPass:
    """The pass that `p` is about to run. `switch` applies the pair from now on until `close`.

    Args:
        plan: the plan for the whole schedule.
        schedule: which of its steps run.
    """

    def __init__(self, p: Any, plan: Plan, schedule: PassSchedule, switch: PairSwitch) -> None:
        self._p = p
        self._name = pass_of(p)
        self._schedule = schedule
        self._session = Session(plan, switch)
        self._session.__enter__()
        self._session.prepare(schedule.first)

    @property
    def name(self) -> str:
        return self._name.name

    def at_call(self, params: Any) -> None:
        """The denoiser is about to be evaluated: switch to the step that this evaluation belongs to."""
        self._session.step(self._index(params))

    def next_step(self) -> int:
        """The 0-based step that the next evaluation belongs to."""
        return self._step_of(self._p.sampler.model_wrap_cfg.step)

    def close(self) -> AppliedPass:
        """End the pass, and return what was applied."""
        self._session.close()
        return AppliedPass(*self._name, self._session.plan, self._session.recorded())

    def _index(self, params: Any) -> int:
        """The step, from the number of evaluations or, if that is not fixed, from the noise level."""
        sampler = self._p.sampler
        if sampler.config.name not in sampler_steps.UNBOUNDED:
            return self._step_of(params.denoiser.step)
        sigmas = sampler.get_sigmas(self._p, self._session.plan.steps)[:-1]
        return int((sigmas > float(params.sigma.max()) * 1.0001).sum())

    def _step_of(self, evaluation: int) -> int:
        sampler, steps = self._p.sampler.config, self._schedule.runs
        return self._schedule.first + sampler_steps.step_of(
            evaluation, sampler.name, steps=steps, order=max(1, sampler.total_steps(steps) // steps)
        )
