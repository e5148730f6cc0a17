"""Who is chosen on each layer at each step: K-LoRA, its ablations, and what people compare it with.

A selector is a pure function from a pair's scores and the schedule to a selection, uint8 of shape (steps, layers) with the values of
`Choice`. Selectors that compare scores give a layer that only one LoRA changes to that LoRA (its rival scores 0 in eq. 6); the others
treat all layers alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from klora.core.scores import PairScores


class Choice(IntEnum):
    """What is applied to a layer."""

    STYLE = 0
    SUBJECT = 1
    BOTH = 2

    @property
    def roles(self) -> tuple[str, ...]:
        """The LoRAs that are applied, in this order."""
        return {Choice.STYLE: ("style",), Choice.SUBJECT: ("subject",), Choice.BOTH: ("subject", "style")}[
            self
        ]


@dataclass(frozen=True)
class Course:
    """What a selector may look at besides the scores.

    Attributes:
        s: S(t) of every step, float64, shape (steps,).
        gamma: γ in force.
        seed: of the first picture of the batch.
    """

    s: np.ndarray
    gamma: float
    seed: int


Selector = Callable[[PairScores, Course], np.ndarray]


def k_lora(scores: PairScores, course: Course) -> np.ndarray:
    """Subject where S_subject >= S_style · γ · S(t) (K-LoRA eqs. 6-10); a tie is the subject's."""
    return _compare(scores, _topk(scores), course.gamma * course.s)


def topk_only(scores: PairScores, course: Course) -> np.ndarray:
    """Subject where S_subject >= S_style: no γ, no S (K-LoRA fig. 9)."""
    return _compare(scores, _topk(scores), np.ones_like(course.s))


def topk_with_gamma(scores: PairScores, course: Course) -> np.ndarray:
    """Subject where S_subject >= S_style · γ: no S (K-LoRA fig. 9)."""
    return _compare(scores, _topk(scores), np.full_like(course.s, course.gamma))


def fixed(scores: PairScores, course: Course) -> np.ndarray:
    """Subject while S(t) <= 1, then style, all layers alike: "Fixed Selection" of K-LoRA fig. 9."""
    return _alike(scores, course.s <= 1)


def random(scores: PairScores, course: Course) -> np.ndarray:
    """Subject with probability 1/3, else style, drawn per layer and step: "Random Selection" of K-LoRA fig. 9.

    The generator is numpy's frozen RandomState, so a seed gives the same selection on every machine and version.
    """
    draws = np.random.RandomState(course.seed % 2**32).random_sample((len(course.s), len(scores.layers)))
    return (draws < 1 / 3).astype(np.uint8)


def frobenius(scores: PairScores, course: Course) -> np.ndarray:
    """K-LoRA with the squared Frobenius norm in place of the Top-K sum (the energy of EST-LoRA, arXiv 2508.02165)."""
    norms = (
        np.array([layer.subject_frobenius for layer in scores.layers]),
        np.array([layer.style_frobenius for layer in scores.layers]),
    )
    return _compare(scores, norms, course.gamma * course.s)


def lora_switch(scores: PairScores, course: Course) -> np.ndarray:
    """Subject, style, subject, … step by step, all layers alike (Multi-LoRA Composition, arXiv 2402.16843)."""
    return _alike(scores, np.arange(len(course.s)) % 2 == 0)


def direct_merge(scores: PairScores, course: Course) -> np.ndarray:
    """Both LoRAs everywhere: the arithmetic merge."""
    return np.full((len(course.s), len(scores.layers)), Choice.BOTH, np.uint8)


def subject_only(scores: PairScores, course: Course) -> np.ndarray:
    """The subject LoRA everywhere."""
    return _alike(scores, np.ones(len(course.s), bool))


def style_only(scores: PairScores, course: Course) -> np.ndarray:
    """The style LoRA everywhere."""
    return _alike(scores, np.zeros(len(course.s), bool))


SELECTORS: dict[str, Selector] = {
    "K-LoRA": k_lora,
    "Top-K only": topk_only,
    "Top-K with γ": topk_with_gamma,
    "Fixed": fixed,
    "Random": random,
    "Frobenius": frobenius,
    "LoRA Switch": lora_switch,
    "Direct merge": direct_merge,
    "Subject only": subject_only,
    "Style only": style_only,
}


def _topk(scores: PairScores) -> tuple[np.ndarray, np.ndarray]:
    return np.array([layer.subject_score for layer in scores.layers]), np.array(
        [layer.style_score for layer in scores.layers]
    )


def _compare(scores: PairScores, magnitudes: tuple[np.ndarray, np.ndarray], factor: np.ndarray) -> np.ndarray:
    """Subject where its magnitude >= style's · factor(step); one-sided layers to the one that has them. Shape (steps, layers)."""
    subject, style = magnitudes
    chosen = subject[None, :] >= style[None, :] * factor[:, None]
    only = np.array([layer.only or "" for layer in scores.layers])
    chosen |= only == "subject"
    chosen &= only != "style"
    return chosen.astype(np.uint8)


def _alike(scores: PairScores, subject: np.ndarray) -> np.ndarray:
    """The same choice for all layers at each step; `subject` is bool of shape (steps,)."""
    return np.repeat(subject.astype(np.uint8)[:, None], len(scores.layers), axis=1)
