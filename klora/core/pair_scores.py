"""The scores of a pair of LoRAs, as plain values: what every method looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LayerScore:
    """One layer of a pair. A layer that only one of the two changes is not scored: k and all sums are 0.

    Attributes:
        name: canonical layer name.
        k: K of eq. (5).
        rank_subject, rank_style: the rank that enters K; None for a delta stored in full, 0 for a layer that
            the file does not change.
        subject_score, style_score: sum of the K largest |ΔW|, eqs. (1)-(4).
        subject_abs_sum, style_abs_sum: Σ|ΔW|, for γ.
        subject_energy, style_energy: Σ ΔW², the squared Frobenius norm.
        only: which LoRA alone changes the layer; None if both do.
    """

    name: str
    k: int
    rank_subject: int | None
    rank_style: int | None
    subject_score: float
    style_score: float
    subject_abs_sum: float
    style_abs_sum: float
    subject_energy: float
    style_energy: float
    only: Literal["subject", "style"] | None


@dataclass(frozen=True)
class PairScores:
    """Scores of every layer that the subject or the style changes, sorted by name, and γ of eq. (9)."""

    layers: tuple[LayerScore, ...]
    gamma: float
