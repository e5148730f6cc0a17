"""`python -m klora`: what a person types and what comes back."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from klora.__main__ import main

GOLDEN = Path(__file__).parent / "data" / "golden"
PAIR = [str(GOLDEN / "sdxl_layers_missing" / name) for name in ("subject.safetensors", "style.safetensors")]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KLORA_CACHE", str(tmp_path / "cache"))


def test_analyze_reports_and_writes_json_and_map(tmp_path, capsys):
    plan, drawn = tmp_path / "plan.json", tmp_path / "map.png"
    assert main(["analyze", *PAIR, "--steps", "30", "--json", str(plan), "--map", str(drawn)]) == 0
    report = capsys.readouterr().out
    for words in (
        "kohya keys",
        "raw PEFT keys",
        "16 layers shared, 16 only in the subject, 32 only in the style",
        "gamma 3.00",
        "subject's share",
    ):
        assert words in report
    expected = json.loads((GOLDEN / "sdxl_layers_missing" / "expected.json").read_text())
    strengths = [[[1, 0] if choice else [0, 1] for choice in row] for row in expected["selection"]["s"]]
    assert json.loads(plan.read_text())["strengths"] == strengths
    with Image.open(drawn) as image:
        assert image.width > 800


def test_analyze_writes_only_json_to_standard_output(capsys):
    assert (
        main(
            [
                "analyze",
                *PAIR,
                "--json",
                "-",
                "--schedule",
                "s*",
                "--steps",
                "7",
                "--method",
                "top-k with gamma",
            ]
        )
        == 0
    )
    data = json.loads(capsys.readouterr().out)
    assert (data["steps"], data["schedule"], data["beta"], data["method"]) == (7, "s*", 1.3, "Top-K with γ")


FAULTS = [
    (["--method", "klora"], "did you mean 'K-LoRA'?"),
    (["--alpha", "nan"], "'alpha' (α) must be a number from -100 to 100"),
    (["--gamma", "high"], "auto or off or a number"),
    (["--map", "/nowhere/map.png"], "Cannot write"),
]


@pytest.mark.parametrize(("options", "sentence"), FAULTS)
def test_a_wrong_option_gets_one_sentence(options, sentence, capsys):
    assert main(["analyze", *PAIR, *options]) == 1
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error


def test_a_pair_of_different_bases_is_refused_by_name(capsys):
    flux = GOLDEN / "flux_fused_split" / "style.safetensors"
    assert main(["analyze", PAIR[0], str(flux)]) == 1
    assert (
        "subject.safetensors is made for SDXL but the style LoRA style.safetensors for FLUX"
        in capsys.readouterr().err
    )


def test_a_missing_file_is_named(capsys):
    assert main(["analyze", "no-such.safetensors", PAIR[1]]) == 1
    assert "no-such.safetensors" in capsys.readouterr().err


def test_a_second_analysis_comes_from_the_cache(monkeypatch, capsys):
    main(["analyze", *PAIR, "--json", "-"])
    first = capsys.readouterr().out
    monkeypatch.setattr("klora.core.topk._scan", lambda *_: pytest.fail("scored again"))
    main(["analyze", *PAIR, "--json", "-"])
    assert capsys.readouterr().out == first


def test_generate_makes_an_image_from_a_saved_model_and_says_what_is_missing(tmp_path, capsys):
    pytest.importorskip("diffusers")
    from small_pipelines import sdxl_pipeline, write_kohya, write_peft

    pipeline = sdxl_pipeline()
    model, subject, style, out = (
        tmp_path / name for name in ("model", "subject.safetensors", "style.safetensors", "out/image.png")
    )
    pipeline.save_pretrained(model)
    write_kohya(subject, pipeline.unet, base="sdxl", rank=2, network_alpha=1, seed=1, strength=0.5)
    write_peft(style, pipeline.unet, base="sdxl", rank=2, seed=2, strength=0.5)
    options = [
        "--subject",
        str(subject),
        "--style",
        str(style),
        "--prompt",
        "a cat",
        "--steps",
        "2",
        "--size",
        "64x64",
    ]
    options += ["--beta", "0.9", "--out", str(out)]
    assert main(["generate", "--model", str(model), *options]) == 0
    with Image.open(out) as image:
        assert image.size == (64, 64)
        assert image.text["parameters"] == (
            "a cat\nSteps: 2, Seed: 0, Size: 64x64, K-LoRA subject: subject, K-LoRA style: style, K-LoRA "
            "beta: 0.9"
        )
    assert main(["generate", "--model", str(model), *options, "--scheduler", "NoSuchScheduler"]) == 1
    assert "no scheduler 'NoSuchScheduler'" in capsys.readouterr().err
    shutil.rmtree(model)
    assert main(["generate", "--model", str(model), *options]) == 1
    assert "There is no model at" in capsys.readouterr().err


def test_generate_opens_a_single_file_as_the_base_model_of_the_loras(tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    from small_pipelines import sd15_pipeline, write_kohya, write_peft

    pipeline, opened = sd15_pipeline(), []

    def from_single_file(path, **settings):
        opened.append((Path(path).name, settings["config"]))
        return pipeline

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_single_file", from_single_file)
    model, subject, style, out = (
        tmp_path / name for name in ("any.safetensors", "subject.safetensors", "style.safetensors", "a.png")
    )
    model.touch()
    write_kohya(subject, pipeline.unet, base="sd15", rank=2, network_alpha=1, seed=1, strength=0.5)
    write_peft(style, pipeline.unet, base="sd15", rank=2, seed=2, strength=0.5)
    options = ["--subject", str(subject), "--style", str(style), "--prompt", "a cat", "--steps", "1"]
    options += ["--model", str(model), "--config", "the/config", "--out", str(out)]
    assert main(["generate", *options]) == 0
    assert opened == [("any.safetensors", "the/config")]
    with Image.open(out) as image:
        assert image.size == (512, 512)


def test_generate_says_of_which_base_model_there_are_no_single_files(tmp_path, capsys):
    pytest.importorskip("diffusers")
    (tmp_path / "flux.safetensors").touch()
    pair = [str(GOLDEN / "flux_fused_split" / f"{role}.safetensors") for role in ("subject", "style")]
    options = ["--subject", pair[0], "--style", pair[1], "--prompt", "a cat", "--out", "never.png"]
    assert main(["generate", "--model", str(tmp_path / "flux.safetensors"), *options]) == 1
    said = capsys.readouterr().err
    assert "The LoRAs are for FLUX, which is opened from a diffusers folder, not from one file" in said


def test_generate_refuses_loras_of_other_sizes_before_it_scores(monkeypatch, capsys):
    pytest.importorskip("diffusers")
    from small_pipelines import sdxl_pipeline

    from klora import runner

    monkeypatch.setattr(runner, "load_pipeline", lambda *_: sdxl_pipeline())
    monkeypatch.setattr(runner, "analyze", lambda *_, **__: pytest.fail("it scores"))
    options = ["--subject", PAIR[0], "--style", PAIR[1], "--prompt", "a cat", "--out", "never.png"]
    assert main(["generate", "--model", "tiny", *options]) == 1
    assert "The LoRA subject.safetensors does not fit the model: its layer " in capsys.readouterr().err
