"""The text-encoder parts of a LoRA are applied, before the first step, if the setting says so."""

import pytest
import torch
from host import same
from safetensors import safe_open
from safetensors.torch import load_file

ENCODERS = {
    "first": {
        "sdxl": (
            "conditioner.embedders.0.transformer.text_model.encoder.layers.{}.mlp.fc1.weight",
            "lora_te1_text_model_encoder_layers_{}_mlp_fc1",
        ),
        "sd15": (
            "cond_stage_model.transformer.text_model.encoder.layers.{}.mlp.fc1.weight",
            "lora_te_text_model_encoder_layers_{}_mlp_fc1",
        ),
        "flux": (
            "text_encoders.clip_l.transformer.text_model.encoder.layers.{}.mlp.fc1.weight",
            "lora_te1_text_model_encoder_layers_{}_mlp_fc1",
        ),
    },
    "second": {
        "sdxl": (
            "conditioner.embedders.1.model.transformer.resblocks.{}.mlp.c_fc.weight",
            "lora_te2_text_model_encoder_layers_{}_mlp_fc1",
        ),
        "flux": (
            "text_encoders.t5xxl.transformer.encoder.block.{}.layer.0.SelfAttention.q.weight",
            "lora_te2_encoder_block_{}_layer_0_SelfAttention_q",
        ),
    },
}
"""CLIP-L, and OpenCLIP or T5: {base model: (weight in the checkpoint, kohya's key)}, for block {}."""


def with_part(host, encoder):
    """The subject's tensors, with its part for one text encoder.

    If it has none, low-rank pairs are added for two blocks of that encoder.
    """
    weight, stem = ENCODERS[encoder][host.base]
    prefix = stem.partition("_text")[0].partition("_encoder")[0]
    tensors = {
        key: value
        for key, value in load_file(host.file(host.subject)).items()
        if key.startswith(prefix) or not key.startswith("lora_te")
    }
    if any(key.startswith(prefix) for key in tensors):
        return tensors
    with safe_open(host.folder / "models" / "Stable-diffusion" / host.checkpoint, "pt") as checkpoint:
        for block in range(2):
            rows, columns = checkpoint.get_slice(weight.format(block)).get_shape()
            generator = torch.Generator().manual_seed(block)
            tensors[f"{stem.format(block)}.lora_down.weight"] = torch.randn(4, columns, generator=generator)
            tensors[f"{stem.format(block)}.lora_up.weight"] = torch.randn(rows, 4, generator=generator)
            tensors[f"{stem.format(block)}.alpha"] = torch.tensor(4.0)
    return tensors


@pytest.mark.parametrize("encoder", ENCODERS)
def test_they_apply_as_the_setting_says(host, encoder):
    """Each under a name of its own: Forge's own tags go on applying an earlier file of the same name."""
    if host.base not in ENCODERS[encoder]:
        pytest.skip("this base model has no such text encoder")
    name = f"klora_test_{encoder}_encoder"
    with host.more_loras(**{name: with_part(host, encoder)}):
        klora = {"subject": name, "style": host.style, "method": "Subject only"}
        tags = {"both": f"<lora:{name}:1>", "none": f"<lora:{name}:0:1>"}
        expected = {rule: host.image(prompt="a cat" + tag) for rule, tag in tags.items()}
        assert not same(expected["both"], expected["none"])
        for rule in (*tags, "both"):
            assert same(host.image({**klora, "text_encoder": rule}), expected[rule])
        images = [
            host.image({**klora, "method": "K-LoRA", "text_encoder": rule}) for rule in ("subject", "none")
        ]
        assert not same(*images)
