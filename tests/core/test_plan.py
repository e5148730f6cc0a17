"""Schedule, selectors and plan: method.md sections 4 and 5."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from klora.core.blocks import block_of, forward_order, leader_of
from klora.core.plan import make_plan
from klora.core.schedule import Schedule
from klora.core.scores import LayerScore, PairScores
from klora.core.selectors import SELECTORS, Choice


def layer(name, subject, style, only=None):
    return LayerScore(
        name=name, k=4, rank_subject=2, rank_style=2, subject_score=subject, style_score=style, subject_abs_sum=2 * subject,
        style_abs_sum=2 * style, subject_frobenius=subject**2, style_frobenius=style**2, only=only,
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
    """γ follows the magnitudes, so only the balance between layers counts. A power of two keeps the floats exact."""
    c = 2.0**exponent
    plan = make_plan(pair(*scores, gamma=1.5), steps=count, schedule=S)
    scaled = make_plan(
        pair(*((subject * c, style) for subject, style in scores), gamma=1.5 * c), steps=count, schedule=S
    )
    assert (plan.selection == scaled.selection).all()


@given(pairs)
def test_swapping_the_roles_mirrors_the_choice_but_for_ties(scores):
    one = Schedule("s", 0.0, 1.0)
    plan = make_plan(pair(*scores), steps=3, schedule=one).selection
    mirrored = make_plan(
        pair(*((style, subject) for subject, style in scores)), steps=3, schedule=one
    ).selection
    ties = np.array([subject == style for subject, style in scores])
    assert (plan[:, ~ties] == 1 - mirrored[:, ~ties]).all()
    assert (plan[:, ties] == Choice.SUBJECT).all()
    assert (mirrored[:, ties] == Choice.SUBJECT).all()


@pytest.mark.parametrize("selector", ["K-LoRA", "Top-K only", "Top-K with γ", "Frobenius"])
def test_a_one_sided_layer_stays_with_the_lora_that_has_it(selector):
    scores = PairScores((layer("a", 0, 0, "subject"), layer("b", 0, 0, "style"), layer("c", 1, 1)), 1.0)
    plan = make_plan(scores, steps=10, schedule=S, selector=selector)
    assert (plan.selection[:, 0] == Choice.SUBJECT).all()
    assert (plan.selection[:, 1] == Choice.STYLE).all()


def test_the_ablations_and_baselines():
    scores = pair((3, 1), (1, 3), gamma=4.0)

    def choose(selector, **more):
        return make_plan(scores, steps=4, schedule=S, selector=selector, **more).selection.tolist()

    assert choose("Top-K only") == [[1, 0]] * 4
    assert choose("Top-K with γ") == [[0, 0]] * 4
    assert choose("Top-K with γ", gamma="off") == [[1, 0]] * 4
    assert choose("Top-K with γ", gamma=0.1) == [[1, 1]] * 4
    assert choose("Fixed") == [[1, 1], [1, 1], [0, 0], [0, 0]]
    assert choose("LoRA Switch") == [[1, 1], [0, 0], [1, 1], [0, 0]]
    assert choose("Direct merge") == [[2, 2]] * 4
    assert choose("Subject only") == [[1, 1]] * 4
    assert choose("Style only") == [[0, 0]] * 4
    assert choose("K-LoRA", gamma="off") == [[1, 0], [1, 0], [1, 0], [1, 0]]
    assert choose("Frobenius", gamma="off") == [[1, 0]] * 4


def test_random_depends_on_the_seed_alone_and_draws_a_third_for_the_subject():
    scores = pair(*[(1, 1)] * 200)
    one, again, other = (
        make_plan(scores, steps=50, schedule=S, selector="Random", seed=seed).selection for seed in (7, 7, 8)
    )
    assert (one == again).all()
    assert (one != other).any()
    assert one.mean() == pytest.approx(1 / 3, abs=0.02)
    assert one[0, :8].tolist() == [1, 0, 0, 0, 0, 0, 0, 1], (
        "the stream of a seed is part of the infotext's promise"
    )


@pytest.mark.parametrize("selector", SELECTORS)
def test_json_has_the_promised_fields_and_agrees_with_the_plan(selector):
    plan = make_plan(pair((3, 1), (1, 3)), steps=5, schedule=S_STAR, selector=selector, seed=3)
    data = plan.to_json(["careful"])
    assert set(data) == {
        "gamma", "steps", "schedule", "alpha", "beta", "selector", "layers", "selection", "subject_share", "warnings",
    }  # fmt: skip
    assert [set(entry) for entry in data["layers"]] == 2 * [{
        "name", "k", "rank_subject", "rank_style", "subject_score", "style_score", "subject_abs_sum", "style_abs_sum", "only", "switches",
    }]  # fmt: skip
    for column, entry in enumerate(data["layers"]):
        choices = [row[column] for row in data["selection"]]
        assert entry["switches"] == [t for t in range(1, 5) if choices[t] != choices[t - 1]]
    assert (data["schedule"], data["alpha"], data["beta"], data["steps"]) == ("s*", 1.5, 1.3, 5)
    assert all(0 <= share <= 1 for share in data["subject_share"])


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
