"""The selection map (K-LoRA fig. 6): steps down, layers across, blue where the subject is applied and green where the style is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from klora.core.blocks import block_of, forward_order
from klora.core.plan import Plan
from klora.core.schedule import ALPHA_M
from klora.core.selectors import Choice

SUBJECT, STYLE, BOTH, NOT_RUN = (31, 95, 191), (124, 205, 108), (226, 164, 60), (232, 232, 232)
"""Told apart by lightness as well as by hue, so that colour-blind people can."""
INK, FAINT, PAPER = (40, 40, 40), (150, 150, 150), (255, 255, 255)

LEFT, TOP, GAP, SHARE_WIDTH, SHARE_LEFT = 64, 58, 3, 120, 24
MAP_WIDTH, ROWS_HEIGHT, BLOCK_LABELS = 1400, 420, 74


@dataclass(frozen=True)
class Column:
    """One layer in the picture: where it is in the selection, where it is drawn, and whether one LoRA has it alone."""

    index: int
    left: int
    one_sided: bool
    block: str


def draw_map(
    plan: Plan, subject: str, style: str, selection: np.ndarray | None = None, note: str = ""
) -> Image.Image:
    """The selection map of a plan, or of what was really applied.

    Args:
        subject, style: names for the legend.
        selection: recorded rows instead of the plan's, int of shape (steps, layers); -1 where a step did not run.
        note: what the title says beside the names.
    """
    rows = plan.selection.astype(np.int16) if selection is None else selection
    columns, cell = _columns(plan)
    height = max(3, min(24, ROWS_HEIGHT // len(rows)))
    width = columns[-1].left + cell
    image = Image.new(
        "RGB",
        (LEFT + width + SHARE_LEFT + SHARE_WIDTH + 16, TOP + height * len(rows) + BLOCK_LABELS + 40),
        PAPER,
    )
    image.paste(Image.fromarray(_cells(rows, columns, cell, height, width)), (LEFT, TOP))
    draw = ImageDraw.Draw(image)
    _title(draw, plan, f"{subject} in the style of {style}{', ' * bool(note)}{note}")
    _steps_axis(draw, len(rows), height)
    _block_names(image, columns, cell, TOP + height * len(rows) + 6)
    _shares(draw, rows, height, LEFT + width + SHARE_LEFT)
    _legend(image, plan, rows, subject, style)
    return image


def stacked(maps: Sequence[Image.Image]) -> Image.Image:
    """Several maps as one picture, one below the other."""
    image = Image.new("RGB", (max(part.width for part in maps), sum(part.height for part in maps)), PAPER)
    top = 0
    for part in maps:
        image.paste(part, (0, top))
        top += part.height
    return image


def _columns(plan: Plan) -> tuple[list[Column], int]:
    """Layers in the order of the network with a gap between blocks, and the width of one in pixels."""
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
    """The map itself, uint8 of shape (steps * height, width, 3); one-sided layers are hatched where they ran."""
    colours = np.array([STYLE, SUBJECT, BOTH, NOT_RUN], np.uint8)
    pixels = np.full((len(rows) * height, width, 3), PAPER, np.uint8)
    hatch = _hatch(*pixels.shape[:2])
    hatch[np.repeat((rows < 0).any(axis=1), height)] = False
    for column in columns:
        span = slice(column.left, column.left + cell)
        pixels[:, span] = np.repeat(colours[rows[:, column.index]], height, axis=0)[:, None]
        if column.one_sided:
            pixels[:, span][hatch[:, span]] = PAPER
    return pixels


def _title(draw: ImageDraw.ImageDraw, plan: Plan, title: str) -> None:
    s = plan.schedule
    draw.text((LEFT, 10), plain(title), INK, font(18))
    schedule = (
        f"S = {s.alpha:g} t/T + {s.beta:g}"
        if s.name == "s"
        else f"S* = ({s.alpha:g} t/T + {s.beta:g}) mod {ALPHA_M:g}"
    )
    text = f"{plan.selector}    {schedule}    gamma = {plan.gamma:.4g}    {len(plan.scores.layers)} layers, {plan.steps} steps"
    draw.text((LEFT, 34), plain(text), INK, font(13))


def _steps_axis(draw: ImageDraw.ImageDraw, steps: int, height: int) -> None:
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, steps) if n * height >= 14)
    for step in range(0, steps, every):
        draw.text((LEFT - 8, TOP + step * height + height // 2), str(step), FAINT, font(12), anchor="rm")
    draw.text((8, 34), "step", FAINT, font(12))


def _block_names(image: Image.Image, columns: Sequence[Column], cell: int, top: int) -> None:
    """Each block's name, upright, under the middle of its columns; names that would overlap are left out."""
    last_right = -100
    for name, group in groupby(columns, key=lambda column: column.block):
        members = list(group)
        middle = LEFT + (members[0].left + members[-1].left + cell) // 2
        if middle - 8 < last_right:
            continue
        label = Image.new("RGB", (BLOCK_LABELS - 8, 16), PAPER)
        ImageDraw.Draw(label).text((label.width - 2, 8), name, INK, font(12), anchor="rm")
        image.paste(label.rotate(90, expand=True), (middle - 8, top))
        last_right = middle + 8


def _shares(draw: ImageDraw.ImageDraw, rows: np.ndarray, height: int, left: int) -> None:
    draw.text((left, 34), "subject's share", FAINT, font(12))
    for step, row in enumerate(rows):
        if (row < 0).any():
            continue
        share = float(np.select([row == Choice.SUBJECT, row == Choice.BOTH], [1.0, 0.5], 0.0).mean())
        top = TOP + step * height
        right = left + round(share * SHARE_WIDTH)
        draw.rectangle((left, top, left + SHARE_WIDTH, top + height - 2), STYLE)
        if right > left:
            draw.rectangle((left, top, right, top + height - 2), SUBJECT)


def _legend(image: Image.Image, plan: Plan, rows: np.ndarray, subject: str, style: str) -> None:
    draw, left, top = ImageDraw.Draw(image), LEFT, image.height - 28
    entries = [(SUBJECT, f"subject: {subject}"), (STYLE, f"style: {style}")]
    if (plan.selection == Choice.BOTH).any():
        entries.append((BOTH, "both"))
    if (rows < 0).any():
        entries.append((NOT_RUN, "did not run"))
    if any(layer.only for layer in plan.scores.layers):
        entries.append((PAPER, "hatched: only one LoRA changes this layer"))
    for colour, text in entries:
        swatch = np.full((14, 14, 3), colour, np.uint8)
        if colour == PAPER:
            swatch[_hatch(14, 14)] = FAINT
        image.paste(Image.fromarray(swatch), (left, top))
        draw.text((left + 20, top + 7), plain(text), INK, font(13), anchor="lm")
        left += int(draw.textlength(plain(text), font(13))) + 48


def _hatch(height: int, width: int) -> np.ndarray:
    """Where a one-sided layer is struck through, bool of shape (height, width)."""
    return np.add.outer(np.arange(height), np.arange(width)) % 8 < 2


def plain(text: str) -> str:
    """Text as Pillow's own font can write it."""
    return text.replace("γ", "gamma").encode("latin-1", "replace").decode("latin-1")


def font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's own font; before 10.1 it has one size only."""
    try:
        return ImageFont.load_default(size)
    except TypeError:
        return ImageFont.load_default()
