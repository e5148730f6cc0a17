"""What was really applied in a generation: told in the host's answer, shown in its gallery, saved beside its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from klora.core.changes import as_changes
from klora.core.plan import Plan
from klora.hosts.fonts import host_font
from klora.selection_map import draw_map, stacked

FIRST, HIRES = "first", "hires"
SUFFIX = "-klora-map.png"


@dataclass(frozen=True)
class AppliedPass:
    """One sampling pass.

    Attributes:
        name: FIRST or HIRES.
        batch: 0-based.
        plan: of the whole schedule.
        strengths: levels of subject and style, int8 of shape (steps, layers, 2); -1 where a step did not run.
    """

    name: str
    batch: int
    plan: Plan
    strengths: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """{"pass", "batch", "steps", "layers", "ran", "changes"}, the last four as `as_changes` has them, layers in the plan's order."""
        return {"pass": self.name, "batch": self.batch, **as_changes(self.strengths)}


class AppliedMaps:
    """The maps of all passes of one generation, one picture a batch.

    Args:
        subject, style: names for the legend.
    """

    def __init__(self, passes: Sequence[AppliedPass], subject: str, style: str) -> None:
        self._batches = [
            [one for one in passes if one.batch == batch] for batch in sorted({one.batch for one in passes})
        ]
        self._names = subject, style

    def show(self, processed: Any) -> None:
        """Add them to the host's gallery, behind its pictures; batches that were alike share one."""
        pictures = []
        for i, batch in enumerate(self._batches):
            if not any(_alike(batch, earlier) for earlier in self._batches[:i]):
                pictures.append(self._drawn(batch))
        if hasattr(processed, "extra_images"):
            processed.extra_images = [*processed.extra_images, *pictures]
            return
        lacking = len(processed.images) + len(pictures) - len(processed.infotexts)
        processed.images.extend(pictures)
        processed.infotexts.extend([processed.infotexts[0]] * lacking)

    def save(self, processed: Any) -> None:
        """Write them beside the pictures that the host has saved, under their names."""
        pictures = processed.images[processed.index_of_first_image :]
        of_a_batch = max(1, len(pictures) // max(1, len(self._batches)))
        for batch, first in zip(self._batches, range(0, len(pictures), of_a_batch)):  # noqa: B905 masks that the host shows may be left over
            saved = [
                Path(place)
                for picture in pictures[first : first + of_a_batch]
                if (place := getattr(picture, "already_saved_as", None))
            ]
            if saved:
                drawn = self._drawn(batch)
                for place in saved:
                    drawn.save(place.with_name(place.stem + SUFFIX))

    def _drawn(self, batch: Sequence[AppliedPass]) -> Image.Image:
        notes = {FIRST: "as applied", HIRES: "as applied in the hires pass"}
        return stacked(
            [
                draw_map(
                    one.plan, *self._names, strengths=one.strengths, note=notes[one.name], fonts=host_font
                )
                for one in batch
            ]
        )


def _alike(one: Sequence[AppliedPass], other: Sequence[AppliedPass]) -> bool:
    return len(one) == len(other) and all(
        a.name == b.name and np.array_equal(a.strengths, b.strengths) for a, b in zip(one, other, strict=True)
    )
