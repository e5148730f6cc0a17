"""Strengths over a run as people and pages are told them: only the steps at which a layer's strengths change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from klora.core.methods import FULL


def as_changes(levels: np.ndarray) -> dict[str, Any]:
    """{"steps", "layers": how many there are, "ran": the steps that ran, "changes": [[step, [subject, style], layers], …]}.

    A change says which layers have these strengths from this step on; at the first step that ran it is said of every layer.
    Steps and layers are 0-based and written as `spans` does.

    Args:
        levels: of shape (steps, layers, 2), in units of 1 / FULL; -1 where a step did not run.
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
    """What a level multiplies the user's multiplier by: 0, 0.5 or 1; the whole ones are int, so that JSON has them without a point."""
    return level / FULL if level % FULL else level // FULL


def spans(numbers: Iterable[int]) -> str:
    """Rising whole numbers as text, each unbroken row of them by its first and last: "0-3,7"."""
    rows: list[list[int]] = []
    for one in numbers:
        if rows and one == rows[-1][1] + 1:
            rows[-1][1] = one
        else:
            rows.append([one, one])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in rows)
