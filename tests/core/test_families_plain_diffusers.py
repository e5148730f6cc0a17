"""Names of the families in which nothing is fused, against diffusers' classes and its conversion of LoRAs."""

from __future__ import annotations

import plain_families as plain
import pytest
import torch
from safetensors.torch import load_file, save_file

from klora.core.deltas import dense
from klora.core.families import FAMILIES
from klora.core.key_names import parse_key
from klora.core.lora_file import read_lora
from klora.core.text_encoders import LLM_ADAPTER
from klora.core.topology import CONV, LINEAR, NORM

diffusers = pytest.importorskip("diffusers")
conversion = pytest.importorskip("diffusers.loaders.lora_conversion_utils")

DENOISERS = {
    "qwen": ("QwenImageTransformer2DModel", {}),
    "krea": ("Krea2Transformer2DModel", {}),
    "anima": ("CosmosTransformer3DModel", {"num_attention_heads": 16, "extra_pos_embed_type": None}),
    "wan": ("WanTransformer3DModel", {"image_dim": 1280, "added_kv_proj_dim": 5120}),
    "ernie": (
        "ErnieImageTransformer2DModel",
        {"hidden_size": 4096, "num_layers": 36, "num_attention_heads": 32},
    ),
}


def kinds_of(model):
    """{name: kind} of all modules that hold a weight; those that hold nothing but a table are no layers."""
    return {
        name: CONV if "Conv" in type(module).__name__ else NORM if "Norm" in type(module).__name__ else LINEAR
        for name, module in model.named_modules()
        if "weight" in dict(module.named_parameters(recurse=False))
    }


def on_nothing(name, settings):
    """A model of full size without numbers."""
    made = getattr(diffusers, name, None)
    if made is None:
        pytest.skip(f"this diffusers has no {name}")
    with torch.device("meta"):
        return made(**settings)


@pytest.mark.parametrize("base", DENOISERS)
def test_names_and_kinds_are_those_of_diffusers_own_transformer(base):
    model = on_nothing(*DENOISERS[base])
    assert {module.diffusers[0]: module.kind for module in FAMILIES[base].modules} == kinds_of(model)


def test_anima_s_adapter_is_diffusers_text_conditioner():
    real = kinds_of(on_nothing("AnimaTextConditioner", {}))
    assert real.pop("embed") == LINEAR
    assert {module.diffusers[0]: module.kind for module in LLM_ADAPTER.modules} == real


CONVERTED = {
    "qwen": ("_convert_non_diffusers_qwen_lora_to_diffusers", ("kohya", "native after diffusion_model.")),
    "krea": (
        "_convert_non_diffusers_krea2_lora_to_diffusers",
        ("native after diffusion_model.", "native, raw PEFT"),
    ),
    "anima": ("_convert_non_diffusers_anima_lora_to_diffusers", ("native after diffusion_model.",)),
    "wan": ("_convert_non_diffusers_wan_lora_to_diffusers", ("native after diffusion_model.",)),
}


@pytest.mark.parametrize(
    ("base", "dialect"),
    [(base, dialect) for base, (_, dialects) in CONVERTED.items() for dialect in dialects],
)
def test_a_lora_converted_by_diffusers_is_the_same_lora(tmp_path, base, dialect):
    convert = getattr(conversion, CONVERTED[base][0], None)
    if convert is None:
        pytest.skip("this diffusers does not convert it")
    path = plain.write(tmp_path / "old.safetensors", base, dialect)
    converted = {key: value.contiguous() for key, value in convert(load_file(path)).items()}
    save_file(converted, tmp_path / "new.safetensors")
    assert all(key.startswith("transformer.") for key in converted)
    old, new = read_lora(path), read_lora(tmp_path / "new.safetensors")
    assert list(old.layers) == list(new.layers)
    with old.open() as one, new.open() as other:
        assert all(
            torch.allclose(dense(one(name)), dense(other(name)), rtol=2e-3, atol=1e-4) for name in old.layers
        )


def test_musubi_tuner_s_wan_converted_by_diffusers_is_the_same_lora(tmp_path):
    """diffusers takes only whole blocks without embeddings from it."""
    wanted = ("blocks.0.self_attn", "blocks.0.cross_attn", "blocks.0.ffn")
    tensors = load_file(plain.write(tmp_path / "all.safetensors", "wan", "kohya"))
    own = {key: value for key, value in tensors.items() if key.startswith("lora_unet_blocks_0_")}
    convert = getattr(conversion, "_convert_musubi_wan_lora_to_diffusers", None)
    if convert is None:
        pytest.skip("this diffusers does not convert it")
    save_file(own, tmp_path / "old.safetensors")
    save_file(
        {key: value.contiguous() for key, value in convert(dict(own)).items()}, tmp_path / "new.safetensors"
    )
    old, new = (read_lora(tmp_path / f"{name}.safetensors") for name in ("old", "new"))
    assert list(old.layers) == list(new.layers)
    assert all(name.startswith(wanted) for name in old.layers)


@pytest.mark.parametrize("base", DENOISERS)
def test_every_name_of_a_family_means_one_place(base):
    for module in FAMILIES[base].modules:
        stems = {
            f"lora_unet_{module.native.replace('.', '_')}",
            f"diffusion_model.{module.native}",
            f"transformer.{module.diffusers[0]}",
            f"lycoris_{module.diffusers[0].replace('.', '_')}",
        }
        role = "w_norm" if module.kind == NORM else "lora_up.weight"
        meanings = [parse_key(f"{stem}.{role}", [FAMILIES[base]]) for stem in stems]
        assert [meaning.target.layers for meaning in meanings if meaning] == [(module.native,)] * len(stems)
