"""The plan of a run: how strongly each LoRA is on which layer at which step. A value: it can be printed, drawn, compared and saved."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from klora.core.changes import number
from klora.core.methods import FULL, METHODS, MethodContext
from klora.core.pair_scores import PairScores
from klora.core.schedule import Schedule

JSON_LAYER_FIELDS = (
    "name", "k", "rank_subject", "rank_style", "subject_score", "style_score", "subject_abs_sum", "style_abs_sum", "only",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Plan:
    """The strengths of both LoRAs for every step and layer of one whole schedule.

    Attributes:
        scores: of the pair; its layers, sorted by name, are the second axis of `strengths`.
        method: name in METHODS.
        schedule: S(t).
        gamma: γ in force: eq. (9)'s, 1 when it is off, or the user's number.
        strengths: levels of subject and style, uint8 of shape (steps, layers, 2), in units of 1 / FULL; read-only.
    """

    scores: PairScores
    method: str
    schedule: Schedule
    gamma: float
    strengths: np.ndarray

    @property
    def steps(self) -> int:
        return self.strengths.shape[0]

    @property
    def layer_names(self) -> list[str]:
        return [layer.name for layer in self.scores.layers]

    @property
    def subject_share(self) -> np.ndarray:
        """The subject's share of all strengths at each step, float64 in [0, 1], shape (steps,)."""
        return shares(self.strengths)[..., 0]

    def switches(self) -> list[list[int]]:
        """For each layer the steps at which its strengths differ from the step before."""
        changed = (self.strengths[1:] != self.strengths[:-1]).any(axis=2)
        return [(np.flatnonzero(column) + 1).tolist() for column in changed.T]

    def to_json(self, warnings: list[str]) -> dict[str, Any]:
        """The plan as `python -m klora analyze` and the HTTP API give it (docs/api.md, "The plan as JSON")."""
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
            "method": self.method,
            "layers": layers,
            "strengths": as_numbers(self.strengths),
            "subject_share": self.subject_share.tolist(),
            "warnings": warnings,
        }


def shares(strengths: np.ndarray) -> np.ndarray:
    """Subject's and style's share of the layers, float64, shape (..., 2), from levels of shape (..., layers, 2).

    A layer counts 1 in all, split as its two levels are; one with neither counts nothing.
    """
    total = strengths.sum(axis=-1, keepdims=True)
    return np.divide(strengths, total, out=np.zeros(strengths.shape), where=total > 0).mean(axis=-2)


def as_numbers(strengths: np.ndarray) -> list:
    """Levels as the numbers that multiply the user's multipliers: 0, 0.5 or 1, in lists of the same shape."""
    return np.array([number(level) for level in range(FULL + 1)], dtype=object)[strengths].tolist()


def make_plan(
    scores: PairScores,
    *,
    steps: int,
    schedule: Schedule,
    method: str = "K-LoRA",
    gamma: float | str = "auto",
    seed: int = 0,
) -> Plan:
    """The plan of a pair for a whole schedule of `steps` steps.

    Args:
        gamma: "auto" takes γ of the pair (eq. 9), "off" takes 1, a number is taken as it is.
        seed: only the method "Random" looks at it.
    """
    in_force = scores.gamma if gamma == "auto" else 1.0 if gamma == "off" else float(gamma)
    strengths = METHODS[method].strengths(MethodContext(scores, schedule.values(steps), in_force, seed))
    strengths.flags.writeable = False
    return Plan(scores, method, schedule, in_force, strengths)
