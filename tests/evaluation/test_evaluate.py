"""`python -m klora evaluate` and `demo`, on a miniature that has learnt nothing."""

import json
from dataclasses import replace

import numpy as np
import pytest
import untrained as untrained_miniature
from PIL import Image

from evaluation import evaluate, image_metrics, tables
from evaluation.miniature import shipped
from klora.__main__ import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("untrained") / "miniature"
    untrained_miniature.make(made)
    return made


@pytest.fixture
def untrained(folder, monkeypatch):
    monkeypatch.setattr(shipped, "FOLDER", folder)


QUICK = ["--seeds", "2", "--steps", "2", "--pairs", "1"]


def test_every_method_is_measured_and_reported_in_one_file(untrained, tmp_path, capsys):
    assert main(["evaluate", "--out", str(tmp_path), *QUICK, "--tables", "methods"]) == 0
    printed = capsys.readouterr().out
    rows = [
        json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    ]
    assert len(rows) == 2 * len(evaluate.variants(["methods"]))
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    for variant in evaluate.variants(["methods"]):
        assert variant.label in printed
        assert variant.label in report
    assert "src='data:image/png;base64," in report
    assert not [word for word in ("http://", "https://", "src='/", 'src="') if word in report]


def test_a_stopped_evaluation_goes_on_and_one_of_other_conditions_is_refused(
    untrained, tmp_path, capsys, monkeypatch
):
    rows = tmp_path / "rows.jsonl"
    assert main(["evaluate", "--out", str(tmp_path), *QUICK, "--tables", "order"]) == 0
    whole = rows.read_text(encoding="utf-8")
    kept = whole.splitlines(keepends=True)[:-2]
    rows.write_text("".join(kept), encoding="utf-8")
    made = []
    real = evaluate.fused_images
    monkeypatch.setattr(evaluate, "fused_images", lambda *arguments: made.append(1) or real(*arguments))
    assert main(["evaluate", "--out", str(tmp_path), *QUICK, "--tables", "order"]) == 0
    assert len(made) == 1
    assert rows.read_text(encoding="utf-8") == whole
    assert main(["evaluate", "--out", str(tmp_path), *QUICK, "--tables", "order", "--guidance", "5"]) == 1
    assert "choose another --out" in capsys.readouterr().err


def test_one_lora_on_a_share_of_the_layers_leaves_the_others_to_the_base_model(untrained):
    pair = evaluate.miniature_pairs(1)[0]
    plan = evaluate.analyze(pair.subject, pair.style, evaluate.Settings(), steps=40).plan
    by_label = {variant.label: variant for variant in evaluate.variants(["style-alone"])}
    quarter = by_label["25% of the layers"]
    assert quarter.settings.subject_weight == 0
    assert 1 - quarter.changed(plan, 3).subject_share.mean() == pytest.approx(0.25, abs=0.03)
    late = by_label["second half of the steps"].changed(plan, 0)
    assert late.subject_share.tolist() == [1.0] * 20 + [0.0] * 20


def test_the_interval_of_a_mean_is_as_broad_as_pairs_differ():
    like = tables.mean_over_pairs({str(pair): [0.5, 0.6] * 5 for pair in range(9)})
    unlike = tables.mean_over_pairs({str(pair): [pair / 8] * 10 for pair in range(9)})
    assert like.value == pytest.approx(0.55)
    assert 0.5 < like.low < 0.55 < like.high < 0.6
    assert unlike.value == pytest.approx(0.5)
    assert unlike.high - unlike.low == pytest.approx(2 * 1.96 * np.std(np.arange(9) / 8) / 3, rel=0.1)


def test_both_is_nothing_where_one_is_missing():
    row = tables.Row("methods", "K-LoRA S", "a b", 0, 1.0, 0.5, {"subject": 0.9, "style": 0.0})
    assert row.both == 0
    assert replace(row, values={"subject": 0.5, "style": 1.0}).both == pytest.approx(2 / 3)


def test_gram_statistics_tell_texture_and_colour_at_any_size():
    rng = np.random.default_rng(0)
    lines = np.tile(np.repeat([[0], [255]], 4, 0), (16, 96)).astype(np.uint8)
    horizontal, vertical = (Image.fromarray(values).convert("RGB") for values in (lines[:96], lines[:96].T))
    noise = Image.fromarray(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8))
    like = image_metrics.gram([horizontal])
    same, turned, other = like([horizontal.crop((0, 0, 80, 64)), vertical, noise])
    assert same > 0.95 > turned > other


def test_an_image_model_of_the_users_own_measures_real_pairs(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=8,
    )
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(tmp_path)
    size = {"shortest_edge": 32}
    transformers.CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32}).save_pretrained(
        tmp_path
    )
    images = [Image.new("RGB", (40, 50), colour) for colour in ("red", "blue")]
    values = image_metrics.clip_similarity(tmp_path, images[:1])(images)
    assert values[0] == pytest.approx(1, abs=1e-5)
    assert values[1] < values[0]


def test_what_an_evaluation_of_ones_own_pair_needs_is_named(tmp_path, capsys):
    assert (
        main(["evaluate", "--model", str(tmp_path), "--subject", "a.safetensors", "--clip", str(tmp_path)])
        == 1
    )
    assert "also needs --style, --prompt, --subject-images, --style-images." in capsys.readouterr().err


def test_a_demo_shows_images_maps_and_a_table(untrained, tmp_path, monkeypatch, capsys):
    from evaluation import demo

    monkeypatch.setattr(demo, "PAIRS", 1)
    monkeypatch.setattr(demo, "SEEDS", 2)
    monkeypatch.setattr(demo, "STEPS", 3)
    assert main(["demo", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "table.txt").read_text(encoding="utf-8")
    assert all(method in text for method in demo.METHODS)
    for name in (
        "cat_blueprint_images.png",
        "cat_blueprint_map_s.png",
        "cat_blueprint_map_sstar.png",
        "report.html",
    ):
        assert (tmp_path / name).stat().st_size > 1000
