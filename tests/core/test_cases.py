"""Files as found in the wild give the numbers of a float64 evaluation, or a true and helpful sentence."""

from __future__ import annotations

import dataclasses
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
import wild_files as wild
from safetensors.torch import load_file, save, save_file
from torch import Tensor
from wild_files import STEPS, Maker, Wild

from klora.analysis import Analysis, analyze
from klora.core.families import listed
from klora.core.key_names import parse_key
from klora.core.lora_file import LoraFile, read_lora
from klora.core.methods import FULL
from klora.core.rewrite import is_in, rewrite
from klora.core.score_cache import ScoreCache
from klora.errors import KLoraError, LoraFileError, PairError
from klora.settings import Settings

HOST_DIALECTS = {
    "sdxl": ("kohya", "kohya with diffusers names"),
    "sd15": ("kohya", "kohya with diffusers names"),
    "flux": ("kohya", "diffusers PEFT"),
}


def hosts_read(lora: LoraFile) -> bool:
    """Whether the hosts that take LoRAs for a file's base model read it without a conversion."""
    return is_in(lora, HOST_DIALECTS[lora.base])


def analysis_of(folder: Path, subject: Wild, style: Wild) -> Analysis:
    paths = (subject.save(folder / "subject.safetensors"), style.save(folder / "style.safetensors"))
    return analyze(*paths, Settings(), steps=STEPS)


def refusal_of(path: Path, style: Wild | None = None) -> str:
    """The sentence with which a pair is refused before anything is applied."""
    partner = (style or wild.sdxl_partner()).save(path.parent / "style.safetensors")
    with pytest.raises(KLoraError) as caught:
        analyze(path, partner, Settings(), steps=STEPS)
    sentence = str(caught.value)
    assert path.name in sentence
    assert sentence.endswith(".")
    return sentence


def assert_planned(folder: Path, subject: Wild, style: Wild) -> Analysis:
    found = analysis_of(folder, subject, style)
    expected = wild.expected_layers(subject.deltas, style.deltas)
    gamma = wild.expected_gamma(expected)
    assert found.plan.gamma == pytest.approx(gamma, rel=1e-5)
    for layer, known in zip(found.plan.scores.layers, expected, strict=True):
        values = dataclasses.asdict(known)
        assert {name: getattr(layer, name) for name in values} == {
            name: value if name in ("name", "only", "k") else pytest.approx(value, rel=1e-5)
            for name, value in values.items()
        }
    assert (found.plan.strengths[..., 0] // FULL).tolist() == wild.expected_choices(expected, gamma)
    return found


PLANNED: dict[str, tuple[Callable[[], Wild], Callable[[], Wild]]] = {
    "ai-toolkit's LoKr in fp16, alpha inf, after lycoris_": (
        lambda: wild.aitoolkit_lokr(torch.float16, "lycoris_"),
        wild.flux_partner,
    ),
    "ai-toolkit's LoKr in bf16": (
        lambda: wild.aitoolkit_lokr(torch.bfloat16, "lycoris_"),
        wild.flux_partner,
    ),
    "ai-toolkit's LoKr in fp16, alpha inf, after transformer.": (
        lambda: wild.aitoolkit_lokr(torch.float16, "transformer."),
        wild.flux_partner,
    ),
    "SimpleTuner's empty to_q beside to_qkv, LoKr": (
        lambda: wild.simpletuner_fused("LoKr"),
        wild.flux_partner,
    ),
    "SimpleTuner's empty to_q beside to_qkv, LoRA": (
        lambda: wild.simpletuner_fused("LoRA"),
        wild.flux_partner,
    ),
    "a control LoRA beside one without img_in": (wild.control_lora, wild.flux_partner),
    "SD 1.5 by kohya beside one by PEFT": (
        lambda: wild.sd15_lora(1, wild.kohya, "lora_unet_", "_"),
        lambda: wild.sd15_lora(2, wild.peft, "unet.", "."),
    ),
    "SD 1.5 on blocks that SDXL has too, by its context": (
        lambda: wild.sd15_lora(1, wild.kohya, "lora_unet_", "_", wild.SHARED_BLOCKS),
        lambda: wild.sd15_lora(2, wild.kohya, "lora_unet_", "_", wild.SHARED_BLOCKS),
    ),
    "diffusers' alpha 4 in the header": (lambda: wild.alphas_in_the_header(4), wild.sdxl_partner),
    "diffusers' alpha 8 in the header": (lambda: wild.alphas_in_the_header(8), wild.sdxl_partner),
}


@pytest.mark.parametrize("case", PLANNED)
def test_a_pair_is_planned_as_in_float64(tmp_path: Path, case: str) -> None:
    subject, style = (make() for make in PLANNED[case])
    assert_planned(tmp_path, subject, style)
    (tmp_path / "turned").mkdir()
    assert_planned(tmp_path / "turned", style, subject)


def test_cover_images_of_thirty_megabytes_in_the_header_are_no_hindrance(tmp_path: Path) -> None:
    """sd-webui-additional-networks wrote them there, and safetensors allows 100 MB."""
    subject = wild.sdxl_partner(1)
    subject.metadata = {"ssmd_cover_images": json.dumps(["A" * 7_500_000] * 4), "ssmd_display_name": "x"}
    found = assert_planned(tmp_path, subject, wild.sdxl_partner())
    assert found.subject.metadata == {"ssmd_display_name": "x"}


def test_a_header_larger_than_the_format_allows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "odd.safetensors").write_bytes(struct.pack("<Q", 100_000_001) + b"{" + bytes(100))
    assert "more than the safetensors format allows" in refusal_of(tmp_path / "odd.safetensors")


# Scalars that no formula uses

STEM = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
UNUSED_SCALARS: dict[str, dict[str, Tensor]] = {
    "alpha of a LoKr whose factors are full": {"lokr_w1": torch.ones(4, 4), "lokr_w2": torch.ones(8, 8)},
    "alpha of a full difference": {"diff": torch.ones(32, 32)},
    "alpha beside a scale": {
        "lora_up.weight": torch.ones(32, 2),
        "lora_down.weight": torch.ones(2, 32),
        "scale": torch.tensor(1.0),
    },
}


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("case", UNUSED_SCALARS)
def test_a_scalar_that_no_formula_uses_is_not_judged(tmp_path: Path, case: str, value: float) -> None:
    tensors = {f"{STEM}.{role}": tensor for role, tensor in UNUSED_SCALARS[case].items()}
    (info,) = read_lora(
        Wild(tensors | {f"{STEM}.alpha": torch.tensor(value)}).save(tmp_path / "odd.safetensors")
    ).layers.values()
    assert (info.network_alpha, info.scale) == (None, 1.0)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_alpha_that_a_formula_uses_is_judged(tmp_path: Path, value: float) -> None:
    lokr = {
        "lokr_w1": torch.ones(4, 4),
        "lokr_w2_a": torch.ones(8, 2),
        "lokr_w2_b": torch.ones(2, 8),
        "alpha": torch.tensor(value),
    }
    path = Wild({f"{STEM}.{role}": tensor for role, tensor in lokr.items()}).save(
        tmp_path / "odd.safetensors"
    )
    assert f'"{STEM}.alpha" of "odd.safetensors" is not one finite number' in refusal_of(path)


# Other models

OTHER_MODELS: dict[str, tuple[Callable[[], dict[str, Tensor]], str]] = {
    "HunyuanVideo, all blocks by musubi-tuner": (lambda: wild.hunyuan_video(20, 40, False), "HunyuanVideo"),
    "HunyuanVideo, double blocks by musubi-tuner": (lambda: wild.hunyuan_video(20, 0, False), "HunyuanVideo"),
    "HunyuanVideo, two blocks by musubi-tuner": (lambda: wild.hunyuan_video(2, 0, False), "HunyuanVideo"),
    "HunyuanVideo, all blocks in native names": (lambda: wild.hunyuan_video(20, 40, True), "HunyuanVideo"),
    "HunyuanVideo, double blocks in native names": (lambda: wild.hunyuan_video(20, 0, True), "HunyuanVideo"),
    "HunyuanVideo in diffusers' names": (
        lambda: wild.some_lora(
            *(f"transformer.transformer_blocks.{n}.attn.to_q" for n in range(20)),
            *(f"transformer.single_transformer_blocks.{n}.attn.to_q" for n in range(40)),
        ),
        "HunyuanVideo",
    ),
    "FLUX.2 dev by width": (
        lambda: wild.peft(
            "diffusion_model.double_blocks.0.img_attn.proj", torch.ones(6144, 1), torch.ones(1, 6144)
        ),
        "FLUX.2 dev",
    ),
    "FLUX.2 dev by its number of blocks": (
        lambda: wild.some_lora(
            *(f"transformer.single_transformer_blocks.{n}.attn.to_qkv_mlp_proj" for n in range(48))
        ),
        "FLUX.2 dev",
    ),
    "AuraFlow, attention": (wild.aura_flow, "AuraFlow (Pony V7)"),
    "HiDream by OneTrainer": (
        lambda: wild.some_lora("transformer.double_stream_blocks.0.block.attn1.to_q", style="kohya"),
        "HiDream",
    ),
    "LTX-Video": (
        lambda: wild.some_lora(
            *(f"diffusion_model.transformer_blocks.{n}.attn{a}.to_q" for n in range(28) for a in (1, 2))
        ),
        "LTX-Video",
    ),
    "LTX-Video in diffusers' names": (
        lambda: wild.some_lora(*(f"transformer.transformer_blocks.{n}.attn1.to_q" for n in range(28))),
        "LTX-Video",
    ),
    "SD 3.5 Medium": (
        lambda: wild.some_lora(
            *(f"transformer.transformer_blocks.{n}.attn{a}.to_q" for n in range(13) for a in ("", "2"))
        ),
        "Stable Diffusion 3",
    ),
    "SD 3 on a few blocks, by width": (
        lambda: wild.peft(
            "transformer.transformer_blocks.6.attn.to_q", torch.ones(1536, 1), torch.ones(1, 1536)
        ),
        "Stable Diffusion 3",
    ),
    "LTX-Video in diffusers' names, by its text": (
        lambda: wild.some_lora(
            *(f"transformer.transformer_blocks.0.attn{a}.to_{x}" for a in (1, 2) for x in "qkv")
        ),
        "LTX-Video",
    ),
    "SD 3.5 Large, attention, by width": (
        lambda: wild.peft(
            "transformer.transformer_blocks.30.attn.to_q", torch.ones(2432, 1), torch.ones(1, 2432)
        ),
        "Stable Diffusion 3.5 Large",
    ),
    "SD 3.5 Large, by a block that FLUX.1 does not have": (
        lambda: wild.some_lora(
            *(f"transformer.transformer_blocks.30.{x}" for x in ("attn.to_q", "ff_context.net.2"))
        ),
        "Stable Diffusion 3.5",
    ),
    "Cosmos-Predict2 14B by width": (
        lambda: wild.peft(
            "diffusion_model.blocks.0.self_attn.q_proj", torch.ones(5120, 1), torch.ones(1, 5120)
        ),
        "Cosmos-Predict2 14B",
    ),
    "FLUX.2 in diffusers' names, by width": (
        lambda: wild.peft(
            "transformer.transformer_blocks.0.attn.to_k", torch.ones(6144, 1), torch.ones(1, 6144)
        ),
        "FLUX.2",
    ),
    "SD 2.x on a few blocks, by its context": (
        lambda: wild.peft(
            "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
            torch.ones(640, 1),
            torch.ones(1, 1024),
        ),
        "Stable Diffusion 2.x",
    ),
}


@pytest.mark.parametrize("case", OTHER_MODELS)
def test_a_lora_of_another_model_is_told_by_that_models_name(tmp_path: Path, case: str) -> None:
    make, model = OTHER_MODELS[case]
    sentence = refusal_of(Wild(make()).save(tmp_path / "odd.safetensors"))
    assert f'"odd.safetensors" was made for {model}' in sentence
    assert "choose a LoRA" in sentence


@pytest.mark.parametrize(
    ("key", "value", "model"),
    [
        ("modelspec.architecture", "hunyuan-video/lora", "HunyuanVideo"),
        ("ss_base_model_version", "flux2_klein_4b", "FLUX.2"),
        ("modelspec.architecture", "stable-diffusion-3-m/lora", "Stable Diffusion 3"),
    ],
)
def test_where_names_and_sizes_are_those_of_flux_the_header_is_quoted(
    tmp_path: Path, key: str, value: str, model: str
) -> None:
    """A warning, not a refusal: headers are written by hand too, and the loaded checkpoint decides."""
    lora = Wild(wild.klein(attention_only=True), metadata={key: value})
    (warning,) = analysis_of(tmp_path, lora, wild.flux_partner()).warnings
    assert f"The header of the subject LoRA subject.safetensors says that it was made for {model}" in warning


@pytest.mark.parametrize("value", ["flux-1-dev/lora", "flux.1", "flux-1-schnell", ""])
def test_of_a_header_that_names_flux_1_there_is_nothing_to_say(tmp_path: Path, value: str) -> None:
    lora = dataclasses.replace(wild.flux_partner(1), metadata={"modelspec.architecture": value})
    assert assert_planned(tmp_path, lora, wild.flux_partner()).warnings == []


def test_what_neither_names_nor_sizes_nor_header_tell_is_planned(tmp_path: Path) -> None:
    """FLUX.2 Klein 4B's attention has FLUX.1's names and sizes: only the loaded checkpoint can tell."""
    klein = Wild(wild.klein(attention_only=True))
    assert analysis_of(tmp_path, klein, wild.flux_partner()).plan.gamma > 0


# Not LoRAs, or not LoRAs for a WebUI


def blocks(stem: str, **roles: Tensor) -> dict[str, Tensor]:
    return {f"{stem}.{role.replace('__', '.')}": tensor for role, tensor in roles.items()}


ALPHA = torch.tensor(0.001)
QKV = "lora_unet_double_blocks_0_img_attn_qkv"
NOT_FOR_US: dict[str, tuple[Callable[[], dict[str, Tensor]], str]] = {
    "OFT by sd-scripts for FLUX": (
        lambda: blocks(
            "oft_unet_double_blocks_1_img_attn_proj", oft_blocks__0=torch.ones(4, 3, 3), alpha=ALPHA
        ),
        "is an OFT, BOFT or IA3 network",
    ),
    "OFT by LyCORIS": (
        lambda: blocks(STEM, oft_blocks=torch.ones(4, 8, 8), alpha=ALPHA),
        "is an OFT, BOFT or IA3 network",
    ),
    "BOFT by LyCORIS": (
        lambda: blocks(STEM, oft_blocks=torch.ones(3, 4, 8, 8), alpha=ALPHA, rescale=torch.ones(32, 1)),
        "is an OFT, BOFT or IA3 network",
    ),
    "OFT by OneTrainer": (
        lambda: blocks(STEM, oft_R__weight=torch.ones(4, 28)),
        "is an OFT, BOFT or IA3 network",
    ),
    "IA3": (
        lambda: blocks(STEM, weight=torch.ones(32, 1), on_input=torch.tensor(False)),
        "is an OFT, BOFT or IA3 network",
    ),
    "FLUX converted for Nunchaku": (
        lambda: blocks(
            "transformer_blocks.0.qkv_proj", lora_down=torch.ones(8, 16), lora_up=torch.ones(8, 16)
        ),
        "is a FLUX LoRA converted for Nunchaku: choose the LoRA that it was made from",
    ),
    "ControlNet-LLLite": (
        lambda: {
            "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.depth.0.weight": torch.ones(4, 4)
        },
        "is a ControlNet-LLLite",
    ),
    "Stability's Control-LoRA": (
        lambda: (
            blocks(
                "input_blocks.4.1.transformer_blocks.0.attn1.to_q", up=torch.ones(8, 2), down=torch.ones(2, 8)
            )
            | {"lora_controlnet": torch.zeros(0)}
        ),
        "is a Control-LoRA",
    ),
    "a training state of sd-scripts": (
        lambda: blocks(
            QKV, lora_down__0__weight=torch.ones(2, 12), lora_up__0__weight=torch.ones(12, 2), alpha=ALPHA
        ),
        "is part of a training state of sd-scripts: choose the LoRA that was saved beside that state",
    ),
    "OneTrainer's internal file": (wild.onetrainer_internal, "is OneTrainer's internal copy of a LoRA"),
}


@pytest.mark.parametrize("case", NOT_FOR_US)
def test_an_adapter_that_is_no_lora_for_a_webui_is_said_as_it_is(tmp_path: Path, case: str) -> None:
    make, words = NOT_FOR_US[case]
    sentence = refusal_of(Wild(make()).save(tmp_path / "odd.safetensors"))
    assert words in sentence
    assert "choose" in sentence


@pytest.mark.parametrize(
    "stem",
    [
        "transformer.some_new_model.3.attention.q",
        "lora_unet_something_else_q",
        "text_model.encoder.layers.0.odd",
        "encoder.conv_in",
    ],
)
@pytest.mark.parametrize("style", ["peft", "kohya"])
def test_a_lora_is_never_called_a_models_weights(tmp_path: Path, stem: str, style: str) -> None:
    sentence = refusal_of(Wild(wild.some_lora(stem, style=style)).save(tmp_path / "odd.safetensors"))
    assert f"is not a LoRA for {listed('or')} in any key names that K-LoRA knows" in sentence
    assert "weights," not in sentence


# Prefixes

KOHYA = ".lora_up.weight", ".lora_down.weight"
PEFT = ".lora_B.weight", ".lora_A.weight"
ACCIDENTS = {
    "lora_unet__": "lora_unet__middle_block_1_proj_in",
    "_orig_mod of torch.compile, kohya": "lora_unet__orig_mod_middle_block_1_proj_in",
    "_orig_mod of a compiled block, kohya": "lora_unet_middle_block_1__orig_mod_proj_in",
    "_orig_mod, dotted": "unet._orig_mod.mid_block.attentions.0.proj_in",
    "_orig_mod of a compiled block, dotted": "unet.mid_block.attentions.0._orig_mod.proj_in",
    "base_model.model. twice": "base_model.model.base_model.model.mid_block.attentions.0.proj_in",
    "both": "base_model.model.base_model.model._orig_mod.unet.mid_block.attentions.0.proj_in",
}


@pytest.mark.parametrize("accident", ACCIDENTS)
def test_a_prefix_by_accident_is_read_and_converted_for_the_hosts(tmp_path: Path, accident: str) -> None:
    make = Maker(8)
    up, down = make.matrix(32, 2), make.matrix(2, 32)
    stem = ACCIDENTS[accident]
    suffixes = KOHYA if stem.startswith("lora_unet") else PEFT
    old = Wild({stem + suffix: tensor for suffix, tensor in zip(suffixes, (up, down), strict=True)})
    lora = read_lora(old.save(tmp_path / "old.safetensors"))
    assert list(lora.layers) == ["middle_block.1.proj_in"]
    assert not hosts_read(lora)
    rewrite(lora, tmp_path / "new.safetensors")
    new = load_file(tmp_path / "new.safetensors")
    assert torch.equal(new["lora_unet_middle_block_1_proj_in.lora_up.weight"], up)
    assert torch.equal(new["lora_unet_middle_block_1_proj_in.lora_down.weight"], down)
    assert hosts_read(read_lora(tmp_path / "new.safetensors"))


@pytest.mark.parametrize(
    ("opening", "prefix"),
    [
        ("module.lora_unet_", "module."),
        ("my.own.lora_unet_", "my.own."),
        ("copy_of_lora_unet_", "copy_of_"),
    ],
)
def test_any_other_prefix_is_named(tmp_path: Path, opening: str, prefix: str) -> None:
    path = wild.sdxl_partner(1, opening=opening).save(tmp_path / "odd.safetensors")
    sentence = refusal_of(path)
    assert f'begin with "{prefix}"' in sentence
    assert "rename them without it" in sentence


# What a host reads by itself

READ_BY_THEMSELVES = {
    "kohya, SDXL": ("lora_unet_middle_block_1_proj_in", KOHYA, True),
    "kohya with diffusers names, SDXL": ("lora_unet_mid_block_attentions_0_proj_in", KOHYA, True),
    "kohya with diffusers names, SD 1.5": ("lora_unet_up_blocks_3_attentions_0_proj_in", KOHYA, True),
    "diffusers PEFT, FLUX": ("transformer.transformer_blocks.0.attn.to_q", PEFT, True),
    "fused projections of diffusers": ("transformer.transformer_blocks.0.attn.to_qkv", PEFT, False),
    "native names after transformer.": ("transformer.double_blocks.0.img_attn.proj", PEFT, False),
    "FLUX after unet.": ("unet.transformer_blocks.0.attn.to_q", PEFT, False),
    "an adapter's name": (
        "transformer.transformer_blocks.0.attn.to_q",
        (".lora_B.mine.weight", ".lora_A.mine.weight"),
        False,
    ),
}


@pytest.mark.parametrize("case", READ_BY_THEMSELVES)
def test_a_file_is_left_to_the_hosts_only_in_names_that_they_know(tmp_path: Path, case: str) -> None:
    stem, (up, down), known = READ_BY_THEMSELVES[case]
    lora = Wild({stem + up: torch.ones(36, 2), stem + down: torch.ones(2, 12)}).save(
        tmp_path / "a.safetensors"
    )
    assert hosts_read(read_lora(lora)) is known


def test_a_file_is_converted_for_the_names_of_a_few_of_its_keys(tmp_path: Path) -> None:
    odd = wild.some_lora("unet.mid_block.attentions.0.proj_in")
    lora = Wild(wild.sdxl_partner().tensors | odd).save(tmp_path / "a.safetensors")
    assert not hosts_read(read_lora(lora))


@pytest.mark.parametrize("role", ["lora_magnitude_vector", "lora_B.bias"])
def test_a_file_with_what_only_peft_knows_is_converted(tmp_path: Path, role: str) -> None:
    stem = "transformer.transformer_blocks.0.attn.to_q"
    lora = Wild(wild.some_lora(stem) | {f"{stem}.{role}": torch.ones(8)}).save(tmp_path / "a.safetensors")
    assert not hosts_read(read_lora(lora))


def test_what_is_unused_is_not_converted(tmp_path: Path) -> None:
    lora = read_lora(wild.simpletuner_fused("LoRA").save(tmp_path / "old.safetensors"))
    assert (lora.unknown_keys, len(lora.unused_keys)) == ((), 18)
    rewrite(lora, tmp_path / "new.safetensors")
    new = read_lora(tmp_path / "new.safetensors")
    assert (new.dialects, new.unused_keys, list(new.layers)) == (frozenset({"kohya"}), (), list(lora.layers))


# An unused tensor beside a used one

QKV_STEM, Q_STEM = (
    "transformer.transformer_blocks.0.attn.to_qkv",
    "transformer.transformer_blocks.0.attn.to_q",
)


def low_rank(stem: str, rows: int, gain: float = 1.0) -> dict[str, Tensor]:
    return wild.peft(stem, torch.full((rows, 2), gain), torch.ones(2, 12))


def loha(stem: str, gain: float) -> dict[str, Tensor]:
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    shapes = ((12, 2), (2, 12)) * 2
    return {f"{stem}.{name}": torch.full(shape, gain) for name, shape in zip(names, shapes, strict=True)}


BESIDE: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {
    "LoRA": (low_rank(QKV_STEM, 36), low_rank(Q_STEM, 12, 0.0)),
    "the other way round": (low_rank(Q_STEM, 12), low_rank(QKV_STEM, 36, 0.0)),
    "LoHa": (low_rank(QKV_STEM, 36), loha(Q_STEM, 0.0)),
    "a full difference": (low_rank(QKV_STEM, 36), {f"{Q_STEM}.diff": torch.zeros(12, 12)}),
    "network alpha 0": (
        low_rank(QKV_STEM, 36),
        {**low_rank(Q_STEM, 12), f"{Q_STEM}.alpha": torch.tensor(0.0)},
    ),
    "an empty bias too": (
        low_rank(QKV_STEM, 36),
        {**low_rank(Q_STEM, 12, 0.0), f"{Q_STEM}.diff_b": torch.zeros(12)},
    ),
    "the same place in other names": (
        low_rank(Q_STEM, 12),
        low_rank("lycoris_transformer_blocks_0_attn_to_q", 12, 0.0),
    ),
    "another adapter": (
        low_rank(Q_STEM, 12),
        {k.replace(".weight", ".idle.weight"): v for k, v in low_rank(Q_STEM, 12, 0.0).items()},
    ),
}


@pytest.mark.parametrize("case", BESIDE)
def test_an_unused_module_beside_a_used_one_is_left_out(tmp_path: Path, case: str) -> None:
    used, unused = BESIDE[case]
    alone = read_lora(Wild(used).save(tmp_path / "alone.safetensors"))
    both = read_lora(Wild({**used, **unused}).save(tmp_path / "both.safetensors"))
    assert both.layers == alone.layers
    assert sorted(both.unused_keys) == sorted(unused)


CHANGES: dict[str, dict[str, Tensor]] = {
    "a delta": low_rank(Q_STEM, 12, 2.0),
    "a bias": {**low_rank(Q_STEM, 12, 0.0), f"{Q_STEM}.diff_b": torch.ones(12)},
    "a magnitude": {**low_rank(Q_STEM, 12, 0.0), f"{Q_STEM}.dora_scale": torch.ones(12, 1)},
    "NaN": low_rank(Q_STEM, 12, float("nan")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_two_modules_that_both_change_a_layer_are_refused(tmp_path: Path, change: str) -> None:
    path = Wild({**low_rank(QKV_STEM, 36), **CHANGES[change]}).save(tmp_path / "odd.safetensors")
    assert "two tensors for one place" in refusal_of(path)


def test_two_adapters_in_one_file_are_said_as_they_are(tmp_path: Path) -> None:
    tensors = {
        f"base_model.model.mid_block.attentions.0.proj_in.lora_{end}.{adapter}.weight": torch.ones(8, 8)
        for adapter in ("default", "ink")
        for end in "AB"
    }
    sentence = refusal_of(Wild(tensors).save(tmp_path / "odd.safetensors"))
    assert '"odd.safetensors" holds two adapters, "default" and "ink"' in sentence
    assert "save each to a file of its own" in sentence


# NaN where nobody looks

NAN = float("nan")
NORM, FF = (
    "lora_unet_middle_block_1_norm",
    "lora_unet_middle_block_1_transformer_blocks_0_ff_net_2",
)
TE = "lora_te1_text_model_encoder_layers_0_mlp_fc1"


def nan(*shape: int) -> Tensor:
    return torch.full(shape, NAN)


BROKEN: dict[str, tuple[dict[str, Tensor], str]] = {
    "a text encoder": (wild.kohya(TE, nan(8, 2), torch.ones(2, 8)), f"{TE}.lora_up.weight"),
    "a text encoder's unscored factor": (
        wild.kohya(TE, torch.zeros(8, 2), nan(2, 8)),
        f"{TE}.lora_down.weight",
    ),
    "a layer that only one file changes": (
        wild.kohya(FF, nan(8, 2), torch.ones(2, 8)),
        f"{FF}.lora_up.weight",
    ),
    "a factor whose partner is zero": (
        wild.kohya(FF, torch.zeros(8, 2), nan(2, 8)),
        f"{FF}.lora_down.weight",
    ),
    "a norm": ({f"{NORM}.w_norm": nan(32), f"{NORM}.b_norm": torch.zeros(32)}, f"{NORM}.w_norm"),
    "a norm's bias": ({f"{NORM}.w_norm": torch.ones(32), f"{NORM}.b_norm": nan(32)}, f"{NORM}.b_norm"),
    "a bias": ({f"{STEM}.diff_b": nan(32)}, f"{STEM}.diff_b"),
    "a bias alone": ({f"{FF}.diff_b": nan(32)}, f"{FF}.diff_b"),
    "a magnitude": ({f"{STEM}.dora_scale": nan(32, 1)}, f"{STEM}.dora_scale"),
    "infinity": ({f"{STEM}.dora_scale": torch.full((32, 1), float("inf"))}, f"{STEM}.dora_scale"),
    "the factor of the base weights": (
        {
            f"{FF}.{role}.weight": nan(8, 8) if role == "a1" else torch.ones(8, 8)
            for role in ("a1", "a2", "b1", "b2")
        },
        f"{FF}.a1.weight",
    ),
}


@pytest.mark.parametrize("role", ["subject", "style"])
@pytest.mark.parametrize("part", BROKEN)
def test_nan_in_anything_that_is_applied_is_refused_before_it_is(
    tmp_path: Path, part: str, role: str
) -> None:
    tensors, key = BROKEN[part]
    good = wild.sdxl_partner(1).save(tmp_path / "good.safetensors")
    broken = Wild(wild.sdxl_partner().tensors | tensors).save(tmp_path / "broken.safetensors")
    pair = (broken, good) if role == "subject" else (good, broken)
    cache = ScoreCache(tmp_path / "cache")
    for _ in range(2):
        with pytest.raises(
            LoraFileError, match=r"of \"broken\.safetensors\" holds NaN or infinite numbers"
        ) as caught:
            analyze(*pair, Settings(), steps=2, cache=cache)
        assert f'"{key}"' in str(caught.value)


def test_what_is_not_scored_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = [wild.sdxl_partner(i).save(tmp_path / f"{i}.safetensors") for i in range(2)]
    cache = ScoreCache(tmp_path / "cache")
    analyze(pair[0], pair[1], Settings(), steps=2, cache=cache)
    monkeypatch.setattr(LoraFile, "check_unscored", lambda _: pytest.fail("looked at again"))
    analyze(pair[0], pair[1], Settings(), steps=2, cache=cache)


# Pairs


def b_lora(which: int, seed: int) -> Wild:
    """B-LoRA trains one block for the content and another for the style (arXiv 2403.14572)."""
    make = Maker(seed)
    stems = [f"unet.up_blocks.0.attentions.{which}.{leaf}" for leaf in wild.ATTENTION]
    ends = (".lora.up.weight", (32, 8)), (".lora.down.weight", (8, 32))
    return Wild({stem + end: make.matrix(*shape) for stem in stems for end, shape in ends})


DISJOINT = {
    "B-LoRA's content and style": lambda: (b_lora(0, 1), b_lora(1, 2)),
    "sd-scripts' train_blocks=double and =single": lambda: (
        wild.flux_partner(1, singles=()),
        wild.flux_partner(2, doubles=()),
    ),
}


@pytest.mark.parametrize("case", DISJOINT)
def test_halves_that_were_made_to_be_used_together_belong_into_the_prompt(tmp_path: Path, case: str) -> None:
    subject, style = DISJOINT[case]()
    with pytest.raises(PairError, match="put both into the prompt") as caught:
        analysis_of(tmp_path, subject, style)
    assert "no layer in common" in str(caught.value)
    assert "base model" not in str(caught.value)


def test_a_control_lora_is_warned_of(tmp_path: Path) -> None:
    (warning,) = analysis_of(tmp_path, wild.flux_partner(), wild.control_lora()).warnings
    assert "The style LoRA style.safetensors is a control LoRA (FLUX.1 Depth or Canny" in warning
    assert "choose another LoRA" in warning


def test_an_img_in_of_another_width_is_that_of_a_control_lora(tmp_path: Path) -> None:
    with pytest.raises(PairError, match="control LoRA") as caught:
        analysis_of(tmp_path, wild.with_img_in(wild.flux_partner(), 8), wild.control_lora())
    assert "img_in is 12×8 in the first and 12×16 in the second" in str(caught.value)


def test_an_image_input_of_another_width_is_that_of_an_inpainting_checkpoint(tmp_path: Path) -> None:
    subject, style = (
        wild.with_first_convolution(wild.sdxl_partner(seed), channels) for seed, channels in ((1, 4), (2, 9))
    )
    with pytest.raises(PairError, match="as for inpainting") as caught:
        analysis_of(tmp_path, subject, style)
    assert "input_blocks.0.0 is 12×36 in the first and 12×81 in the second" in str(caught.value)


# Containers


def test_a_git_lfs_pointer_is_said_to_be_one(tmp_path: Path) -> None:
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d' * 32}\nsize 228453372\n"
    for ending in ("safetensors", "pt"):
        (tmp_path / f"odd.{ending}").write_text(text, newline="\n")
        assert f'"odd.{ending}" is a git-lfs pointer of {len(text)} bytes' in refusal_of(
            tmp_path / f"odd.{ending}"
        )


@pytest.mark.parametrize("ending", ["pt", "ckpt", "bin", "PTH"])
def test_safetensors_under_another_ending_are_to_be_renamed(tmp_path: Path, ending: str) -> None:
    wild.sdxl_partner().save(tmp_path / f"odd.{ending}")
    assert f'the ending .{ending}: rename it to "odd.safetensors"' in refusal_of(tmp_path / f"odd.{ending}")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "pickle"])
def test_a_pytorch_file_under_the_ending_safetensors_is_to_be_renamed(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "odd.safetensors"
    torch.save(wild.sdxl_partner().tensors, path, _use_new_zipfile_serialization=zipped)
    assert 'is a PyTorch file with the wrong ending: rename it to "odd.pt"' in refusal_of(path)
    path.rename(tmp_path / "odd.pt")
    assert read_lora(tmp_path / "odd.pt").base == "sdxl"


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_an_archive_is_to_be_unpacked(tmp_path: Path, ending: str) -> None:
    wild.sdxl_partner().save(tmp_path / "inner.safetensors")
    with zipfile.ZipFile(tmp_path / f"odd.{ending}", "w") as archive:
        archive.write(tmp_path / "inner.safetensors", "my_lora.safetensors")
    assert "is a zip archive: unpack it" in refusal_of(tmp_path / f"odd.{ending}")
    (tmp_path / f"other.{ending}").write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(60))
    assert "is an archive: unpack it" in refusal_of(tmp_path / f"other.{ending}")


def with_header(path: Path, change: Callable[[dict[str, Any]], object], tensors: dict[str, Tensor]) -> Path:
    """A safetensors file whose header was changed by hand."""
    raw = save(tensors)
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    return path


def test_metadata_that_is_not_text_is_named(tmp_path: Path) -> None:
    metadata = {"name": "x", "ss_network_dim": 4, "ss_tag_frequency": {"img": {"x": 1}}}
    path = with_header(
        tmp_path / "odd.safetensors",
        lambda header: header.update(__metadata__=metadata),
        wild.sdxl_partner().tensors,
    )
    sentence = refusal_of(path)
    assert 'The metadata "ss_network_dim" in the header of "odd.safetensors" is not text' in sentence
    assert "save it again with all its metadata as text" in sentence


# Types of numbers that the installed libraries do not know

UP = f"{STEM}.lora_up.weight"
PAIR = {UP: torch.ones(32, 4, dtype=torch.int16), f"{STEM}.lora_down.weight": torch.ones(4, 32)}


def assert_too_old(sentence: str, library: str) -> None:
    assert f'"{UP}"' in sentence
    assert f"{library} does not know: take the LoRA saved in fp32, fp16 or bf16, or a newer" in sentence
    assert "again" not in sentence


def test_a_type_that_safetensors_does_not_know_is_named_with_its_version(tmp_path: Path) -> None:
    path = with_header(tmp_path / "odd.safetensors", lambda header: header[UP].update(dtype="F2"), PAIR)
    sentence = refusal_of(path)
    assert_too_old(sentence, f"safetensors {safetensors.__version__}")
    assert "the type F2" in sentence


@pytest.mark.parametrize("code", ["U16", "BF16", "F16", "I16"])
def test_types_that_every_version_of_safetensors_knows_are_not_called_too_new(
    tmp_path: Path, code: str
) -> None:
    path = with_header(tmp_path / "odd.safetensors", lambda header: header[UP].update(dtype=code), PAIR)
    if code in ("BF16", "F16"):
        assert read_lora(path).base == "sdxl"
    elif hasattr(torch, "uint16") or code == "I16":
        assert "holds" in refusal_of(path)
        assert "save the LoRA in fp32, fp16, bf16 or fp8" in refusal_of(path)
    else:
        assert_too_old(refusal_of(path), f"torch {torch.__version__}")


NOT_KNOWN = [
    AttributeError("module 'torch' has no attribute 'uint16'"),
    safetensors.SafetensorError("Dtype not understood: U16"),
]


@pytest.mark.parametrize("error", NOT_KNOWN, ids=str)
def test_a_type_that_torch_does_not_know_is_named_with_the_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path = with_header(tmp_path / "odd.safetensors", lambda header: header[UP].update(dtype="U16"), PAIR)

    class Old:
        def __enter__(self) -> Old:
            return self

        def __exit__(self, *_: object) -> None: ...

        def get_tensor(self, key: str) -> Tensor:
            if key == UP:
                raise error
            return PAIR[key]

    monkeypatch.setattr(safetensors, "safe_open", lambda *_, **__: Old())
    library = torch if isinstance(error, AttributeError) else safetensors
    with pytest.raises(LoraFileError) as caught:
        lora = read_lora(path)
        with lora.open() as delta_of:
            delta_of(next(iter(lora.layers)))
    assert_too_old(str(caught.value), f"{library.__name__} {library.__version__}")


def test_a_pytorch_file_of_a_newer_torch_is_said_to_be_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise pickle.UnpicklingError(
            "Weights only load failed. Unsupported class torch._utils._rebuild_tensor_v3"
        )

    torch.save(wild.sdxl_partner().tensors, tmp_path / "odd.pt")
    monkeypatch.setattr(torch, "load", load)
    sentence = refusal_of(tmp_path / "odd.pt")
    assert f"of a type that torch {torch.__version__} does not know" in sentence
    assert "fp16 or bf16, or a newer torch" in sentence


def test_a_broken_file_is_still_to_be_downloaded_again(tmp_path: Path) -> None:
    tensors = {UP: torch.ones(32, 4), f"{STEM}.lora_down.weight": torch.ones(4, 32)}
    path = with_header(
        tmp_path / "odd.safetensors", lambda header: header[UP].update(data_offsets=[4, 516]), tensors
    )
    assert "download or copy it again" in refusal_of(path)


# Text encoders

ENCODERS = {
    "text_encoder.encoder.layers.0.self_attn.q_proj": "te1:text_model.encoder.layers.0.self_attn.q_proj",
    "text_encoder_2.encoder.layers.31.mlp.fc1": "te2:text_model.encoder.layers.31.mlp.fc1",
    "text_encoder_2.final_layer_norm": "te2:text_model.final_layer_norm",
    "lora_te1_encoder_layers_3_self_attn_out_proj": "te1:text_model.encoder.layers.3.self_attn.out_proj",
    "lora_te2_encoder_layers_3_mlp_fc2": "te2:text_model.encoder.layers.3.mlp.fc2",
    "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q": "t5:encoder.block.0.layer.0.SelfAttention.q",
}


@pytest.mark.parametrize("name", ENCODERS)
def test_text_encoders_are_read_without_text_model_in_their_names(name: str) -> None:
    """transformers 5.6 and later call them so."""
    parsed = parse_key(f"{name}.alpha")
    assert parsed is not None
    assert parsed.target.layers == (ENCODERS[name],)


@pytest.mark.parametrize("opening", ["text_encoder.encoder", "text_encoder.text_model.encoder"])
def test_short_names_of_text_encoders_are_converted_for_the_hosts(tmp_path: Path, opening: str) -> None:
    """A host would leave them out without a word: it knows the long ones only."""
    denoiser = wild.some_lora("transformer.transformer_blocks.0.attn.to_q")
    te = wild.some_lora(f"{opening}.layers.0.mlp.fc1")
    lora = read_lora(Wild(denoiser | te).save(tmp_path / "old.safetensors"))
    assert dict(lora.text_encoder_layers) == {"te1": 1}
    assert hosts_read(lora) is ("text_model" in opening)
    rewrite(lora, tmp_path / "new.safetensors")
    new = load_file(tmp_path / "new.safetensors")
    assert f"{TE}.lora_up.weight" in new
    assert hosts_read(read_lora(tmp_path / "new.safetensors"))


def test_a_t5_under_its_diffusers_name_is_converted_for_the_hosts(tmp_path: Path) -> None:
    names = (
        "transformer.transformer_blocks.0.attn.to_q",
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
    )
    save_file(wild.some_lora(*names), tmp_path / "a.safetensors")
    assert not hosts_read(read_lora(tmp_path / "a.safetensors"))


def test_the_evaluation_that_all_is_held_against_knows_its_formulas() -> None:
    """On numbers small enough to be followed by hand."""
    ours, theirs = (
        {"a": (np.array([[3.0, -1.0], [0.0, 2.0]]), 1)},
        {"a": (np.array([[1.0, 1.0], [1.0, -4.0]]), 2)},
    )
    (layer,) = wild.expected_layers(ours, theirs)
    assert (layer.k, layer.subject_score, layer.style_score) == (2, 5.0, 5.0)
    assert wild.expected_gamma([layer]) == 6 / 7
    assert [row[0] for row in wild.expected_choices([layer], 1.0)][:12] == [1] * 11 + [0]
