"""The independent float64 oracle's pairs: scores and γ within 1e-5, every choice the same."""

import json
from pathlib import Path

import numpy as np
import pytest

from klora.core.lora_file import read_lora
from klora.core.methods import STYLE, SUBJECT
from klora.core.plan import make_plan
from klora.core.schedule import Schedule
from klora.core.scores import score_pair

GOLDEN = sorted(
    path.parent for path in (Path(__file__).parents[1] / "data" / "golden").glob("*/expected.json")
)
EXACT = ("name", "k", "rank_subject", "rank_style", "only")
NEAR = ("subject_score", "style_score", "subject_abs_sum", "style_abs_sum")


def test_there_are_golden_pairs():
    assert len(GOLDEN) >= 17


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_pair_equals_the_oracle(folder):
    expected = json.loads((folder / "expected.json").read_text())
    scores = score_pair(read_lora(folder / "subject.safetensors"), read_lora(folder / "style.safetensors"))
    assert scores.gamma == pytest.approx(expected["gamma"], rel=1e-5)
    assert [layer.name for layer in scores.layers] == [layer["name"] for layer in expected["layers"]]
    for layer, known in zip(scores.layers, expected["layers"], strict=True):
        assert {name: getattr(layer, name) for name in EXACT} == {name: known[name] for name in EXACT}
        assert [getattr(layer, name) for name in NEAR] == pytest.approx(
            [known[name] for name in NEAR], rel=1e-5
        )
    for schedule in ("s", "s*"):
        plan = make_plan(scores, steps=expected["steps"], schedule=Schedule.named(schedule))
        subject_chosen = np.array(expected["selection"][schedule], bool)[:, :, None]
        assert (plan.strengths == np.where(subject_chosen, SUBJECT, STYLE)).all()
