"""How strengths look and what they are called, in images and in the page."""

from itertools import combinations

import numpy as np
import pytest

from klora.core.methods import FULL
from klora.core.plan import make_plan
from klora.core.schedule import Schedule
from klora.core.scores import LayerScore, PairScores
from klora.level_colours import BOTH, NEITHER, PAIRS, STYLE, SUBJECT, colour_of, words_of
from klora.selection_map import NOT_RUN, PAPER, draw_map

LEAST_DISTANCE = 20


def test_each_lora_alone_and_both_in_full_have_their_own_colours():
    assert [colour_of(FULL, 0), colour_of(0, FULL), colour_of(FULL, FULL), colour_of(0, 0)] == [
        SUBJECT,
        STYLE,
        BOTH,
        NEITHER,
    ]


def test_any_two_pairs_of_levels_can_be_told_apart_and_from_what_did_not_run():
    colours = np.array([*(colour_of(*pair) for pair in PAIRS), NOT_RUN, PAPER], float)
    assert min(np.linalg.norm(a - b) for a, b in combinations(colours, 2)) > LEAST_DISTANCE


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ((0, 0), "neither LoRA"), ((2, 0), "the subject"), ((0, 2), "the style"), ((2, 2), "both LoRAs"),
        ((1, 0), "half the subject"), ((2, 1), "the subject and half the style"),
        ((1, 1), "half of both LoRAs"),
    ],
)  # fmt: skip
def test_words(pair, words):
    assert words_of(*pair) == words


def test_a_map_has_the_colour_of_each_pair_of_levels():
    layers = tuple(
        LayerScore(f"input_blocks.{i}.1.proj_in", 4, 2, 2, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, None)
        for i in range(9)
    )
    plan = make_plan(PairScores(layers, 1.0), steps=2, schedule=Schedule.named("s"))
    drawn = np.asarray(draw_map(plan, "dog", "ink", np.array([PAIRS, PAIRS], np.int8)))
    assert all((drawn == colour_of(*pair)).all(axis=-1).sum() > 300 for pair in PAIRS)
