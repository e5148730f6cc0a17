"""The plan of a run: which LoRA is on which layer at which step. A value: it can be printed, drawn, compared and saved."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from klora.core.schedule import Schedule
from klora.core.scores import PairScores
from klora.core.selectors import SELECTORS, Choice, Course

JSON_LAYER_FIELDS = (
    "name", "k", "rank_subject", "rank_style", "subject_score", "style_score", "subject_abs_sum", "style_abs_sum", "only",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Plan:
    """The choice for every step and layer of one whole schedule.

    Attributes:
        scores: of the pair; its layers, sorted by name, are the columns of `selection`.
        selector: name in SELECTORS.
        schedule: S(t).
        gamma: γ in force: eq. (9)'s, 1 when it is off, or the user's number.
        selection: uint8 of shape (steps, layers) with values of `Choice`; read-only.
    """

    scores: PairScores
    selector: str
    schedule: Schedule
    gamma: float
    selection: np.ndarray

    @property
    def steps(self) -> int:
        return self.selection.shape[0]

    @property
    def layer_names(self) -> list[str]:
        return [layer.name for layer in self.scores.layers]

    @property
    def subject_share(self) -> np.ndarray:
        """Share of the layers that the subject holds at each step, float64 in [0, 1], shape (steps,); a shared layer counts half."""
        return np.select(
            [self.selection == Choice.SUBJECT, self.selection == Choice.BOTH], [1.0, 0.5], 0.0
        ).mean(axis=1)

    def switches(self) -> list[list[int]]:
        """For each layer the steps at which its choice differs from the step before."""
        changed = self.selection[1:] != self.selection[:-1]
        return [(np.flatnonzero(column) + 1).tolist() for column in changed.T]

    def to_json(self, warnings: list[str]) -> dict[str, Any]:
        """The plan as `python -m klora analyze` and the HTTP API give it (README, "The plan as JSON")."""
        layers = [
            {**{name: row[name] for name in JSON_LAYER_FIELDS}, "switches": switches}
            for row, switches in zip(map(asdict, self.scores.layers), self.switches(), strict=True)
        ]
        return {
            "gamma": self.gamma,
            "steps": self.steps,
            "schedule": self.schedule.name,
            "alpha": self.schedule.alpha,
            "beta": self.schedule.beta,
            "selector": self.selector,
            "layers": layers,
            "selection": self.selection.tolist(),
            "subject_share": self.subject_share.tolist(),
            "warnings": warnings,
        }


def make_plan(
    scores: PairScores,
    *,
    steps: int,
    schedule: Schedule,
    selector: str = "K-LoRA",
    gamma: float | str = "auto",
    seed: int = 0,
) -> Plan:
    """The plan of a pair for a whole schedule of `steps` steps.

    Args:
        gamma: "auto" takes γ of the pair (eq. 9), "off" takes 1, a number is taken as it is.
        seed: only the selector "Random" looks at it.
    """
    in_force = scores.gamma if gamma == "auto" else 1.0 if gamma == "off" else float(gamma)
    selection = SELECTORS[selector](scores, Course(schedule.values(steps), in_force, seed))
    selection.flags.writeable = False
    return Plan(scores, selector, schedule, in_force, selection)
