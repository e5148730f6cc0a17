"""Files of trainers' own libraries score as a float64 evaluation of what these say they add."""

import peft
import pytest
import torch
from test_trainer_libraries import FLUX, LYCORIS, PEFT_CONFIGS, SDXL, lycoris_file, peft_model

from klora.core.lora_file import read_lora
from klora.core.scores import score_pair


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
