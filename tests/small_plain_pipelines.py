"""Small random pipelines of Qwen-Image, Krea 2, ERNIE-Image and Wan, and pairs: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors.torch import save_file
from small_pipelines import _factors, _ready, _shapes, letter_tokenizer
from torch import Tensor

from klora.core.families import FAMILIES

TEXT_WIDTH = 32
_TEXT = {
    "vocab_size": 32, "hidden_size": TEXT_WIDTH, "intermediate_size": 32, "num_hidden_layers": 2,
    "head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048,
}  # fmt: skip
_ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1000.0}
_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": TEXT_WIDTH,
}
_AXES = (4, 6, 6)


def qwen_pipeline() -> Any:
    torch.manual_seed(3)
    config = transformers.Qwen2_5_VLConfig(
        text_config={**_TEXT, "rope_scaling": _ROPE, "rope_theta": 1000.0}, vision_config=_VISION,
        vocab_size=32, hidden_size=TEXT_WIDTH,
    )  # fmt: skip
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=TEXT_WIDTH, axes_dims_rope=_AXES,
    )  # fmt: skip
    return _pipeline(
        diffusers.QwenImagePipeline,
        transformer=transformer,
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config),
        vae=_video_vae(diffusers.AutoencoderKLQwenImage),
    )


def krea_pipeline() -> Any:
    torch.manual_seed(4)
    config = transformers.Qwen3VLConfig(
        text_config={**_TEXT, "rope_scaling": {**_ROPE, "mrope_interleaved": True}},
        vision_config={**_VISION, "deepstack_visual_indexes": [0]},
    )
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=4, num_key_value_heads=1,
        intermediate_size=96, timestep_embed_dim=32, text_hidden_dim=TEXT_WIDTH, num_text_layers=2,
        text_num_attention_heads=2, text_num_key_value_heads=2, text_intermediate_size=48,
        axes_dims_rope=_AXES,
    )  # fmt: skip
    return _pipeline(
        diffusers.Krea2Pipeline,
        transformer=transformer,
        text_encoder=transformers.Qwen3VLModel(config),
        text_encoder_select_layers=(1, 2),
        vae=_video_vae(diffusers.AutoencoderKLQwenImage),
    )


def ernie_pipeline() -> Any:
    torch.manual_seed(5)
    transformer = diffusers.ErnieImageTransformer2DModel(
        hidden_size=48, num_attention_heads=3, num_layers=2, ffn_hidden_size=96, in_channels=16,
        out_channels=16, text_in_dim=TEXT_WIDTH, rope_axes_dim=_AXES,
    )  # fmt: skip
    return _pipeline(
        diffusers.ErnieImagePipeline,
        transformer=transformer,
        text_encoder=transformers.MistralModel(transformers.MistralConfig(**_TEXT)),
        vae=diffusers.AutoencoderKLFlux2(
            block_out_channels=(8, 16, 16, 16), latent_channels=4, norm_num_groups=4, layers_per_block=1
        ),
    )


def wan_pipeline(two: bool = False) -> Any:
    torch.manual_seed(6)
    first, second = (
        diffusers.WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, freq_dim=32,
            text_dim=TEXT_WIDTH, ffn_dim=80, num_layers=2,
        )
        for _ in range(2)
    )  # fmt: skip
    config = transformers.UMT5Config(
        vocab_size=32, d_model=TEXT_WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=4
    )
    return _pipeline(
        diffusers.WanPipeline,
        transformer=first,
        transformer_2=second if two else None,
        boundary_ratio=0.9 if two else None,
        text_encoder=transformers.UMT5EncoderModel(config),
        vae=_video_vae(diffusers.AutoencoderKLWan),
    )


def _pipeline(kind: Any, transformer: torch.nn.Module, **parts: Any) -> Any:
    """Weights that begin as zeros are shaken: those that open the blocks are among them."""
    for name, parameter in transformer.named_parameters():
        if (parameter.dim() > 1 and not parameter.any()) or name.endswith("scale_shift_table"):
            parameter.data.normal_()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return _ready(kind(transformer=transformer, scheduler=scheduler, tokenizer=letter_tokenizer(), **parts))


PIPELINES: Mapping[str, Callable[[], Any]] = {
    "qwen": qwen_pipeline,
    "krea": krea_pipeline,
    "ernie": ernie_pipeline,
    "wan": wan_pipeline,
}


def write_pair(folder: Path, base: str, denoiser: torch.nn.Module) -> tuple[Path, Path]:
    """Random LoRAs on all blocks, the subject in kohya's keys, the style in those of diffusers."""
    shapes = _shapes(denoiser)
    names = {
        module.diffusers[0]: module.native
        for module in FAMILIES[base].modules
        if module.diffusers[0] in shapes and ("blocks." in module.native or "layers." in module.native)
    }
    subject: dict[str, Tensor] = {}
    style: dict[str, Tensor] = {}
    for name, native in names.items():
        down, up = _factors(name, shapes[name], 4, 1.5, 1)
        stem = f"lora_unet_{native.replace('.', '_')}"
        subject |= {
            f"{stem}.lora_down.weight": down,
            f"{stem}.lora_up.weight": up,
            f"{stem}.alpha": torch.tensor(4.0),
        }
        down, up = _factors(name, shapes[name], 8, 1.5, 2)
        style |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
    paths = folder / "subject.safetensors", folder / "style.safetensors"
    for path, tensors in zip(paths, (subject, style), strict=True):
        save_file(tensors, path)
    return paths


def _video_vae(kind: Any) -> Any:
    return kind(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
