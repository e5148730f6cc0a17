"""Rewritten files: keys as hosts know them, the same deltas, the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import dialects
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from klora.core.deltas import dense
from klora.core.lora_file import LoraFile, read_lora
from klora.core.rewrite import rewrite
from klora.errors import LoraFileError

STEM = "lora_unet_middle_block_1_proj_in"


def deltas_of(lora: LoraFile) -> dict[str, Tensor]:
    with lora.open() as delta_of:
        return {name: dense(delta_of(name)) for name in lora.layers}


def rewritten(path: Path) -> Path:
    """Rewrites a file and asserts that its deltas and ranks stay."""
    before, out = read_lora(path), path.with_name("new.safetensors")
    assert rewrite(before, out) == before.unknown_keys
    after = read_lora(out)
    assert {name: (info.rank, info.shape) for name, info in after.layers.items()} == {
        name: (info.rank, info.shape) for name, info in before.layers.items()
    }
    new = deltas_of(after)
    assert all(torch.equal(delta, new[name]) for name, delta in deltas_of(before).items())
    assert after.metadata == before.metadata
    assert after.text_encoder_modules == before.text_encoder_modules
    assert after.unscored == before.unscored
    return out


def same_bytes(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )


@pytest.mark.parametrize("dialect", [*dialects.SDXL_DIALECTS, *dialects.SDXL_ATTENTION_DIALECTS])
def test_sdxl_becomes_kohya_with_sgm_names(tmp_path: Path, dialect: str) -> None:
    factors = dialects.sdxl_factors(attention_only=dialect in dialects.SDXL_ATTENTION_DIALECTS)
    new = load_file(rewritten(dialects.write_sdxl(tmp_path / "old.safetensors", dialect, factors)))
    kohya = load_file(dialects.write_sdxl(tmp_path / "kohya.safetensors", "kohya", factors))
    assert {key for key in kohya if not key.endswith(".alpha")} == {
        key for key in new if not key.endswith(".alpha")
    }
    assert all(same_bytes(new[key], kohya[key]) for key in kohya if key.endswith("lora_down.weight"))


MODULES = [*dialects.FLUX_BLOCKS, *dialects.FLUX_ENDS]


@pytest.mark.parametrize("dialect", dialects.FLUX_FUSED_DIALECTS)
def test_fused_flux_becomes_kohya(tmp_path: Path, dialect: str) -> None:
    factors = dialects.flux_factors(MODULES)
    new = load_file(
        rewritten(dialects.write_flux_fused(tmp_path / "old.safetensors", dialect, MODULES, factors))
    )
    kohya = load_file(dialects.write_flux_fused(tmp_path / "kohya.safetensors", "kohya", MODULES, factors))
    assert {key for key in kohya if not key.endswith(".alpha")} == {
        key for key in new if not key.endswith(".alpha")
    }


@pytest.mark.parametrize("dialect", dialects.FLUX_SPLIT_DIALECTS)
def test_split_flux_becomes_diffusers(tmp_path: Path, dialect: str) -> None:
    factors = dialects.flux_factors(MODULES)
    new = load_file(
        rewritten(dialects.write_flux_split(tmp_path / "old.safetensors", dialect, MODULES, factors))
    )
    split = load_file(
        dialects.write_flux_split(tmp_path / "split.safetensors", "diffusers PEFT", MODULES, factors)
    )
    assert set(split) == {key for key in new if not key.endswith(".alpha")}


def test_xlabs_becomes_fused_and_split(tmp_path: Path) -> None:
    new = load_file(
        rewritten(
            dialects.write_xlabs(tmp_path / "old.safetensors", dialects.flux_factors(dialects.FLUX_BLOCKS))
        )
    )
    assert "lora_unet_double_blocks_18_txt_attn_qkv.lora_up.weight" in new
    assert "transformer.single_transformer_blocks.37.attn.to_v.lora_B.weight" in new
    assert not [key for key in new if "processor" in key or "proj_mlp" in key]


def test_norm_out_keeps_its_order_under_its_diffusers_name(tmp_path: Path) -> None:
    stem = "lora_transformer_norm_out_linear"
    old = {f"{stem}.lora_up.weight": torch.randn(8, 2), f"{stem}.lora_down.weight": torch.randn(2, 4)}
    save_file(old, tmp_path / "old.safetensors")
    new = load_file(rewritten(tmp_path / "old.safetensors"))
    assert same_bytes(new["transformer.norm_out.linear.lora_B.weight"], old[f"{stem}.lora_up.weight"])


ROLES = {
    "LoHa": {role: torch.randn(4, 4) for role in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
    "LoKr": {"lokr_w1": torch.randn(2, 2), "lokr_w2_a": torch.randn(4, 2), "lokr_w2_b": torch.randn(2, 4)},
    "GLoRA": {f"{role}.weight": torch.randn(4, 4) for role in ("a1", "a2", "b1", "b2")},
    "full": {"diff": torch.randn(4, 4), "diff_b": torch.randn(4)},
    "DoRA": {
        "lora_up.weight": torch.randn(4, 2),
        "lora_down.weight": torch.randn(2, 4),
        "dora_scale": torch.rand(1, 4),
    },
}


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str
)
@pytest.mark.parametrize("kind", ROLES)
def test_every_role_is_copied_bit_for_bit(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    roles = {role: tensor.to(dtype) for role, tensor in ROLES[kind].items()} | {
        "alpha": torch.tensor(2.0, dtype=torch.bfloat16)
    }
    old = {f"lycoris_mid_block_attentions_0_proj_in.{role}": tensor for role, tensor in roles.items()}
    save_file(old, tmp_path / "old.safetensors")
    new = load_file(rewritten(tmp_path / "old.safetensors"))
    assert set(new) == {f"{STEM}.{role}" for role in roles}
    for role, tensor in roles.items():
        assert new[f"{STEM}.{role}"].shape == tensor.shape
        assert same_bytes(new[f"{STEM}.{role}"], tensor)


def test_all_else_goes_along(tmp_path: Path) -> None:
    peft = {"lora_B.weight": torch.randn(4, 2), "lora_A.weight": torch.randn(2, 4)}
    encoder = "text_model.encoder.layers."
    stems = {
        "unet.mid_block.attentions.0.proj_in": STEM,
        f"text_encoder.{encoder}3.self_attn.q_proj": "lora_te1_text_model_encoder_layers_3_self_attn_q_proj",
        f"text_encoder_2.{encoder}31.mlp.fc2": "lora_te2_text_model_encoder_layers_31_mlp_fc2",
    }
    old = {f"{stem}.{role}": tensor.clone() for stem in stems for role, tensor in peft.items()}
    old |= {
        "unet.mid_block.attentions.0.norm.w_norm": torch.ones(4),
        "unet.mid_block.attentions.0.norm.b_norm": torch.ones(4),
    }
    old |= {
        "unet.conv_in.diff_b": torch.ones(4),
        "bundle_emb.cat.clip_l": torch.ones(1, 4),
        "unet.nowhere.alpha": torch.ones(()),
    }
    save_file(
        old, tmp_path / "old.safetensors", {"ss_tag_frequency": '{"kätzchen": 3}', "modelspec.title": "x"}
    )
    out = rewritten(tmp_path / "old.safetensors")
    new = {f"{stem}.lora_{role}.weight" for stem in stems.values() for role in ("up", "down")}
    new |= {"lora_unet_middle_block_1_norm.w_norm", "lora_unet_middle_block_1_norm.b_norm"}
    assert set(load_file(out)) == new | {"lora_unet_input_blocks_0_0.diff_b", "bundle_emb.cat.clip_l"}
    with safe_open(out, "pt") as opened:
        assert opened.metadata() == {"ss_tag_frequency": '{"kätzchen": 3}', "modelspec.title": "x"}


def test_flux_text_encoders(tmp_path: Path) -> None:
    old = {}
    for stem in ("transformer.proj_out", "text_encoder_2.encoder.block.1.layer.0.SelfAttention.q"):
        old |= {f"{stem}.lora_B.weight": torch.randn(4, 2), f"{stem}.lora_A.weight": torch.randn(2, 4)}
    save_file(old, tmp_path / "old.safetensors")
    assert "lora_te3_encoder_block_1_layer_0_SelfAttention_q.lora_up.weight" in load_file(
        rewritten(tmp_path / "old.safetensors")
    )


def test_a_scale_that_only_the_header_has_becomes_alpha(tmp_path: Path) -> None:
    stem = "unet.mid_block.attentions.0.proj_in"
    old = {
        f"{stem}.lora_B.weight": torch.ones(4, 2),
        f"{stem}.lora_A.weight": torch.ones(2, 4),
        f"{stem}.lora_B.bias": torch.ones(4),
    }
    save_file(
        old,
        tmp_path / "old.safetensors",
        {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 8})},
    )
    new = load_file(rewritten(tmp_path / "old.safetensors"))
    assert new[f"{STEM}.alpha"].item() == 8
    assert new[f"{STEM}.diff_b"].tolist() == [4] * 4


def test_peft_magnitude_becomes_dora_scale_of_rows(tmp_path: Path) -> None:
    linear, conv = "unet.mid_block.attentions.0.proj_in", "unet.mid_block.resnets.0.conv1"
    old = {
        f"{linear}.lora_B.weight": torch.ones(6, 2), f"{linear}.lora_A.weight": torch.ones(2, 4),
        f"{linear}.lora_magnitude_vector.weight": torch.arange(6.0),
        f"{conv}.lora_B.weight": torch.ones(6, 2, 1, 1), f"{conv}.lora_A.weight": torch.ones(2, 4, 3, 3),
        f"{conv}.lora_magnitude_vector": torch.arange(6.0).reshape(1, 6, 1, 1),
    }  # fmt: skip
    save_file(old, tmp_path / "old.safetensors")
    out = rewritten(tmp_path / "old.safetensors")
    new = load_file(out)
    assert new[f"{STEM}.dora_scale"].shape == (6, 1)
    assert new["lora_unet_middle_block_0_in_layers_2.dora_scale"].shape == (6, 1, 1, 1)
    with read_lora(out).open() as reader:
        for name in ("middle_block.1.proj_in", "middle_block.0.in_layers.2"):
            magnitude = reader.magnitude(name)
            assert magnitude is not None
            assert (magnitude.axis, magnitude.values.tolist()) == (0, [0, 1, 2, 3, 4, 5])


def test_a_file_that_cannot_be_cut_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    stem = "transformer.single_transformer_blocks.1.attn.to_qkv"
    save_file(
        {f"{stem}.lokr_w1": torch.ones(3, 1), f"{stem}.lokr_w2": torch.ones(4, 4)},
        tmp_path / "old.safetensors",
    )
    with pytest.raises(LoraFileError, match=r"old\.safetensors"):
        rewrite(read_lora(tmp_path / "old.safetensors"), tmp_path / "new.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["old.safetensors"]


def test_what_the_system_refuses_is_an_error_of_the_systems(tmp_path: Path) -> None:
    """The library has an error of its own for it."""
    path = dialects.write_sdxl(tmp_path / "old.safetensors", "kohya", dialects.sdxl_factors())
    with pytest.raises(FileNotFoundError) as caught:
        rewrite(read_lora(path), tmp_path / "nowhere" / "new.safetensors")
    assert caught.value.filename == str(tmp_path / "nowhere" / "new.safetensors")
    assert caught.value.strerror


def test_hashes_of_the_originals_tensors_are_left_out(tmp_path: Path) -> None:
    """With them a host lists the copy in the place of the original."""
    stem = "unet.mid_block.attentions.0.proj_in"
    save_file(
        {f"{stem}.lora_B.weight": torch.ones(4, 2), f"{stem}.lora_A.weight": torch.ones(2, 4)},
        tmp_path / "old.safetensors",
        {"sshs_model_hash": "a" * 64, "sshs_legacy_hash": "b" * 8, "ss_output_name": "dog"},
    )
    rewrite(read_lora(tmp_path / "old.safetensors"), tmp_path / "new.safetensors")
    with safe_open(tmp_path / "new.safetensors", "pt") as opened:
        assert opened.metadata() == {"ss_output_name": "dog"}


def test_pickled_files_become_safetensors(tmp_path: Path) -> None:
    torch.save(
        {f"{STEM}.lora_up.weight": torch.randn(4, 2), f"{STEM}.lora_down.weight": torch.randn(2, 4)},
        tmp_path / "old.pt",
    )
    rewritten(tmp_path / "old.pt")


def test_tensors_of_a_pickled_file_that_share_memory_are_written_each(tmp_path: Path) -> None:
    both = torch.randn(3, 4)
    other = "lora_unet_middle_block_1_proj_out"
    torch.save(
        {
            f"{STEM}.lora_up.weight": both[:2].T, f"{STEM}.lora_down.weight": both[:2],
            f"{other}.lora_up.weight": torch.randn(4, 2), f"{other}.lora_down.weight": both[1:],
        },
        tmp_path / "old.pt",
    )  # fmt: skip
    rewritten(tmp_path / "old.pt")
