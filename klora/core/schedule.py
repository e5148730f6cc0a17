"""The scaling factor S(t): the larger it is, the more layers get the style (K-LoRA eqs. 7 and 12)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ALPHA_M = 1.5
"""The modulus of S* in eq. (12)."""

SCHEDULES = {"s": 0.5, "s*": 1.3}
"""{name of a schedule: its default β}."""


@dataclass(frozen=True)
class Schedule:
    """S(t) = α τ + β (eq. 7), or S*(t) = (α τ + β) mod α_m (eq. 12), where τ = t_now / t_all."""

    name: str
    alpha: float
    beta: float

    @classmethod
    def named(cls, name: str, alpha: float = 1.5, beta: float | None = None) -> Schedule:
        """The schedule "s" or "s*"; without `beta`, its default of 0.5 or 1.3."""
        return cls(name, alpha, SCHEDULES[name] if beta is None else beta)

    def values(self, steps: int) -> np.ndarray:
        """S at each of the `steps` steps of a whole schedule, float64, shape (steps,).

        Values are rounded to 12 decimals, so that a step at which S* wraps around does so in every
        implementation. With α' 1.5, β' 1.3 and 15 steps, for example, step 2 is exactly at 1.5.
        """
        s = np.round(self.alpha * (np.arange(steps) / steps) + self.beta, 12)
        return np.round(s % ALPHA_M, 12) if self.name == "s*" else s
