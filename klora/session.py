"""One sampling pass: attach to a host, switch at each step the layers whose strengths change, and detach."""

from __future__ import annotations

from types import TracebackType

import numpy as np

from klora.core.methods import FULL
from klora.core.plan import Plan
from klora.hosts.base import LayerSwitch


class Session:
    """Runs one plan on one host. As a context manager it detaches from the host however it is left.

    Attributes:
        plan: for the whole schedule.
        applied: {step that ran: the levels of subject and style, uint8 of shape (layers, 2)}.
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
        """Detach from the host. May be called more than once."""
        self._current = None
        self._switch.detach()

    def prepare(self, index: int) -> None:
        """Set the strengths of the first step that will run, before the host loads the denoiser.

        They are then part of the host's own merge, and the step itself finds nothing to switch.

        Args:
            index: of that step in the whole schedule (0-based); beyond its end it means the last step.
        """
        self._put(self.plan.strengths[min(index, self.plan.steps - 1)])

    def step(self, index: int) -> None:
        """Set the strengths of the step that is about to run.

        Each evaluation of the denoiser may call it: only the first of a step can find something to switch.

        Args:
            index: of the step in the whole schedule (0-based); beyond its end it means the last step.
        """
        index = min(index, self.plan.steps - 1)
        self._put(self.plan.strengths[index])
        self.applied[index] = self.plan.strengths[index]

    def recorded(self) -> np.ndarray:
        """`applied` as an int8 array of shape (steps, layers, 2), with -1 for steps that did not run."""
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
