"""The topology against the real networks, and the key tables against names set down by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klora.core import foreign_files
from klora.core.families import FAMILIES
from klora.core.families.base import Family
from klora.core.families.flux import flux_modules
from klora.core.families.sdxl import sdxl_modules
from klora.core.key_names import SUFFIXES, parse_key
from klora.core.text_encoders import TEXT_ENCODERS
from klora.core.topology import CONV, LINEAR, NORM, Module

ROLES = (
    ("lora_up.weight", "up"),
    ("lora_down.weight", "down"),
    ("alpha", "alpha"),
    ("dora_scale", "dora_scale"),
)


def test_sdxl_names_are_those_of_diffusers_own_unet() -> None:
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8, 16),
        norm_num_groups=2,
        attention_head_dim=(1, 2, 4),
        transformer_layers_per_block=(1, 2, 10),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    )
    kinds = {
        "Linear": LINEAR,
        "LoRACompatibleLinear": LINEAR,
        "Conv2d": CONV,
        "LoRACompatibleConv": CONV,
        "GroupNorm": NORM,
        "LayerNorm": NORM,
    }
    real = {
        name: kinds[type(m).__name__]
        for name, m in unet.named_modules()
        if any(True for _ in m.parameters(recurse=False))
    }
    assert {m.diffusers[0]: m.kind for m in sdxl_modules()} == real


def test_flux_names_are_those_of_diffusers_own_transformer() -> None:
    diffusers = pytest.importorskip("diffusers")
    flux = diffusers.FluxTransformer2DModel(
        num_layers=19,
        num_single_layers=38,
        attention_head_dim=4,
        num_attention_heads=1,
        joint_attention_dim=4,
        pooled_projection_dim=4,
        guidance_embeds=True,
        in_channels=4,
        axes_dims_rope=(2, 2, 0),
    )
    real = {name for name, m in flux.named_modules() if any(True for _ in m.parameters(recurse=False))}
    assert {name for m in flux_modules() for name in m.diffusers} == real


def test_flux_has_304_block_matrices_fused_and_494_split() -> None:
    blocks = [m for m in flux_modules() if m.kind == LINEAR and m.native.startswith(("double", "single"))]
    assert len(blocks) == 304
    assert sum(len(m.layers) for m in blocks) == 494


def test_sdxl_has_560_attention_layers() -> None:
    assert sum(".attn" in m.native and m.kind == LINEAR for m in sdxl_modules()) == 560


def test_no_layer_of_a_family_is_taken_for_another_model() -> None:
    text_encoders = [m for encoder in TEXT_ENCODERS.values() for m in encoder.modules]
    # One kind of attention alone is LTX-Video's or SD 3's; files of Anima have both.
    of_anima = {name for module in FAMILIES["anima"].modules for name in module.diffusers if ".attn" in name}
    for module in (*(module for _, module in ALL), *text_encoders):
        for name in {module.native.partition(":")[2] or module.native, *module.diffusers} - of_anima:
            keys = [f"{name}.alpha", f"transformer.{name}.alpha", f"lora_unet_{name.replace('.', '_')}.alpha"]
            assert (
                foreign_files.other_base([*keys, f"lora_transformer_{name.replace('.', '_')}.alpha"]) is None
            ), name


ALL = [(family, module) for family in FAMILIES.values() for module in family.modules]


@given(st.sampled_from(ALL), st.sampled_from(ROLES), st.sampled_from(["lora_unet_", "lycoris_"]))
def test_underscore_names_mean_one_place(
    place: tuple[Family, Module], role: tuple[str, str], prefix: str
) -> None:
    family, module = place
    suffix, meaning = role
    for name, layers in (
        (module.native, module.layers),
        *(
            zip(module.diffusers, ((layer,) for layer in module.layers), strict=True)
            if len(module.diffusers) == len(module.layers)
            else [(module.diffusers[0], module.layers)]
        ),
    ):
        parsed = parse_key(f"{prefix}{name.replace('.', '_')}.{suffix}", [family])
        assert parsed is not None
        assert (parsed.target.layers, parsed.role) == (layers, meaning)


@given(
    st.sampled_from(ALL),
    st.sampled_from(sorted(SUFFIXES)),
    st.sampled_from(["diffusion_model.", "unet.", "transformer.", "base_model.model.", ""]),
)
def test_dotted_names_are_understood_under_every_prefix(
    place: tuple[Family, Module], suffix: str, prefix: str
) -> None:
    family, module = place
    parsed = parse_key(prefix + module.native + suffix, [family])
    assert parsed is not None
    assert parsed.target.module == module
    assert parsed.role == SUFFIXES[suffix]


@pytest.mark.parametrize(
    ("key", "layers", "role"),
    [
        (
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight",
            "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
            "up",
        ),
        (
            "mid_block.attentions.0.transformer_blocks.9.attn2.processor.to_out_lora.down.weight",
            "middle_block.1.transformer_blocks.9.attn2.to_out.0",
            "down",
        ),
        ("lora_unet_up_blocks_0_upsamplers_0_conv.lora_mid.weight", "output_blocks.2.2.conv", "mid"),
        ("lora_unet_down_blocks_1_downsamplers_0_conv.hada_t1", "input_blocks.6.0.op", "hada_t1"),
        (
            "double_blocks.3.processor.qkv_lora2.up.weight",
            "double_blocks.3.txt_attn.qkv:q double_blocks.3.txt_attn.qkv:k double_blocks.3.txt_attn.qkv:v",
            "up",
        ),
        (
            "diffusion_model.single_blocks.3.processor.proj_lora.down.weight",
            "single_blocks.3.linear2",
            "down",
        ),
        (
            "transformer.transformer_blocks.0.attn.to_qkv.lora_A.weight",
            "double_blocks.0.img_attn.qkv:q double_blocks.0.img_attn.qkv:k double_blocks.0.img_attn.qkv:v",
            "down",
        ),
        ("transformer.norm_out.linear.lora_B.weight", "final_layer.adaLN_modulation.1", "up"),
        (
            "base_model.model.single_transformer_blocks.2.proj_mlp.lora_magnitude_vector.default.weight",
            "single_blocks.2.linear1:mlp",
            "peft_magnitude",
        ),
        ("unet.conv_in.lora_A.my_adapter.weight", "input_blocks.0.0", "down"),
        (
            "lora_te2_text_model_encoder_layers_31_mlp_fc1.lora_up.weight",
            "te2:text_model.encoder.layers.31.mlp.fc1",
            "up",
        ),
        (
            "lora_te3_encoder_block_23_layer_1_DenseReluDense_wi_0.alpha",
            "t5:encoder.block.23.layer.1.DenseReluDense.wi_0",
            "alpha",
        ),
        (
            "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight",
            "t5:encoder.block.0.layer.0.SelfAttention.q",
            "down",
        ),
        (
            "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.up.weight",
            "te1:text_model.encoder.layers.0.self_attn.out_proj",
            "up",
        ),
        ("lora_unet_input_blocks_4_1_norm.w_norm", "input_blocks.4.1.norm", "w_norm"),
    ],
)
def test_names_as_trainers_write_them(key: str, layers: str, role: str) -> None:
    parsed = parse_key(key)
    assert parsed is not None
    assert (parsed.target.layers, parsed.role) == (tuple(layers.split()), role)


@pytest.mark.parametrize(
    "key",
    [
        "",
        "alpha",
        "lora_unet_",
        "lora_unet_input_blocks_10_1_proj_in.alpha",
        "lora_unet_input_blocks_4_1_proj_in.lora_sideways.weight",
        "transformer.transformer_blocks.60.attn.to_q.lora_A.weight",
        "model.diffusion_model.out.2.weight",
        "bundle_emb.cat.clip_l",
    ],
)
def test_other_names_are_not_guessed(key: str) -> None:
    assert parse_key(key) is None
