"""LoRAs of the base models in which nothing is fused, by names and sizes set down by hand.

No table of the reader has a part in them. Sizes keep what tells models apart: Krea 2's keys are a quarter as
high as wide, and Anima's text is half as wide as its image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

RANK, ALPHA = 4, 2.0

Size = tuple[int, int]


@dataclass(frozen=True)
class Layer:
    """A layer of a LoRA: its native name and diffusers' one."""

    native: str
    diffusers: str
    size: Size


def _layers(native: str, diffusers: str, parts: Mapping[tuple[str, str], Size]) -> list[Layer]:
    return [Layer(f"{native}{a}", f"{diffusers}{b}", size) for (a, b), size in parts.items()]


def _same(parts: Mapping[str, Size]) -> Mapping[tuple[str, str], Size]:
    return {(name, name): size for name, size in parts.items()}


_QWEN = {
    **dict.fromkeys(
        (
            "attn.to_q",
            "attn.to_k",
            "attn.to_v",
            "attn.to_out.0",
            "attn.add_q_proj",
            "attn.add_k_proj",
            "attn.add_v_proj",
            "attn.to_add_out",
        ),
        (16, 16),
    ),
    "img_mlp.net.0.proj": (64, 16),
    "img_mlp.net.2": (16, 64),
    "txt_mlp.net.0.proj": (64, 16),
    "txt_mlp.net.2": (16, 64),
    "img_mod.1": (96, 16),
    "txt_mod.1": (96, 16),
}
_QWEN_ENDS = {
    "img_in": (16, 8),
    "txt_in": (16, 24),
    "proj_out": (8, 16),
    "norm_out.linear": (32, 16),
    "time_text_embed.timestep_embedder.linear_1": (16, 12),
    "time_text_embed.timestep_embedder.linear_2": (16, 16),
}
_KREA = {
    ("attn.wq", "attn.to_q"): (16, 16),
    ("attn.wk", "attn.to_k"): (4, 16),
    ("attn.wv", "attn.to_v"): (4, 16),
    ("attn.gate", "attn.to_gate"): (16, 16),
    ("attn.wo", "attn.to_out.0"): (16, 16),
    ("mlp.gate", "ff.gate"): (40, 16),
    ("mlp.up", "ff.up"): (40, 16),
    ("mlp.down", "ff.down"): (16, 40),
}
_KREA_TEXT = {**_KREA, ("attn.wk", "attn.to_k"): (16, 16), ("attn.wv", "attn.to_v"): (16, 16)}
_KREA_ENDS = {
    ("first", "img_in"): (16, 8),
    ("last.linear", "final_layer.linear"): (8, 16),
    ("tmlp.0", "time_embed.linear_1"): (16, 12),
    ("tmlp.2", "time_embed.linear_2"): (16, 16),
    ("tproj.1", "time_mod_proj"): (96, 16),
    ("txtmlp.1", "txt_in.linear_1"): (16, 10),
    ("txtmlp.3", "txt_in.linear_2"): (16, 16),
    ("txtfusion.projector", "text_fusion.projector"): (1, 12),
}
_ANIMA = {
    **{
        (f"{a}_attn.{x}", f"{b}.{y}"): (16, 8) if a == "cross" and x in ("k_proj", "v_proj") else (16, 16)
        for a, b in (("self", "attn1"), ("cross", "attn2"))
        for x, y in (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("output_proj", "to_out.0"))
    },
    ("mlp.layer1", "ff.net.0.proj"): (64, 16),
    ("mlp.layer2", "ff.net.2"): (16, 64),
    ("adaln_modulation_self_attn.1", "norm1.linear_1"): (6, 16),
    ("adaln_modulation_self_attn.2", "norm1.linear_2"): (48, 6),
    ("adaln_modulation_cross_attn.1", "norm2.linear_1"): (6, 16),
    ("adaln_modulation_cross_attn.2", "norm2.linear_2"): (48, 6),
    ("adaln_modulation_mlp.1", "norm3.linear_1"): (6, 16),
    ("adaln_modulation_mlp.2", "norm3.linear_2"): (48, 6),
}
_ANIMA_ENDS = {
    ("x_embedder.proj.1", "patch_embed.proj"): (16, 17),
    ("final_layer.linear", "proj_out"): (8, 16),
    ("t_embedder.1.linear_1", "time_embed.t_embedder.linear_1"): (16, 16),
    ("t_embedder.1.linear_2", "time_embed.t_embedder.linear_2"): (48, 16),
    ("final_layer.adaln_modulation.1", "norm_out.linear_1"): (6, 16),
    ("final_layer.adaln_modulation.2", "norm_out.linear_2"): (32, 6),
}
_WAN = {
    **{
        (f"{a}_attn.{x}", f"{b}.{y}"): (16, 16)
        for a, b in (("self", "attn1"), ("cross", "attn2"))
        for x, y in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
    },
    ("cross_attn.k_img", "attn2.add_k_proj"): (16, 16),
    ("cross_attn.v_img", "attn2.add_v_proj"): (16, 16),
    ("ffn.0", "ffn.net.0.proj"): (40, 16),
    ("ffn.2", "ffn.net.2"): (16, 40),
}
_WAN_ENDS = {
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"): (16, 20),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"): (16, 16),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"): (16, 12),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"): (16, 16),
    ("time_projection.1", "condition_embedder.time_proj"): (96, 16),
    ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"): (10, 10),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"): (16, 10),
    ("head.head", "proj_out"): (8, 16),
}
_ERNIE = {
    **{f"self_attention.{name}": (16, 16) for name in ("to_q", "to_k", "to_v", "to_out.0")},
    "mlp.gate_proj": (48, 16),
    "mlp.up_proj": (48, 16),
    "mlp.linear_fc2": (16, 48),
}
_ERNIE_ENDS = {
    "text_proj": (16, 12),
    "time_embedding.linear_1": (16, 16),
    "time_embedding.linear_2": (16, 16),
    "adaLN_modulation.1": (96, 16),
    "final_norm.linear": (32, 16),
    "final_linear": (8, 16),
}

LAYERS: Mapping[str, list[Layer]] = {
    "qwen": [
        *(layer for n in (0, 59) for layer in _layers(*[f"transformer_blocks.{n}."] * 2, _same(_QWEN))),
        *_layers("", "", _same(_QWEN_ENDS)),
    ],
    "krea": [
        *(layer for n in (0, 27) for layer in _layers(f"blocks.{n}.", f"transformer_blocks.{n}.", _KREA)),
        *_layers("txtfusion.layerwise_blocks.1.", "text_fusion.layerwise_blocks.1.", _KREA_TEXT),
        *_layers("txtfusion.refiner_blocks.0.", "text_fusion.refiner_blocks.0.", _KREA_TEXT),
        *_layers("", "", _KREA_ENDS),
    ],
    "anima": [
        *(layer for n in (0, 27) for layer in _layers(f"blocks.{n}.", f"transformer_blocks.{n}.", _ANIMA)),
        *_layers("", "", _ANIMA_ENDS),
    ],
    "wan": [
        *(layer for n in (0, 39) for layer in _layers(*[f"blocks.{n}."] * 2, _WAN)),
        *_layers("", "", _WAN_ENDS),
    ],
    "ernie": [
        *(layer for n in (0, 35) for layer in _layers(*[f"layers.{n}."] * 2, _same(_ERNIE))),
        *_layers("", "", _same(_ERNIE_ENDS)),
    ],
}


def _flat(name: str) -> str:
    return name.replace(".", "_")


PEFT = (".lora_B.weight", ".lora_A.weight", None)
NAMED = (".lora_B.default.weight", ".lora_A.default.weight", None)
KOHYA = (".lora_up.weight", ".lora_down.weight", ".alpha")
Dialect = tuple[Callable[[Layer], str], tuple[str, str, "str | None"]]
DIALECTS: Mapping[str, Dialect] = {
    "kohya": (lambda layer: f"lora_unet_{_flat(layer.native)}", KOHYA),
    "native after diffusion_model.": (lambda layer: f"diffusion_model.{layer.native}", PEFT),
    "native after diffusion_model., kohya's suffixes": (
        lambda layer: f"diffusion_model.{layer.native}",
        KOHYA,
    ),
    "native after model.diffusion_model.": (lambda layer: f"model.diffusion_model.{layer.native}", PEFT),
    "native": (lambda layer: layer.native, PEFT),
    "native, adapter names": (lambda layer: layer.native, NAMED),
    "native, raw PEFT": (lambda layer: f"base_model.model.{layer.native}", PEFT),
    "diffusers": (lambda layer: f"transformer.{layer.diffusers}", PEFT),
    "diffusers, kohya's suffixes": (lambda layer: f"transformer.{layer.diffusers}", KOHYA),
    "diffusers without prefix": (lambda layer: layer.diffusers, PEFT),
    "diffusers, raw PEFT": (lambda layer: f"base_model.model.transformer.{layer.diffusers}", PEFT),
    "OneTrainer": (lambda layer: f"lora_transformer_{_flat(layer.diffusers)}", KOHYA),
    "SimpleTuner": (lambda layer: f"lycoris_{_flat(layer.diffusers)}", KOHYA),
}

READ_BY_NEO = {
    "qwen": {"kohya", "native after diffusion_model.", "diffusers"},
    "krea": {"kohya", "native after diffusion_model.", "diffusers"},
    "anima": {"kohya", "native after diffusion_model."},
    "wan": {"kohya", "native after diffusion_model."},
    "ernie": {"kohya", "native after diffusion_model.", "diffusers"},
}
"""The dialects in Forge Neo's key map (modules_forge/packages/comfy/lora.py) that K-LoRA leaves to it."""


def write(path: Path, base: str, dialect: str, seed: int = 0) -> Path:
    """One LoRA of a family, the same numbers in every dialect.

    Without an alpha key the scale of 0.5 is in `up`, which is exact.
    """
    stem_of, (up_key, down_key, alpha_key) = DIALECTS[dialect]
    generator = torch.Generator().manual_seed(seed)
    file: dict[str, Tensor] = {}
    for layer in LAYERS[base]:
        rows, columns = layer.size
        loudness = 2.0 ** torch.randint(-3, 1, (), generator=generator).item()
        up, down = _grid(generator, rows, RANK) * loudness, _grid(generator, RANK, columns)
        stem = stem_of(layer)
        file[stem + up_key] = up if alpha_key else up * (ALPHA / RANK)
        file[stem + down_key] = down
        if alpha_key:
            file[stem + alpha_key] = torch.tensor(ALPHA)
    save_file(file, path)
    return path


def _grid(generator: torch.Generator, rows: int, columns: int) -> Tensor:
    """fp16 multiples of 1/64, whose products are exact."""
    return (torch.randint(-64, 64, (rows, columns), generator=generator) / 64).half()
