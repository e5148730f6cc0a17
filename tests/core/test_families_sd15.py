"""SD 1.5: names against the real network, one LoRA in every dialect, and files that SDXL's names fit too."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import dialects
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from klora.analysis import analyze
from klora.core.deltas import dense
from klora.core.families import FAMILIES, of_checkpoint, of_pipeline
from klora.core.families.sd15 import SD15, sd15_modules
from klora.core.families.sdxl import sdxl_modules
from klora.core.lora_file import read_lora
from klora.core.rewrite import is_in, rewrite
from klora.core.topology import CONV, LINEAR, NORM, Module
from klora.errors import LoraFileError
from klora.settings import Settings

UNETS = {
    "sdxl": (
        sdxl_modules,
        {
            "block_out_channels": (4, 8, 16),
            "attention_head_dim": (1, 2, 4),
            "transformer_layers_per_block": (1, 2, 10),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 32,
        },
    ),
    "sd15": (sd15_modules, {"block_out_channels": (4, 8, 16, 16), "attention_head_dim": 1}),
}


def real_unet(base: str) -> torch.nn.Module:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.UNet2DConditionModel(norm_num_groups=2, cross_attention_dim=8, **UNETS[base][1])


def test_its_names_and_kinds_are_those_of_diffusers_own_unet() -> None:
    kinds = {"Linear": LINEAR, "Conv2d": CONV, "GroupNorm": NORM, "LayerNorm": NORM}
    real = {
        name: kinds[type(module).__name__]
        for name, module in real_unet("sd15").named_modules()
        if any(True for _ in module.parameters(recurse=False))
    }
    assert {module.diffusers[0]: module.kind for module in sd15_modules()} == real


@pytest.mark.parametrize("base", UNETS)
def test_native_names_are_those_that_diffusers_converts(base: str) -> None:
    """Of a checkpoint in native names, each weight a number of its own, diffusers makes one in its names."""
    utilities = pytest.importorskip("diffusers.loaders.single_file_utils")
    modules = list(UNETS[base][0]())
    checkpoint = {
        f"model.diffusion_model.{module.native}.{kind}": torch.tensor(float(number))
        for number, module in enumerate(modules)
        for kind in ("weight", "bias")
    }
    converted = utilities.convert_ldm_unet_checkpoint(checkpoint, dict(real_unet(base).config))
    assert {name: int(value) for name, value in converted.items() if name.endswith(".weight")} == {
        f"{module.diffusers[0]}.weight": number for number, module in enumerate(modules)
    }


@pytest.mark.parametrize("dialect", [*dialects.SDXL_DIALECTS, *dialects.SDXL_ATTENTION_DIALECTS])
def test_one_lora_in_every_dialect_gives_one_plan(tmp_path: Path, dialect: str) -> None:
    only_attention = dialect in dialects.SDXL_ATTENTION_DIALECTS
    subject, style = (dialects.sd15_factors(seed=seed, attention_only=only_attention) for seed in (1, 2))
    files = {
        name: dialects.write_sd15(tmp_path / f"{name}.safetensors", written_in, factors)
        for name, written_in, factors in (
            ("known", "kohya", subject),
            ("style", "kohya", style),
            ("odd", dialect, subject),
        )
    }
    lora = read_lora(files["odd"])
    assert (lora.base, lora.dialect, lora.unknown_keys) == ("sd15", dialect.removesuffix(", bare"), ())
    assert lora.kinds == {"LoRA": len(subject)}
    with lora.open() as delta_of:
        for name, (up, down) in subject.items():
            expected = up.flatten(1).float() @ down.flatten(1).float() * (dialects.ALPHA / dialects.RANK)
            assert torch.equal(dense(delta_of(name)), expected)
    plans = [analyze(files[name], files["style"], Settings(), steps=8).to_json() for name in ("known", "odd")]
    assert plans[0] == plans[1]


@pytest.mark.parametrize("dialect", [*dialects.SDXL_DIALECTS, *dialects.SDXL_ATTENTION_DIALECTS])
def test_what_the_hosts_do_not_read_becomes_kohyas_native_names(tmp_path: Path, dialect: str) -> None:
    factors = dialects.sd15_factors(attention_only=dialect in dialects.SDXL_ATTENTION_DIALECTS)
    lora = read_lora(dialects.write_sd15(tmp_path / "old.safetensors", dialect, factors))
    assert is_in(lora, SD15.readable) == (dialect in SD15.readable)
    rewrite(lora, tmp_path / "new.safetensors")
    kohya = load_file(dialects.write_sd15(tmp_path / "kohya.safetensors", "kohya", factors))
    new = load_file(tmp_path / "new.safetensors")
    assert {key for key in new if ".lora_" in key} == {key for key in kohya if ".lora_" in key}
    assert all(torch.equal(new[key], kohya[key]) for key in kohya if key.endswith("lora_down.weight"))


ENCODER_KEYS = {
    "lora_te_": "lora_te_text_model_encoder_layers_3_mlp_fc1.lora_{}.weight",
    "lora_te1_": "lora_te1_text_model_encoder_layers_3_mlp_fc1.lora_{}.weight",
    "diffusers": "text_encoder.text_model.encoder.layers.3.mlp.fc1.lora_linear_layer.{}.weight",
    "transformers 5.6": "text_encoder.encoder.layers.3.mlp.fc1.lora_linear_layer.{}.weight",
}


@pytest.mark.parametrize("names", ENCODER_KEYS)
def test_its_text_encoder_is_clip_l_in_whatever_names(tmp_path: Path, names: str) -> None:
    key, attention = ENCODER_KEYS[names], "lora_unet_down_blocks_0_attentions_0_proj_in.lora_{}.weight"
    tensors = {name.format("up"): torch.ones(8, 2) for name in (key, attention)}
    tensors |= {name.format("down"): torch.ones(2, 8) for name in (key, attention)}
    save_file(tensors, tmp_path / "a.safetensors")
    lora = read_lora(tmp_path / "a.safetensors")
    assert list(lora.text_encoder_modules) == ["te1:text_model.encoder.layers.3.mlp.fc1"]
    assert lora.base == "sd15"


def saved(folder: Path, metadata: dict[str, str] | None = None, **shapes: tuple[int, int]) -> Path:
    tensors: dict[str, Tensor] = {}
    for stem, (rows, columns) in shapes.items():
        tensors[f"lora_unet_{stem}.lora_up.weight"] = torch.ones(rows, 1)
        tensors[f"lora_unet_{stem}.lora_down.weight"] = torch.ones(1, columns)
    save_file(tensors, folder / "few.safetensors", metadata)
    return folder / "few.safetensors"


TO_K = "input_blocks_4_1_transformer_blocks_0_attn2_to_k"
OUTPUT_Q = "output_blocks_4_1_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("stem", "shape", "base"),
    [
        (TO_K, (640, 768), "sd15"),
        (TO_K, (640, 2048), "sdxl"),
        (OUTPUT_Q, (1280, 1280), "sd15"),
        (OUTPUT_Q, (640, 640), "sdxl"),
        ("output_blocks_3_1_proj_in", (1280, 1280), "sd15"),
        ("output_blocks_5_1_transformer_blocks_0_ff_net_2", (640, 2560), "sdxl"),
    ],
)
def test_a_file_on_blocks_that_both_have_is_told_by_its_sizes(
    tmp_path: Path, stem: str, shape: tuple[int, int], base: str
) -> None:
    assert read_lora(saved(tmp_path, **{stem: shape})).base == base


@pytest.mark.parametrize("stem", [TO_K, "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"])
@pytest.mark.parametrize(("columns", "other"), [(1024, "Stable Diffusion 2.x"), (1280, "the SDXL refiner")])
def test_models_of_its_names_that_klora_does_not_know_are_refused_by_name(
    tmp_path: Path, stem: str, columns: int, other: str
) -> None:
    with pytest.raises(LoraFileError, match=rf"was made for {other}, "):
        read_lora(saved(tmp_path, **{stem: (640, columns)}))


HEADERS = [
    ("stable-diffusion-v2-768-v/lora", "Stable Diffusion 2.x"),
    ("sd_v2", "Stable Diffusion 2.x"),
    ("sdxl_base_v1-0", "SDXL"),
    ("stable-diffusion-xl-v1-base/lora", "SDXL"),
    ("stable-diffusion-v1/lora", None),
    ("sd_v1", None),
]


@pytest.mark.parametrize(("header", "other"), HEADERS)
def test_a_header_that_names_another_model_of_its_names_is_quoted(
    tmp_path: Path, header: str, other: str | None
) -> None:
    path = saved(tmp_path, {"ss_base_model_version": header}, input_blocks_1_1_proj_in=(8, 8))
    warnings = analyze(path, path, Settings(), steps=2).warnings
    said = [f"says that it was made for {other}, whose LoRAs" in warning for warning in warnings]
    assert said == ([] if other is None else [True, True])


def test_a_checkpoint_is_told_by_the_flag_that_every_host_sets() -> None:
    assert of_checkpoint(SimpleNamespace(is_sd1=True, is_sdxl=False), None) is SD15
    assert of_checkpoint(SimpleNamespace(is_sd1=False, is_sdxl=True), None) is FAMILIES["sdxl"]
    assert of_checkpoint(SimpleNamespace(is_sd1=False, is_sd2=True), None) is None


@pytest.mark.parametrize(
    ("settings", "base"),
    [({}, "sd15"), ({"use_linear_projection": True}, None), (UNETS["sdxl"][1], None)],
    ids=["SD 1.5", "SD 2.x", "SDXL without its second text encoder"],
)
def test_a_pipeline_is_told_by_its_unet(settings: dict, base: str | None) -> None:
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DConditionModel(
        **{"norm_num_groups": 2, "cross_attention_dim": 8, **UNETS["sd15"][1], **settings}
    )
    assert of_pipeline(SimpleNamespace(unet=unet, text_encoder=None)) is FAMILIES.get(base or "")


def test_no_name_of_one_family_is_another_familys_layer_of_another_place() -> None:
    """Each name that SD 1.5 and SDXL have in common means the same place in both."""
    places: dict[str, Module] = {module.native: module for module in FAMILIES["sdxl"].modules}
    common = [module for module in SD15.modules if module.native in places]
    assert len(common) > 200
    assert all(module.diffusers == places[module.native].diffusers for module in common)
