"""One LoRA gives one plan, in whatever dialect it is saved; and trainers' own files score as a float64 evaluation of what they add."""

import dialects
import peft
import pytest
import torch
from test_trainer_libraries import FLUX, LYCORIS, PEFT_CONFIGS, SDXL, lycoris_file, peft_model

from klora.core.lora_file import read_lora
from klora.core.plan import make_plan
from klora.core.schedule import Schedule
from klora.core.scores import score_pair

STEPS = 20


def plans(subject, style):
    scores = score_pair(subject, style)
    return [make_plan(scores, steps=STEPS, schedule=Schedule.named(name)).to_json([]) for name in ("s", "s*")]


def test_sdxl_dialects(tmp_path):
    dialect_names = list(dialects.SDXL_DIALECTS)
    style = read_lora(
        dialects.write_sdxl(tmp_path / "style.safetensors", "kohya", dialects.sdxl_factors(seed=1))
    )
    files = [
        read_lora(dialects.write_sdxl(tmp_path / f"{i}.safetensors", name, dialects.sdxl_factors()))
        for i, name in enumerate(dialect_names)
    ]
    expected = plans(files[0], style)
    assert all(plans(lora, style) == expected for lora in files[1:])
    switches = [layer["switches"] for layer in expected[0]["layers"]]
    assert any(switches), "the pair should have something to choose"


def test_flux_dialects_fused_and_split(tmp_path):
    modules = [*dialects.FLUX_BLOCKS, *dialects.FLUX_ENDS]
    factors = dialects.flux_factors(modules)
    style = read_lora(
        dialects.write_flux_split(
            tmp_path / "style.safetensors", "diffusers PEFT", modules, dialects.flux_factors(modules, seed=1)
        )
    )
    fused = [
        dialects.write_flux_fused(tmp_path / f"f{i}.safetensors", name, modules, factors)
        for i, name in enumerate(dialects.FLUX_FUSED_DIALECTS)
    ]
    split = [
        dialects.write_flux_split(tmp_path / f"s{i}.safetensors", name, modules, factors)
        for i, name in enumerate(dialects.FLUX_SPLIT_DIALECTS)
    ]
    found = [plans(read_lora(path), style) for path in [*fused, *split]]
    assert all(plan == found[0] for plan in found[1:])


def top_sum(delta, k):
    return float(delta.detach().double().abs().flatten().topk(min(k, delta.numel())).values.sum())


@pytest.mark.parametrize("modules", [SDXL, FLUX], ids=["sdxl", "flux"])
@pytest.mark.parametrize("kind", LYCORIS)
def test_a_pair_saved_by_peft_and_lycoris_scores_as_in_float64(tmp_path, kind, modules):
    model = peft_model(modules, PEFT_CONFIGS["LoRA"](list(modules)))
    model.save_pretrained(tmp_path)
    tuned = dict(model.base_model.model.named_modules())
    subject_deltas = {layer: tuned[name].get_delta_weight("default") for name, (_, layer) in modules.items()}
    style, weights = lycoris_file(tmp_path / "style.safetensors", modules, LYCORIS[kind])
    style_deltas = {layer: used.double() - original.double() for layer, (original, used) in weights.items()}
    scores = score_pair(read_lora(tmp_path / "adapter_model.safetensors"), style)
    sums = [
        sum(float(delta.detach().double().abs().sum()) for delta in deltas.values())
        for deltas in (subject_deltas, style_deltas)
    ]
    assert scores.gamma == pytest.approx(sums[0] / sums[1], rel=1e-5)
    for layer in scores.layers:
        rank = layer.rank_subject if layer.rank_style is None else layer.rank_style
        assert layer.k == min(layer.rank_subject * rank, subject_deltas[layer.name].numel())
        assert layer.subject_score == pytest.approx(top_sum(subject_deltas[layer.name], layer.k), rel=1e-5)
        assert layer.style_score == pytest.approx(top_sum(style_deltas[layer.name], layer.k), rel=1e-5)


def test_a_dora_is_scored_before_its_magnitude(tmp_path):
    model = peft_model(SDXL, peft.LoraConfig(r=4, lora_alpha=4, target_modules=list(SDXL), use_dora=True))
    model.save_pretrained(tmp_path)
    tuned = dict(model.base_model.model.named_modules())
    lora = read_lora(tmp_path / "adapter_model.safetensors")
    with torch.no_grad():
        for layer in score_pair(lora, lora).layers:
            name = next(name for name, (_, canonical) in SDXL.items() if canonical == layer.name)
            assert layer.subject_score == pytest.approx(
                top_sum(tuned[name].get_delta_weight("default"), 16), rel=1e-5
            )
