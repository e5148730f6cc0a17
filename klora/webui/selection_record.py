"""What was really applied in a generation, for the host's answer, its gallery and files beside its images."""

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
        plan: the plan for the whole schedule.
        strengths: levels of subject and style, int8 of shape (steps, layers, 2); -1 where a step did not run.
    """

    name: str
    batch: int
    plan: Plan
    strengths: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """{"pass", "batch", "steps", "layers", "ran", "changes"}, with layers in the plan's order.

        `as_changes` describes the last four.
        """
        return {"pass": self.name, "batch": self.batch, **as_changes(self.strengths)}


class AppliedMaps:
    """The maps of all passes of one generation, one image for each batch.

    Args:
        subject, style: names for the legend.
    """

    def __init__(self, passes: Sequence[AppliedPass], subject: str, style: str) -> None:
        self._batches = [
            [one for one in passes if one.batch == batch] for batch in sorted({one.batch for one in passes})
        ]
        self._names = subject, style

    def show(self, processed: Any) -> None:
        """Add them to the host's gallery, after its images; batches with the same strengths share one."""
        maps = []
        for i, batch in enumerate(self._batches):
            if not any(_alike(batch, earlier) for earlier in self._batches[:i]):
                maps.append(self._drawn(batch))
        if hasattr(processed, "extra_images"):
            processed.extra_images = [*processed.extra_images, *maps]
            return
        lacking = len(processed.images) + len(maps) - len(processed.infotexts)
        processed.images.extend(maps)
        processed.infotexts.extend([processed.infotexts[0]] * lacking)

    def save(self, processed: Any) -> None:
        """Write them beside the images that the host has saved, under the images' names."""
        images = processed.images[processed.index_of_first_image :]
        of_a_batch = max(1, len(images) // max(1, len(self._batches)))
        # No strict: masks that the host shows may come after the images of the batches.
        for batch, first in zip(self._batches, range(0, len(images), of_a_batch)):  # noqa: B905
            saved = [
                Path(path)
                for image in images[first : first + of_a_batch]
                if (path := getattr(image, "already_saved_as", None))
            ]
            if saved:
                drawn = self._drawn(batch)
                for path in saved:
                    drawn.save(path.with_name(path.stem + SUFFIX))

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
