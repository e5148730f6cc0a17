"""The strengths of a run in short form: only the steps at which a layer's strengths change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from klora.core.methods import FULL


def as_changes(levels: np.ndarray) -> dict[str, Any]:
    """The steps that ran, and which layers changed their strengths at which of them.

    Args:
        levels: levels of subject and style, shape (steps, layers, 2), in units of 1 / FULL; -1 for a step
            that did not run.

    Returns:
        "steps" and "layers": how many there are; "ran": the steps that ran; "changes": a list of
        [step, [subject, style], layers], where these layers have these strengths from this step on. At the
        first step that ran, every layer is listed. Steps and layers count from 0, written as by `spans`.
    """
    ran = [step for step, row in enumerate(levels) if not (row < 0).any()]
    return {
        "steps": levels.shape[0],
        "layers": levels.shape[1],
        "ran": spans(ran),
        "changes": list(_changes(levels, ran)),
    }


def _changes(levels: np.ndarray, ran: Iterable[int]) -> Iterator[list]:
    before: np.ndarray | None = None
    for step in ran:
        row = levels[step]
        changed = np.ones(len(row), bool) if before is None else (row != before).any(axis=1)
        for pair in sorted({(int(subject), int(style)) for subject, style in row[changed]}, reverse=True):
            layers = np.flatnonzero(changed & (row == pair).all(axis=1))
            yield [step, [number(level) for level in pair], spans(layers.tolist())]
        before = row


def number(level: int) -> float:
    """What a level multiplies the user's multiplier by: 0, 0.5 or 1.

    Whole numbers are int, so that JSON shows them without a decimal point.
    """
    return level / FULL if level % FULL else level // FULL


def spans(numbers: Iterable[int]) -> str:
    """Whole numbers in ascending order as text, with each unbroken range by its first and last: "0-3,7"."""
    rows: list[list[int]] = []
    for one in numbers:
        if rows and one == rows[-1][1] + 1:
            rows[-1][1] = one
        else:
            rows.append([one, one])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in rows)
