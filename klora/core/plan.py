"""The plan of a run: how strongly each LoRA is applied to which layer at which step.

It is a plain value that can be printed, drawn, compared and saved.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from klora.core.changes import number
from klora.core.methods import FULL, METHODS, MethodContext
from klora.core.pair_scores import PairScores
from klora.core.schedule import Schedule

JSON_LAYER_FIELDS = (
    "name", "k", "rank_subject", "rank_style",
    "subject_score", "style_score", "subject_abs_sum", "style_abs_sum", "only",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Plan:
    """The strengths of both LoRAs for every step and layer of one whole schedule.

    Attributes:
        scores: of the pair; its layers, sorted by name, are the second axis of `strengths`.
        method: name in METHODS.
        schedule: S(t).
        gamma: the γ that was used: eq. (9)'s, 1 if it is off, or the user's number.
        strengths: levels of subject and style, uint8 of shape (steps, layers, 2), in units of 1 / FULL;
            read-only.
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
        """For each layer, the steps at which its strengths differ from those of the step before."""
        changed = (self.strengths[1:] != self.strengths[:-1]).any(axis=2)
        return [(np.flatnonzero(column) + 1).tolist() for column in changed.T]

    def to_json(self, warnings: list[str]) -> dict[str, Any]:
        """The plan as `python -m klora analyze` and the HTTP API give it: docs/api.md, "The plan as JSON"."""
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
    """The shares of subject and style, float64, shape (..., 2), from levels of shape (..., layers, 2).

    Each layer counts as 1, divided between the two LoRAs as its levels are; a layer with neither LoRA counts
    as 0.
    """
    total = strengths.sum(axis=-1, keepdims=True)
    return np.divide(strengths, total, out=np.zeros(strengths.shape), where=total > 0).mean(axis=-2)


def as_numbers(strengths: np.ndarray) -> list:
    """Levels as nested lists of what they multiply the user's multipliers by: 0, 0.5 or 1."""
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
        scores: the pair's scores.
        steps: steps of the whole schedule, 1 or more.
        schedule: S(t).
        method: a name in METHODS.
        gamma: "auto" uses the pair's γ (eq. 9), "off" uses 1, a number is used as it is.
        seed: used by the method "Random" only.

    Raises:
        KeyError: there is no such method.
    """
    used_gamma = scores.gamma if gamma == "auto" else 1.0 if gamma == "off" else float(gamma)
    strengths = METHODS[method].strengths(MethodContext(scores, schedule.values(steps), used_gamma, seed))
    strengths.flags.writeable = False
    return Plan(scores, method, schedule, used_gamma, strengths)
