"""The results of an evaluation as tables: means, 95 % intervals, and differences image by image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

GROUPS = {
    "methods": "All methods",
    "k-scale": "K scale",
    "alpha-beta": "α and β",
    "gamma": "γ auto and off",
    "order": "Finding (ii): which LoRA in which half of the steps",
    "subject-alone": "Findings (i) and (ii): the subject LoRA alone, in part of the steps or layers",
    "style-alone": "Findings (i) and (ii): the style LoRA alone, in part of the steps or layers",
}
"""Name of a table -> its title."""
FAR_GAMMA = 2.0
"""Two LoRAs whose magnitudes are this many times apart or more count as very different."""


@dataclass(frozen=True)
class Row:
    """One measured image.

    Attributes:
        gamma: γ of the pair by K-LoRA eq. (9), even where another one was used.
        share: the subject's share of the layers and steps.
        values: {metric: value}.
    """

    group: str
    variant: str
    pair: str
    seed: int
    gamma: float
    share: float
    values: dict[str, float]

    @property
    def both(self) -> float:
        """Harmonic mean of the similarities to subject and style."""
        subject, style = max(self.values["subject"], 0.0), max(self.values["style"], 0.0)
        return 2 * subject * style / (subject + style) if subject + style else 0.0


@dataclass(frozen=True)
class Mean:
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]"


def mean_over_pairs(values: Mapping[str, Sequence[float]], draws: int = 2000) -> Mean:
    """Mean of all values, with its interval by a bootstrap over pairs and the images of each pair.

    Images of one pair resemble each other, so drawing them one by one would make the interval too narrow.
    """
    rng = np.random.RandomState(0)
    groups = [np.asarray(group, float) for group in values.values()]
    means = np.empty(draws)
    for draw in range(draws):
        chosen = rng.randint(len(groups), size=len(groups))
        means[draw] = np.mean(
            [groups[i][rng.randint(len(groups[i]), size=len(groups[i]))].mean() for i in chosen]
        )
    low, high = np.percentile(means, (2.5, 97.5))
    return Mean(float(np.mean([group.mean() for group in groups])), float(low), float(high))


@dataclass(frozen=True)
class Line:
    """One row of a table.

    Attributes:
        count: of images.
        columns: {metric: mean}, then "both", the harmonic mean of subject and style.
        against: how much "both" differs from the table's first line, image by image; None in that line.
    """

    label: str
    count: int
    share: float
    columns: dict[str, Mean]
    against: Mean | None


def table(rows: Sequence[Row]) -> list[Line]:
    """Means of every variant in `rows`, which belong to one group, in the order of the rows."""
    labels = list(dict.fromkeys(row.variant for row in rows))
    of = {label: [row for row in rows if row.variant == label] for label in labels}
    base = {(row.pair, row.seed): row.both for row in of[labels[0]]}
    lines = []
    for label, own in of.items():
        columns = {
            name: mean_over_pairs(_by_pair(own, [row.values[name] for row in own])) for name in own[0].values
        }
        columns["both"] = mean_over_pairs(_by_pair(own, [row.both for row in own]))
        differences = [
            (row, row.both - base[row.pair, row.seed])
            for row in own
            if label != labels[0] and (row.pair, row.seed) in base
        ]
        against = mean_over_pairs(_by_pair(*zip(*differences, strict=True))) if differences else None
        lines.append(Line(label, len(own), float(np.mean([row.share for row in own])), columns, against))
    return lines


def _by_pair(rows: Sequence[Row], values: Sequence[float]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for row, value in zip(rows, values, strict=True):
        found.setdefault(row.pair, []).append(value)
    return found


def as_text(lines: Sequence[Line]) -> str:
    """A table for the terminal."""
    names = list(lines[0].columns)
    width = max(len(line.label) for line in lines) + 2
    head = (
        f"{'':{width}}{'images':>9}{'subject share':>15}"
        + "".join(f"{name:>24}" for name in names)
        + f"{'both, against the first':>26}"
    )
    body = [
        f"{line.label:{width}}{line.count:9}{line.share:15.1%}"
        + "".join(f"{line.columns[name]!s:>24}" for name in names)
        + (f"{line.against!s:>26}" if line.against else "")
        for line in lines
    ]  # fmt: skip
    return "\n".join([head, *body])


def tables(rows: Sequence[Row], groups: Sequence[str]) -> dict[str, list[Line]]:
    """{title: table} for all groups that have rows.

    γ has two tables: one for pairs of very different magnitude, one for the other pairs.
    """
    found = {}
    for group in groups:
        own = [row for row in rows if row.group == group]
        if group != "gamma":
            found[GROUPS[group]] = own
            continue
        far = {row.pair for row in own if not 1 / FAR_GAMMA < row.gamma < FAR_GAMMA}
        found[f"{GROUPS[group]}: magnitudes {FAR_GAMMA:g} times apart or more ({len(far)} pairs)"] = [
            row for row in own if row.pair in far
        ]
        found[f"{GROUPS[group]}: the other pairs"] = [row for row in own if row.pair not in far]
    return {title: table(own) for title, own in found.items() if own}
