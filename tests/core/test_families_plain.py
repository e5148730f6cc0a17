"""Qwen-Image, Krea 2, ERNIE-Image, Anima and Wan: networks whose native modules are one layer each."""

from __future__ import annotations

from types import SimpleNamespace

import plain_families as plain
import pytest
import torch
from safetensors.torch import load_file, save_file

from klora.core import foreign_files
from klora.core.deltas import dense
from klora.core.families import FAMILIES, of_checkpoint
from klora.core.families.base import Row, modules_of
from klora.core.lora_file import read_lora
from klora.core.rewrite import is_in, rewrite
from klora.core.scores import score_pair
from klora.core.topology import LINEAR, NORM

PLAIN = tuple(plain.LAYERS)


def deltas_of(lora):
    with lora.open() as delta_of:
        return {name: dense(delta_of(name)) for name in lora.layers}


@pytest.mark.parametrize("base", PLAIN)
def test_one_lora_gives_one_plan_in_every_dialect(tmp_path, base):
    style = read_lora(plain.write(tmp_path / "style.safetensors", base, "kohya", seed=1))
    plans = []
    for number, dialect in enumerate(plain.DIALECTS):
        lora = read_lora(plain.write(tmp_path / f"{number}.safetensors", base, dialect))
        assert (lora.base, lora.unknown_keys) == (base, ()), dialect
        assert set(lora.layers) == {layer.native for layer in plain.LAYERS[base]}
        assert all(lora.layers[layer.native].shape == layer.size for layer in plain.LAYERS[base])
        plans.append(score_pair(lora, style))
    assert all(scores.layers == plans[0].layers and scores.gamma == plans[0].gamma for scores in plans)


@pytest.mark.parametrize("dialect", plain.DIALECTS)
@pytest.mark.parametrize("base", PLAIN)
def test_what_forge_neo_does_not_read_is_written_in_names_that_it_reads(tmp_path, base, dialect):
    old = read_lora(plain.write(tmp_path / "old.safetensors", base, dialect))
    readable = FAMILIES[base].readable
    assert is_in(old, readable) == (dialect.removesuffix(", kohya's suffixes") in plain.READ_BY_NEO[base])
    rewrite(old, tmp_path / "new.safetensors")
    new = read_lora(tmp_path / "new.safetensors")
    assert is_in(new, readable)
    after = deltas_of(new)
    assert all(torch.equal(delta, after[name]) for name, delta in deltas_of(old).items())
    stems = {
        f"lora_unet_{layer.native.replace('.', '_')}" if name == "kohya" else f"transformer.{layer.diffusers}"
        for layer in plain.LAYERS[base]
        for name in ("kohya", "diffusers")
    }
    assert {
        key.partition(".lora_")[0].removesuffix(".alpha") for key in load_file(tmp_path / "new.safetensors")
    } <= stems


@pytest.mark.parametrize("base", PLAIN)
def test_a_file_of_one_layer_of_a_family_is_no_other_family_s(tmp_path, base):
    """By kohya's names, which none of the others has."""
    for layer in plain.LAYERS[base]:
        if "." not in layer.native or "block" not in layer.native:
            continue
        stem = f"lora_unet_{layer.native.replace('.', '_')}"
        rows, columns = layer.size
        tensors = {
            f"{stem}.lora_up.weight": torch.ones(rows, 1),
            f"{stem}.lora_down.weight": torch.ones(1, columns),
        }
        save_file(tensors, tmp_path / "one.safetensors")
        if base == "qwen" and ".attn." in layer.native and ".0." in layer.native:
            assert (
                read_lora(tmp_path / "one.safetensors").base == "flux"
            )  # 19 blocks are FLUX.1's in diffusers' names
        else:
            assert read_lora(tmp_path / "one.safetensors").base == base


@pytest.mark.parametrize("base", PLAIN)
def test_no_name_of_a_family_is_taken_for_another_model(base):
    modules = FAMILIES[base].modules
    for module in modules:
        flat = module.native.replace(".", "_")
        for opening in ("lora_unet_", "lycoris_", "lora_transformer_"):
            assert foreign_files.other_base([f"{opening}{flat}.alpha"]) is None
        for opening in ("diffusion_model.", "base_model.model.", "transformer.", ""):
            assert foreign_files.other_base([f"{opening}{module.native}.alpha"]) is None
    for opening in ("transformer.", "lycoris_", "base_model.model.", ""):
        names = [module.diffusers[0] for module in modules]
        written = [name.replace(".", "_") if opening == "lycoris_" else name for name in names]
        assert foreign_files.other_base(f"{opening}{name}.alpha" for name in written) is None


@pytest.mark.parametrize("norm", ["weight", "bias"])
@pytest.mark.parametrize(
    ("base", "native", "diffusers"),
    [
        ("wan", "blocks.3.norm3", "blocks.3.norm2"),
        ("wan", "blocks.3.cross_attn.norm_k_img", "blocks.3.attn2.norm_added_k"),
        ("krea", "blocks.3.attn.qknorm.qnorm", "transformer_blocks.3.attn.norm_q"),
        ("anima", "blocks.3.cross_attn.k_norm", "transformer_blocks.3.attn2.norm_k"),
        ("qwen", "transformer_blocks.3.attn.norm_added_q", "transformer_blocks.3.attn.norm_added_q"),
        ("ernie", "layers.3.adaLN_sa_ln", "layers.3.adaLN_sa_ln"),
    ],
)
def test_norms_go_with_the_lora(tmp_path, base, native, diffusers, norm):
    role = {"weight": "diff", "bias": "diff_b"}[norm]
    for number, (dialect, name) in enumerate(
        (
            ("native after diffusion_model.", f"diffusion_model.{native}"),
            ("diffusers", f"transformer.{diffusers}"),
        )
    ):
        path = tmp_path / f"{number}.safetensors"
        save_file(load_file(plain.write(path, base, dialect)) | {f"{name}.{role}": torch.ones(4)}, path)
        assert read_lora(path).unscored == (native,)


def test_wan_s_patches_of_video_are_read(tmp_path):
    tensors = {
        "diffusion_model.patch_embedding.lora_down.weight": torch.ones(2, 3, 1, 2, 2),
        "diffusion_model.patch_embedding.lora_up.weight": torch.ones(8, 2, 1, 1, 1),
        "diffusion_model.head.head.diff": torch.ones(4, 8),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    lora = read_lora(tmp_path / "a.safetensors")
    assert {name: info.shape for name, info in lora.layers.items()} == {
        "head.head": (4, 8),
        "patch_embedding": (8, 12),
    }


TEXT = {
    "lora_te_layers_25_mlp_down_proj": "qwen3:layers.25.mlp.down_proj",
    "lora_te1_layers_0_self_attn_q_proj": "qwen3:layers.0.self_attn.q_proj",
    "text_encoders.qwen3_06b.transformer.model.layers.0.self_attn.o_proj": "qwen3:layers.0.self_attn.o_proj",
    "text_encoders.qwen3_06b.model.layers.27.mlp.gate_proj": "qwen3:layers.27.mlp.gate_proj",
    "text_encoder.qwen3.layers.2.self_attn.v_proj": "qwen3:layers.2.self_attn.v_proj",
    "lora_unet_llm_adapter_blocks_5_cross_attn_k_proj": "llm_adapter:blocks.5.cross_attn.k_proj",
    "lora_te_llm_adapter_blocks_0_mlp_0": "llm_adapter:blocks.0.mlp.0",
    "diffusion_model.llm_adapter.blocks.0.self_attn.o_proj": "llm_adapter:blocks.0.self_attn.o_proj",
    "text_conditioner.blocks.0.mlp.2": "llm_adapter:blocks.0.mlp.2",
    "base_model.model.llm_adapter.out_proj": "llm_adapter:out_proj",
}
TEXT_READ_BY_NEO = {
    "lora_te_layers_25_mlp_down_proj",
    *(key for key in TEXT if "_llm_adapter_" in key or key.startswith("diffusion_model.")),
}


@pytest.mark.parametrize("stem", TEXT)
def test_anima_s_text_goes_where_forge_neo_has_it(tmp_path, stem):
    """The adapter's keys may open as the denoiser's do, whose checkpoints hold it; the host moves it."""
    tensors = load_file(plain.write(tmp_path / "plain.safetensors", "anima", "kohya"))
    tensors |= {f"{stem}.lora_up.weight": torch.ones(8, 2), f"{stem}.lora_down.weight": torch.ones(2, 8)}
    save_file(tensors, tmp_path / "old.safetensors")
    old = read_lora(tmp_path / "old.safetensors")
    assert (list(old.text_encoder_modules), old.unknown_keys) == ([TEXT[stem]], ())
    assert is_in(old, FAMILIES["anima"].readable) == (stem in TEXT_READ_BY_NEO)
    rewrite(old, tmp_path / "new.safetensors")
    part, _, path = TEXT[stem].partition(":")
    opening = {"qwen3": "lora_te_", "llm_adapter": "lora_te_llm_adapter_"}[part]
    assert f"{opening}{path.replace('.', '_')}.lora_up.weight" in load_file(tmp_path / "new.safetensors")


def test_krea_s_output_is_read_without_its_number(tmp_path):
    tensors = load_file(plain.write(tmp_path / "old.safetensors", "krea", "diffusers"))
    save_file(
        {key.replace("to_out.0", "to_out"): value for key, value in tensors.items()},
        tmp_path / "new.safetensors",
    )
    old, new = (read_lora(tmp_path / f"{name}.safetensors") for name in ("old", "new"))
    assert (old.layers, old.dialects) == (new.layers, new.dialects)


DENOISERS = {
    "qwen": ("transformer_blocks", "txt_norm", "img_in", "txt_in", "norm_out", "proj_out"),
    "krea": ("blocks", "txtfusion", "first", "tmlp", "tproj", "txtmlp", "last"),
    "anima": ("blocks", "t_embedding_norm", "x_embedder", "t_embedder", "final_layer"),
    "wan": ("blocks", "time_projection", "text_embedding", "time_embedding", "patch_embedding", "head"),
    "ernie": ("layers", "final_norm", "final_linear", "x_embedder", "text_proj", "adaLN_modulation"),
    None: ("layers", "final_layer", "x_embedder", "noise_refiner"),
}
"""Some of what Forge Neo's classes hold (backend/nn); the last is Z-Image's."""


@pytest.mark.parametrize("base", DENOISERS)
def test_a_checkpoint_is_known_by_what_its_denoiser_holds(base):
    denoiser = SimpleNamespace(**dict.fromkeys(DENOISERS[base], ()))
    found = of_checkpoint(SimpleNamespace(is_sdxl=False), denoiser)
    assert found is FAMILIES[base] if base else (found is None or found.key not in PLAIN)


def test_a_row_of_a_table_is_written_out_side_by_side_with_diffusers_names():
    rows = (Row("a.#.{x,y}_{1,2}", "b.#.{v,w}{p,q}", NORM), Row("end.{0,2}"))
    assert [(module.native, *module.diffusers) for module in modules_of(rows, 2)] == [
        *(("a.0.x_1", "b.0.vp"), ("a.0.x_2", "b.0.vq"), ("a.0.y_1", "b.0.wp"), ("a.0.y_2", "b.0.wq")),
        *(("a.1.x_1", "b.1.vp"), ("a.1.x_2", "b.1.vq"), ("a.1.y_1", "b.1.wp"), ("a.1.y_2", "b.1.wq")),
        *(("end.0", "end.0"), ("end.2", "end.2")),
    ]
    assert [module.kind for module in modules_of(rows, 1)] == [NORM] * 4 + [LINEAR] * 2


def test_a_row_with_fewer_names_in_diffusers_is_a_mistake():
    with pytest.raises(ValueError, match="zip"):
        list(modules_of((Row("a.{x,y,z}", "b.{v,w}"),), 1))
