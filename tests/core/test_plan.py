"""Schedule, methods and plan: method.md sections 4 and 5."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from klora.core.blocks import block_of, forward_order, leader_of
from klora.core.changes import as_changes, spans
from klora.core.methods import BOTH, FULL, METHODS, STYLE, SUBJECT
from klora.core.plan import make_plan, shares
from klora.core.schedule import Schedule
from klora.core.scores import LayerScore, PairScores


def layer(name, subject, style, only=None):
    return LayerScore(
        name=name, k=4, rank_subject=2, rank_style=2, subject_score=subject, style_score=style,
        subject_abs_sum=2 * subject, style_abs_sum=2 * style,
        subject_energy=subject**2, style_energy=style**2, only=only,
    )  # fmt: skip


def pair(*scores, gamma=1.0):
    return PairScores(tuple(layer(f"layer{i:03}", *values) for i, values in enumerate(scores)), gamma)


magnitudes = st.floats(1e-3, 1e3)
pairs = st.lists(st.tuples(magnitudes, magnitudes), min_size=1, max_size=20)
steps = st.integers(1, 60)
S, S_STAR = Schedule.named("s"), Schedule.named("s*")


def test_s_rises_from_beta_and_never_reaches_alpha_plus_beta():
    assert S.values(3).tolist() == pytest.approx([0.5, 1.0, 1.5])
    assert S.values(1).tolist() == [0.5]


def test_s_star_wraps_at_its_modulus_exactly():
    assert S_STAR.values(15)[:4].tolist() == pytest.approx([1.3, 1.4, 0.0, 0.1])


@given(pairs, steps)
def test_a_layer_switches_at_most_once_under_s_and_twice_under_s_star(scores, count):
    assert max(map(len, make_plan(pair(*scores), steps=count, schedule=S).switches())) <= 1
    assert max(map(len, make_plan(pair(*scores), steps=count, schedule=S_STAR).switches())) <= 2


@given(pairs, steps, st.integers(-20, 20))
def test_rescaling_one_lora_changes_no_choice(scores, count, exponent):
    """γ follows the magnitudes, so only the balance between layers counts. Powers of two are exact."""
    c = 2.0**exponent
    plan = make_plan(pair(*scores, gamma=1.5), steps=count, schedule=S)
    scaled = make_plan(
        pair(*((subject * c, style) for subject, style in scores), gamma=1.5 * c), steps=count, schedule=S
    )
    assert (plan.strengths == scaled.strengths).all()


@given(pairs)
def test_swapping_the_roles_mirrors_the_choice_but_for_ties(scores):
    one = Schedule("s", 0.0, 1.0)
    plan = make_plan(pair(*scores), steps=3, schedule=one).strengths
    mirrored = make_plan(
        pair(*((style, subject) for subject, style in scores)), steps=3, schedule=one
    ).strengths
    ties = np.array([subject == style for subject, style in scores])
    assert (plan[:, ~ties] == mirrored[:, ~ties][..., ::-1]).all()
    assert (plan[:, ties] == SUBJECT).all()
    assert (mirrored[:, ties] == SUBJECT).all()


@pytest.mark.parametrize("method", ["K-LoRA", "Top-K only", "Top-K with γ", "Frobenius"])
def test_a_one_sided_layer_stays_with_the_lora_that_has_it(method):
    scores = PairScores((layer("a", 0, 0, "subject"), layer("b", 0, 0, "style"), layer("c", 1, 1)), 1.0)
    plan = make_plan(scores, steps=10, schedule=S, method=method)
    assert (plan.strengths[:, 0] == SUBJECT).all()
    assert (plan.strengths[:, 1] == STYLE).all()


def test_the_ablations_and_baselines():
    scores = pair((3, 1), (1, 3), gamma=4.0)

    def letters(method, **more):
        """One text a step with a letter a layer: s of the subject, t of the style, b of both."""
        letter = {SUBJECT: "s", STYLE: "t", BOTH: "b"}
        plan = make_plan(scores, steps=4, schedule=S, method=method, **more)
        return ["".join(letter[tuple(levels)] for levels in row) for row in plan.strengths.tolist()]

    assert letters("Top-K only") == ["st"] * 4
    assert letters("Top-K with γ") == ["tt"] * 4
    assert letters("Top-K with γ", gamma="off") == ["st"] * 4
    assert letters("Top-K with γ", gamma=0.1) == ["ss"] * 4
    assert letters("Fixed") == ["ss", "ss", "tt", "tt"]
    assert letters("LoRA Switch") == ["ss", "tt", "ss", "tt"]
    assert letters("Direct merge") == ["bb"] * 4
    assert letters("Subject only") == ["ss"] * 4
    assert letters("Style only") == ["tt"] * 4
    assert letters("K-LoRA", gamma="off") == ["st"] * 4
    assert letters("Frobenius", gamma="off") == ["st"] * 4


def test_random_depends_on_the_seed_alone_and_draws_a_third_for_the_subject():
    scores = pair(*[(1, 1)] * 200)
    one, again, other = (
        make_plan(scores, steps=50, schedule=S, method="Random", seed=seed).strengths for seed in (7, 7, 8)
    )
    assert (one == again).all()
    assert (one != other).any()
    assert (one == SUBJECT).all(axis=-1).mean() == pytest.approx(1 / 3, abs=0.02)
    assert (one[0, :8, 0] // FULL).tolist() == [1, 0, 0, 0, 0, 0, 0, 1], (
        "the stream of a seed is part of the infotext's promise"
    )


@pytest.mark.parametrize("method", METHODS)
def test_json_has_the_promised_fields_and_agrees_with_the_plan(method):
    plan = make_plan(pair((3, 1), (1, 3)), steps=5, schedule=S_STAR, method=method, seed=3)
    data = plan.to_json(["careful"])
    assert set(data) == {
        "gamma", "steps", "schedule", "alpha", "beta", "method",
        "layers", "strengths", "subject_share", "warnings",
    }  # fmt: skip
    assert [set(entry) for entry in data["layers"]] == 2 * [{
        "name", "k", "rank_subject", "rank_style",
        "subject_score", "style_score", "subject_abs_sum", "style_abs_sum", "only", "switches",
    }]  # fmt: skip
    for column, entry in enumerate(data["layers"]):
        own = [row[column] for row in data["strengths"]]
        assert entry["switches"] == [t for t in range(1, 5) if own[t] != own[t - 1]]
        assert {number for pair in own for number in pair} <= {0, 1}
    assert (data["schedule"], data["alpha"], data["beta"], data["steps"]) == ("s*", 1.5, 1.3, 5)
    assert all(0 <= share <= 1 for share in data["subject_share"])


def test_half_levels_are_half_numbers_in_the_json_and_count_half_in_the_shares():
    plan = make_plan(pair((3, 1), (1, 3), (1, 1)), steps=1, schedule=S)
    levels = np.array([[[1, 2], [2, 1], [0, 0]]], np.uint8)
    data = replace(plan, strengths=levels).to_json([])
    assert data["strengths"] == [[[0.5, 1], [1, 0.5], [0, 0]]]
    assert json.dumps(data["strengths"]) == "[[[0.5, 1], [1, 0.5], [0, 0]]]"
    assert data["subject_share"] == [pytest.approx((1 / 3 + 2 / 3 + 0) / 3)]
    assert shares(levels)[0].tolist() == [pytest.approx(1 / 3)] * 2


def test_changes_say_every_layer_at_the_first_step_that_ran_and_then_what_differs():
    levels = np.array(
        [
            [(2, 0), (0, 2), (2, 0)],
            [(2, 0), (1, 2), (2, 0)],
            [(0, 2), (1, 2), (0, 2)],
            [(0, 2), (1, 2), (0, 2)],
        ],
        np.int8,
    )
    assert as_changes(levels) == {
        "steps": 4, "layers": 3, "ran": "0-3",
        "changes": [[0, [1, 0], "0,2"], [0, [0, 1], "1"], [1, [0.5, 1], "1"], [2, [0, 1], "0,2"]],
    }  # fmt: skip
    levels[[0, 2]] = -1
    assert as_changes(levels) == {
        "steps": 4, "layers": 3, "ran": "1,3",
        "changes": [[1, [1, 0], "0,2"], [1, [0.5, 1], "1"], [3, [0, 1], "0,2"]],
    }  # fmt: skip
    levels[:] = -1
    assert as_changes(levels) == {"steps": 4, "layers": 3, "ran": "", "changes": []}


def test_spans_write_rows_of_numbers_by_their_ends():
    assert spans([0, 1, 2, 3, 7, 9, 10]) == "0-3,7,9-10"
    assert spans([]) == ""


def test_blocks_are_named_and_ordered_as_the_network_runs():
    names = [
        "output_blocks.0.1.x",
        "input_blocks.10.0.x",
        "input_blocks.4.1.x",
        "middle_block.1.x",
        "time_embed.0",
    ]
    assert sorted(names, key=forward_order) == [names[i] for i in (4, 2, 1, 3, 0)]
    assert [block_of(n) for n in names] == ["up 0", "down 10", "down 4", "mid", "time"]
    assert block_of("single_blocks.37.linear1:mlp") == "single 37"


def test_a_norm_follows_its_nearest_layer():
    layers = [
        "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
        "input_blocks.4.1.transformer_blocks.1.attn1.to_q",
        "output_blocks.0.0.in_layers.2",
    ]
    assert leader_of("input_blocks.4.1.transformer_blocks.1.norm1", layers) == layers[1]
    assert leader_of("output_blocks.0.0.in_layers.0", layers) == layers[2]
