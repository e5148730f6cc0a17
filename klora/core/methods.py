"""How strongly each LoRA is applied to each layer at each step: K-LoRA, its ablations, and other methods.

A method makes strengths from a pair's scores and the schedule: levels of subject and style, uint8 of shape
(steps, layers, 2), in units of 1 / FULL. They multiply the user's multipliers. To add a method, write one
function here and register it.

Methods that compare scores give a layer that only one LoRA changes to that LoRA, as the other one scores 0 in
eq. (6). The remaining methods treat all layers alike.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from klora.core.pair_scores import PairScores

FULL = 2
"""The level at which a LoRA is applied at the user's multiplier; 1 is half of that, 0 is not at all."""

LARGEST = sys.float_info.max
"""Stands for infinity, which JSON cannot express."""

SUBJECT, STYLE, BOTH = (FULL, 0), (0, FULL), (FULL, FULL)


@dataclass(frozen=True)
class MethodContext:
    """What a method may look at.

    Attributes:
        scores: the pair's scores.
        s: S(t) at every step, float64, shape (steps,).
        gamma: the γ to use.
        seed: the seed of the first image of the batch.
    """

    scores: PairScores
    s: np.ndarray
    gamma: float
    seed: int

    @property
    def shape(self) -> tuple[int, int]:
        """(steps, layers)."""
        return len(self.s), len(self.scores.layers)


@dataclass(frozen=True)
class Method:
    """One way to make strengths.

    Attributes:
        name: the name under which it is chosen.
        strengths: makes levels, uint8 of shape (steps, layers, 2), from a context.
        absent: the role that the method never applies, so that its text encoder part is not applied either.
        seeded: whether the strengths depend on the seed.
    """

    name: str
    strengths: Callable[[MethodContext], np.ndarray]
    absent: str | None = None
    seeded: bool = False


@dataclass(frozen=True)
class Magnitude:
    """A number by which the two LoRAs are compared on a layer that both change.

    Attributes:
        field: what follows "subject_" and "style_" in the names of LayerScore's fields.
        words: its name for people, in the plural; {k} stands for the layer's K.
    """

    field: str
    words: str

    def of(self, scores: PairScores, role: str) -> np.ndarray:
        """The magnitude of a role's LoRA on every layer, float64, shape (layers,).

        It is 0 where only one of the two changes the layer.
        """
        return np.array([getattr(layer, f"{role}_{self.field}") for layer in scores.layers], np.float64)

    def ratios(self, scores: PairScores) -> np.ndarray:
        """The subject's magnitude divided by the style's on every layer, float64, shape (layers,).

        LARGEST where the style's is 0 or only the subject changes the layer, -LARGEST where only the style
        does.
        """
        subject, style = self.of(scores, "subject"), self.of(scores, "style")
        ratios = np.divide(subject, style, out=np.full(len(subject), LARGEST), where=style > 0)
        ratios[[layer.only == "style" for layer in scores.layers]] = -LARGEST
        return ratios


TOP_K = Magnitude("score", "sums of the {k} largest")
"""S_subject and S_style of eqs. (1)-(4)."""

ENERGY = Magnitude("energy", "squared norms")
"""‖ΔW‖² (the energy of EST-LoRA, arXiv 2508.02165)."""

MAGNITUDES = (TOP_K, ENERGY)


@dataclass(frozen=True)
class Comparison:
    """The rule of a method that gives each layer to one LoRA: subject if ratio >= γ · S(t), else style.

    The rule is data, so that the page can apply it to the ratios from the server while someone drags α or β.

    Attributes:
        magnitude: whose ratio is compared; None compares 1 on all layers.
        uses_gamma, uses_s: whether γ and S(t) enter the threshold; 1 takes the place of one that does not.
    """

    magnitude: Magnitude | None
    uses_gamma: bool
    uses_s: bool

    def __call__(self, context: MethodContext) -> np.ndarray:
        ratios = (
            np.ones(context.shape[1]) if self.magnitude is None else self.magnitude.ratios(context.scores)
        )
        threshold = (context.gamma if self.uses_gamma else 1.0) * (
            context.s if self.uses_s else np.ones_like(context.s)
        )
        return _subject_where(ratios[None, :] >= threshold[:, None])


METHODS: dict[str, Method] = {}
"""{name: method}, in the order in which they are offered."""


def register(
    name: str, absent: str | None = None, seeded: bool = False
) -> Callable[[Callable[[MethodContext], np.ndarray]], Callable[[MethodContext], np.ndarray]]:
    """Decorator that adds a function of a context to METHODS; the arguments are Method's attributes."""

    def add(strengths: Callable[[MethodContext], np.ndarray]) -> Callable[[MethodContext], np.ndarray]:
        METHODS[name] = Method(name, strengths, absent, seeded)
        return strengths

    return add


register("K-LoRA")(Comparison(TOP_K, uses_gamma=True, uses_s=True))
"""Subject where S_subject >= S_style · γ · S(t) (K-LoRA eqs. 6-10)."""

register("Top-K only")(Comparison(TOP_K, uses_gamma=False, uses_s=False))
register("Top-K with γ")(Comparison(TOP_K, uses_gamma=True, uses_s=False))
"""Ablations of K-LoRA fig. 9."""


register("Fixed")(Comparison(None, uses_gamma=False, uses_s=True))
"""Subject while S(t) <= 1, then style, all layers alike: "Fixed Selection" of K-LoRA fig. 9."""


@register("Random", seeded=True)
def random(context: MethodContext) -> np.ndarray:
    """Subject with probability 1/3, else style, per layer and step: "Random Selection" of K-LoRA fig. 9.

    numpy guarantees that RandomState never changes, so a seed gives the same strengths on every machine and
    version.
    """
    return _subject_where(np.random.RandomState(context.seed % 2**32).random_sample(context.shape) < 1 / 3)


register("Frobenius")(Comparison(ENERGY, uses_gamma=True, uses_s=True))


@register("LoRA Switch")
def lora_switch(context: MethodContext) -> np.ndarray:
    """Subject, style, subject, … step by step on all layers (Multi-LoRA Composition, arXiv 2402.16843)."""
    even = np.arange(len(context.s)) % 2 == 0
    return _subject_where(np.broadcast_to(even[:, None], context.shape))


@register("Direct merge")
def direct_merge(context: MethodContext) -> np.ndarray:
    """Both LoRAs everywhere: the arithmetic merge."""
    return everywhere(context.shape, BOTH)


@register("Subject only", absent="style")
def subject_only(context: MethodContext) -> np.ndarray:
    """The subject LoRA everywhere."""
    return everywhere(context.shape, SUBJECT)


@register("Style only", absent="subject")
def style_only(context: MethodContext) -> np.ndarray:
    """The style LoRA everywhere."""
    return everywhere(context.shape, STYLE)


def everywhere(shape: tuple[int, int], levels: tuple[int, int]) -> np.ndarray:
    """The same levels (subject, style) on all layers at all steps; `shape` is (steps, layers)."""
    return np.full((*shape, 2), levels, np.uint8)


def _subject_where(chosen: np.ndarray) -> np.ndarray:
    """Strengths from a bool of shape (steps, layers): the subject alone where true, else the style alone."""
    return np.where(chosen[:, :, None], np.array(SUBJECT, np.uint8), np.array(STYLE, np.uint8))
