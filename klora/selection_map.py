"""The selection map (K-LoRA fig. 6) as an image.

Steps run down and layers across. Layers are blue where the subject is applied and green where the style is;
`level_colours` has the colours for both, neither and halves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from PIL import Image, ImageDraw

from klora.core.blocks import block_of, forward_order
from klora.core.methods import FULL
from klora.core.plan import Plan, shares
from klora.core.schedule import ALPHA_M
from klora.lettering import Fonts, Pen, own_font
from klora.level_colours import PAIRS, STYLE, SUBJECT, colour_of, words_of

INK, FAINT, PAPER, NOT_RUN = (40, 40, 40), (150, 150, 150), (255, 255, 255), (232, 232, 232)

LEFT, TOP, GAP, SHARE_WIDTH, SHARE_LEFT = 64, 58, 3, 120, 24
MAP_WIDTH, ROWS_HEIGHT, BLOCK_LABELS, MARGIN = 1400, 420, 74, 16
SUBTITLE_MIDDLE, TEXT_LEFT, ENTRY_GAP = 43, 20, 28
LONGEST_NAME = 48


@dataclass(frozen=True)
class Column:
    """One layer in the image: its index in the plan, its place, and whether only one LoRA changes it."""

    index: int
    left: int
    one_sided: bool
    block: str


def draw_map(
    plan: Plan,
    subject: str,
    style: str,
    strengths: np.ndarray | None = None,
    note: str = "",
    fonts: Fonts = own_font,
) -> Image.Image:
    """The selection map of a plan, or of what was applied, as wide as its layers and texts need.

    Args:
        subject, style: names for the legend; the middle of very long names is left out.
        strengths: recorded levels to draw instead of the plan's, int of shape (steps, layers, 2), with -1
            where a step did not run.
        note: added to the names in the title.
        fonts: the fonts to write in.
    """
    pen = Pen(fonts)
    rows = plan.strengths if strengths is None else strengths
    columns, cell = _columns(plan)
    height = max(3, min(24, ROWS_HEIGHT // len(rows)))
    width = columns[-1].left + cell
    bottom = TOP + height * len(rows)
    subject, style = _shortened(subject), _shortened(style)
    title, subtitle = f"{subject} in the style of {style}{', ' * bool(note)}{note}", _subtitle(plan)
    entries = _legend_entries(plan, rows, subject, style, pen)
    shares_left = LEFT + max(width, pen.width(subtitle, 13)) + SHARE_LEFT
    right = max(shares_left + SHARE_WIDTH, LEFT + pen.width(title, 18), entries[-1].left + entries[-1].width)
    image = Image.new("RGB", (right + MARGIN, bottom + BLOCK_LABELS + 40), PAPER)
    image.paste(Image.fromarray(_cells(rows, columns, cell, height, width)), (LEFT, TOP))
    pen.write(image, LEFT, 22, title, 18, INK)
    pen.write(image, LEFT, SUBTITLE_MIDDLE, subtitle, 13, INK)
    _steps_axis(image, len(rows), height, pen)
    _block_names(image, columns, cell, bottom + 6, pen)
    _shares(image, rows, height, shares_left, pen)
    _legend(image, entries, bottom + BLOCK_LABELS + 19, pen)
    return image


def stacked(maps: Sequence[Image.Image]) -> Image.Image:
    """Several maps in one image, one below the other."""
    image = Image.new("RGB", (max(part.width for part in maps), sum(part.height for part in maps)), PAPER)
    top = 0
    for part in maps:
        image.paste(part, (0, top))
        top += part.height
    return image


def _columns(plan: Plan) -> tuple[list[Column], int]:
    """The layers in the order of the network with gaps between blocks, and a layer's width in pixels."""
    layers = sorted(enumerate(plan.scores.layers), key=lambda item: forward_order(item[1].name))
    cell = max(1, min(16, MAP_WIDTH // max(1, len(layers))))
    columns: list[Column] = []
    left, block = 0, None
    for index, layer in layers:
        if block is not None and block_of(layer.name) != block:
            left += GAP
        block = block_of(layer.name)
        columns.append(Column(index, left, layer.only is not None, block))
        left += cell
    return columns, cell


def _cells(rows: np.ndarray, columns: Sequence[Column], cell: int, height: int, width: int) -> np.ndarray:
    """The map itself, uint8 of shape (steps * height, width, 3); one-sided layers that ran are hatched."""
    colours = np.array([*(colour_of(*pair) for pair in PAIRS), NOT_RUN], np.uint8)
    codes = _codes(rows)
    pixels = np.full((len(rows) * height, width, 3), PAPER, np.uint8)
    hatch = _hatch(*pixels.shape[:2])
    hatch[np.repeat((codes < 0).any(axis=1), height)] = False
    for column in columns:
        span = slice(column.left, column.left + cell)
        pixels[:, span] = np.repeat(colours[codes[:, column.index]], height, axis=0)[:, None]
        if column.one_sided:
            pixels[:, span][hatch[:, span]] = PAPER
    return pixels


def _codes(rows: np.ndarray) -> np.ndarray:
    """The index in PAIRS of each layer's levels, int of shape (steps, layers); -1 if the step did not run."""
    subject, style = rows[..., 0].astype(np.int16), rows[..., 1]
    return np.where(subject < 0, -1, subject * (FULL + 1) + style)


def _shortened(name: str) -> str:
    """The name, without its middle if it is very long: the files of one training differ at the end."""
    kept = LONGEST_NAME // 2 - 1
    return name if len(name) <= LONGEST_NAME else f"{name[:kept]}...{name[-kept:]}"


def _subtitle(plan: Plan) -> str:
    s = plan.schedule
    schedule = (
        f"S = {s.alpha:g} t/T + {s.beta:g}"
        if s.name == "s"
        else f"S* = ({s.alpha:g} t/T + {s.beta:g}) mod {ALPHA_M:g}"
    )
    size = f"{len(plan.scores.layers)} layers, {plan.steps} steps"
    return f"{plan.method}    {schedule}    γ = {plan.gamma:.4g}    {size}"


def _steps_axis(image: Image.Image, steps: int, height: int, pen: Pen) -> None:
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, steps) if n * height >= 14)
    pen.write(image, LEFT - 8, SUBTITLE_MIDDLE, "step", 12, FAINT, ends=True)
    for step in range(0, steps, every):
        middle = TOP + step * height + height // 2
        pen.write(image, LEFT - 8, middle, str(step), 12, FAINT, ends=True)


def _block_names(image: Image.Image, columns: Sequence[Column], cell: int, top: int, pen: Pen) -> None:
    """Each block's name, upright, under the middle of its columns; names that would overlap are left out."""
    last_right = -100
    for name, group in groupby(columns, key=lambda column: column.block):
        members = list(group)
        middle = LEFT + (members[0].left + members[-1].left + cell) // 2
        if middle - 8 < last_right:
            continue
        label = Image.new("RGB", (BLOCK_LABELS - 8, 16), PAPER)
        pen.write(label, label.width - 2, 8, name, 12, INK, ends=True)
        image.paste(label.rotate(90, expand=True), (middle - 8, top))
        last_right = middle + 8


def _shares(image: Image.Image, rows: np.ndarray, height: int, left: int, pen: Pen) -> None:
    draw = ImageDraw.Draw(image)
    pen.write(image, left, SUBTITLE_MIDDLE, "subject's share", 12, FAINT)
    for step, row in enumerate(rows):
        if (row < 0).any():
            continue
        own, other = shares(row)
        top = TOP + step * height
        right = left + round(own * SHARE_WIDTH)
        if other > 0:
            draw.rectangle(
                (left, top, left + round((own + other) * SHARE_WIDTH) - 1, top + height - 2), STYLE
            )
        if right > left:
            draw.rectangle((left, top, right - 1, top + height - 2), SUBJECT)


@dataclass(frozen=True)
class Entry:
    """One entry of the legend; `width` is the width of swatch and text together, in pixels."""

    colour: tuple[int, int, int]
    text: str
    left: int
    width: int


def _legend_entries(plan: Plan, rows: np.ndarray, subject: str, style: str, pen: Pen) -> list[Entry]:
    said = [(SUBJECT, f"subject: {subject}"), (STYLE, f"style: {style}")]
    mixed = {PAIRS[code] for code in np.unique(_codes(rows)) if code >= 0} - {(FULL, 0), (0, FULL)}
    said += [(colour_of(*pair), words_of(*pair)) for pair in sorted(mixed, reverse=True)]
    if (rows < 0).any():
        said.append((NOT_RUN, "did not run"))
    if any(layer.only for layer in plan.scores.layers):
        said.append((PAPER, "hatched: only one LoRA changes this layer"))
    entries: list[Entry] = []
    left = LEFT
    for colour, text in said:
        entries.append(Entry(colour, text, left, TEXT_LEFT + pen.width(text, 13)))
        left += entries[-1].width + ENTRY_GAP
    return entries


def _legend(image: Image.Image, entries: Sequence[Entry], middle: int, pen: Pen) -> None:
    for entry in entries:
        swatch = np.full((14, 14, 3), entry.colour, np.uint8)
        if entry.colour == PAPER:
            swatch[_hatch(14, 14)] = FAINT
        image.paste(Image.fromarray(swatch), (entry.left, middle - 7))
        pen.write(image, entry.left + TEXT_LEFT, middle, entry.text, 13, INK)


def _hatch(height: int, width: int) -> np.ndarray:
    """Where the lines of the hatching are, bool of shape (height, width)."""
    return np.add.outer(np.arange(height), np.arange(width)) % 8 < 2
