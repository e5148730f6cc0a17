"""Where the text of drawn images stands, in Pillow's scalable font and in its bitmap font."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from klora.core.blocks import block_of, forward_order
from klora.core.plan import make_plan
from klora.core.schedule import Schedule
from klora.core.scores import LayerScore, PairScores
from klora.core.topology import flux_modules, sdxl_modules
from klora.lettering import Pen, own_font
from klora.level_colours import BOTH
from klora.selection_map import (
    BLOCK_LABELS,
    GAP,
    INK,
    LEFT,
    MARGIN,
    NOT_RUN,
    PAPER,
    STYLE,
    SUBJECT,
    TOP,
    draw_map,
)

FONTS = {"own": own_font}
if bitmap := getattr(ImageFont, "load_default_imagefont", None):
    FONTS["bitmap"] = lambda _size: bitmap()
LAYERS = {
    "SDXL": [module.native for module in sdxl_modules() if ".attn" in module.native],
    "FLUX": [
        module.native for module in flux_modules() if "_blocks." in module.native and module.kind == "linear"
    ],
    "few": ["input_blocks.4.1.proj_in", "middle_block.1.proj_in", "output_blocks.11.1.proj_in"],
}


@pytest.fixture(params=FONTS)
def fonts(request):
    return FONTS[request.param]


@pytest.fixture(params=LAYERS)
def layers(request):
    return LAYERS[request.param]


def plan_of(layers, steps, **settings):
    scores = [
        LayerScore(name, 4, 2, 2, 1.0 + i % 7 / 7, 1.5, 1.0, 1.0, 1.0, 1.0, None)
        for i, name in enumerate(sorted(layers))
    ]
    pair = PairScores(tuple(scores), 1.0)
    return make_plan(pair, steps=steps, schedule=Schedule.named("s"), **settings)


def drawn(layers, steps, fonts, subject="dog", style="ink", **more):
    return np.asarray(draw_map(plan_of(layers, steps), subject, style, fonts=fonts, **more)).astype(int)


def inked(pixels):
    """Where something stands that is not paper."""
    return (pixels != PAPER).any(-1)


def ends(flags):
    """First and last place, or None."""
    places = np.flatnonzero(flags)
    return (int(places[0]), int(places[-1])) if len(places) else None


def map_of(pixels, steps):
    """(right edge, bottom edge) of the map."""
    row = (pixels[TOP, LEFT:] == PAPER).all(-1)
    blank = next(i for i in range(len(row)) if row[i : i + GAP + 1].all())
    return LEFT + blank, TOP + max(3, min(24, 420 // steps)) * steps


@pytest.mark.parametrize("steps", [1, 4, 30, 150])
def test_each_step_number_is_level_with_its_row_and_left_of_the_map(fonts, layers, steps):
    pixels = drawn(layers, steps, fonts)
    height = max(3, min(24, 420 // steps))
    every = -(-14 // height) if height > 7 else 5
    gutter = inked(pixels[:, :LEFT])
    for step in range(0, steps, every):
        middle = TOP + step * height + height / 2
        top, bottom = ends(gutter[round(middle) - 7 : round(middle) + 7].any(1))
        assert abs(round(middle) - 7 + (top + bottom + 1) / 2 - middle) <= 1.5
    left, right = ends(gutter[TOP - 4 :].any(0))
    assert left >= 8
    assert LEFT - 12 <= right <= LEFT - 6


@pytest.mark.parametrize("steps", [4, 150])
def test_nothing_is_written_over_the_map(fonts, layers, steps):
    pixels = drawn(layers, steps, fonts)
    right, bottom = map_of(pixels, steps)
    colours = {tuple(colour) for colour in pixels[TOP:bottom, LEFT:right].reshape(-1, 3)}
    assert colours <= {PAPER, SUBJECT, STYLE, BOTH, NOT_RUN}


def blocks_of(layers):
    """[(first column, columns)] of each block, in the order of the network."""
    names = [block_of(layer) for layer in sorted(layers, key=forward_order)]
    cell, left, found = max(1, min(16, 1400 // len(layers))), LEFT, []
    for name in dict.fromkeys(names):
        found.append((left, names.count(name) * cell))
        left += names.count(name) * cell + GAP
    return found


def test_each_blocks_name_stands_under_the_middle_of_its_columns(fonts, layers):
    pixels = drawn(layers, 4, fonts)
    _, bottom = map_of(pixels, 4)
    below = inked(pixels[bottom : bottom + BLOCK_LABELS])
    last = -100
    for left, width in blocks_of(layers):
        middle = left + width // 2
        if middle - 8 < last:
            continue
        last = middle + 8
        name = below[:, middle - 8 : middle + 8]
        top, end = ends(name.any(1))
        assert 6 <= top <= 12
        assert top + 15 < end < BLOCK_LABELS - 1
        first, final = ends(name.any(0))
        assert abs((first + final + 1) / 2 - 8) <= 2.5
        assert final - first >= 5


def test_each_text_of_the_legend_stands_beside_its_colour(fonts, layers):
    pixels = drawn(layers, 4, fonts)
    legend = pixels[map_of(pixels, 4)[1] + BLOCK_LABELS :]
    for colour in (SUBJECT, STYLE):
        swatch = (legend == colour).all(-1)
        top, bottom = ends(swatch.any(1))
        left, right = ends(swatch.any(0))
        assert (bottom - top, right - left) == (13, 13)
        text = (legend[:, right + 4 : right + 40] == INK).all(-1)
        assert text.any()
        first, last = ends(text.any(1))
        assert top - 2 <= first < last <= bottom + 3


LONG = "a_name_as_long_as_those_that_trainers_and_sites_give_their_files_v1.0-000010"


@pytest.mark.parametrize("name", ["dog", LONG, "水彩画" * 30], ids=["short", "long", "of other letters"])
def test_no_text_runs_off_the_image_or_into_another(fonts, layers, name):
    pixels = drawn(layers, 30, fonts, name, name, note="as applied in the hires pass")
    everything = inked(pixels)
    assert not everything[:, -MARGIN:].any()
    assert not everything[:4].any()
    assert not everything[-4:].any()
    beside = map_of(pixels, 30)[0]
    shares = beside + ends(inked(pixels[TOP : TOP + 1, beside:])[0])[0]
    above = everything[34:TOP, LEFT:].any(0)
    assert not above[shares - LEFT - 16 : shares - LEFT].any()
    assert above[shares - LEFT : shares - LEFT + 4].any()


def test_names_that_differ_at_their_end_only_do_so_in_the_image(fonts):
    one, other = (drawn(LAYERS["few"], 4, fonts, LONG[:-2] + end) for end in ("10", "20"))
    assert one.shape == other.shape
    assert (one != other).any()


@pytest.mark.parametrize(
    "name", ["水彩", "Café", "Ångström", "γ·α", "a\nb\tc", "\udce9", "😀", "\x00", "が한½", "…—’", ""]
)
def test_names_in_any_letters_are_drawn(fonts, name):
    pixels = drawn(LAYERS["few"], 4, fonts, name, name)
    assert not inked(pixels)[:, -MARGIN:].any()


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("Top-K with γ", {"Top-K with γ", "Top-K with gamma"}),
        ("Café", {"Café", "Cafe"}),
        ("Cafe\u0301", {"Café", "Cafe"}),
        ("水彩 dog", {"水彩 dog", "?? dog"}),
        ("a\nb\udce9", {"a?b?"}),
        ("K-LoRA S*, 100 %", {"K-LoRA S*, 100 %"}),
    ],
)
def test_what_the_font_lacks_is_spelled_or_asked_for(fonts, text, allowed):
    assert Pen(fonts).writable(text) in allowed


@pytest.mark.parametrize("size", [12, 13, 18])
def test_a_line_stands_at_its_middle_from_its_start_or_to_its_end(fonts, size):
    for text, at_end in (("08", False), ("08", True), ("subject: dog", True)):
        image = Image.new("RGB", (200, 60), PAPER)
        Pen(fonts).write(image, 100, 30, text, size, INK, ends=at_end)
        pixels = inked(np.asarray(image))
        left, right = ends(pixels.any(0))
        assert 97 <= right <= 100 if at_end else 100 <= left <= 102
        if text == "08":
            top, bottom = ends(pixels.any(1))
            assert abs((top + bottom + 1) / 2 - 30) <= 1
