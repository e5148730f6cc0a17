"""One sampling pass: attach to a host, at each step switch the layers whose strengths change, give everything back."""

from __future__ import annotations

from types import TracebackType

import numpy as np

from klora.core.methods import FULL
from klora.core.plan import Plan
from klora.hosts.base import LayerSwitch


class Session:
    """Runs one plan on one host. A context manager: leaving it, in whatever way, detaches.

    Attributes:
        plan: of the whole schedule.
        applied: the levels on the layers at the steps that ran, {step: uint8 of shape (layers, 2)}.
    """

    def __init__(self, plan: Plan, switch: LayerSwitch) -> None:
        self.plan = plan
        self.applied: dict[int, np.ndarray] = {}
        self._switch = switch
        self._names = plan.layer_names
        self._current: np.ndarray | None = None

    def __enter__(self) -> Session:
        self._switch.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Detach; harmless when it was done before."""
        self._current = None
        self._switch.detach()

    def prepare(self, index: int) -> None:
        """Make the layers what the first step to run, `index`, wants: cheapest before the host loads the denoiser."""
        self._put(self.plan.strengths[min(index, self.plan.steps - 1)])

    def step(self, index: int) -> None:
        """Step `index` runs (0-based in the whole schedule; the last step beyond its end): make the layers what the plan says for it.

        Several model evaluations of one step may each call it: only the first can find something to switch.
        """
        index = min(index, self.plan.steps - 1)
        self._put(self.plan.strengths[index])
        self.applied[index] = self.plan.strengths[index]

    def recorded(self) -> np.ndarray:
        """`applied` as an int8 array of shape (steps, layers, 2), -1 where a step did not run."""
        rows = np.full(self.plan.strengths.shape, -1, np.int8)
        for index, row in self.applied.items():
            rows[index] = row
        return rows

    def _put(self, row: np.ndarray) -> None:
        changed = np.arange(len(row))
        if self._current is not None:
            changed = np.flatnonzero((row != self._current).any(axis=1))
        if len(changed):
            strengths = (row[changed] / FULL).tolist()
            self._switch.apply({self._names[i]: (a, b) for i, (a, b) in zip(changed, strengths, strict=True)})
        self._current = row
