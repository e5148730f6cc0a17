"""Small random pipelines with the real topology of SDXL and FLUX, and LoRA pairs for them."""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any

import tokenizers
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from klora.core.families.flux import flux_modules
from klora.core.families.sdxl import sdxl_modules
from klora.core.topology import Module


def sdxl_pipeline() -> StableDiffusionXLPipeline:
    """SDXL's blocks and names at a tenth of its width: 70 transformer blocks, 256-pixel images in seconds."""
    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        sample_size=32, block_out_channels=(32, 64, 128),
        layers_per_block=2, transformer_layers_per_block=(1, 2, 10),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4, 8), cross_attention_dim=64, use_linear_projection=True, norm_num_groups=8,
        addition_embed_type="text_time", addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=6 * 16 + 32,
    )  # fmt: skip
    tokenizer = _clip_tokenizer()
    return _ready(StableDiffusionXLPipeline(
        vae=_vae(), unet=unet, tokenizer=tokenizer, tokenizer_2=tokenizer,
        text_encoder=CLIPTextModel(_clip_config(12)),
        text_encoder_2=CLIPTextModelWithProjection(_clip_config(32)),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        add_watermarker=False,
    ))  # fmt: skip


def flux_pipeline() -> FluxPipeline:
    """FLUX.1's 19 double and 38 single blocks at a hidden size of 64."""
    torch.manual_seed(2)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=19, num_single_layers=38,
        attention_head_dim=16, num_attention_heads=4, axes_dims_rope=(4, 6, 6),
        joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True,
    )  # fmt: skip
    return _ready(FluxPipeline(
        vae=_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159, scaling_factor=0.3611),
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=CLIPTextModel(_clip_config(12)), tokenizer=_clip_tokenizer(),
        text_encoder_2=T5EncoderModel(
            T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=64, num_layers=4, num_heads=4)
        ),
        tokenizer_2=letter_tokenizer(),
    ))  # fmt: skip


def write_kohya(
    path: Path,
    denoiser: torch.nn.Module,
    *,
    base: str,
    rank: int,
    network_alpha: float,
    seed: int,
    strength: float,
) -> None:
    """A random LoRA on all attention and feed-forward layers, with kohya's key names (FLUX: fused)."""
    tensors: dict[str, Tensor] = {}
    shapes = _linear_shapes(denoiser)
    for module in _trained(base):
        rows = sum(shapes[name][0] for name in module.diffusers)
        down, up = _factors(
            module.native, (rows, shapes[module.diffusers[0]][1]), rank, strength * rank / network_alpha, seed
        )
        stem = "lora_unet_" + module.native.replace(".", "_")
        tensors |= {
            f"{stem}.lora_down.weight": down,
            f"{stem}.lora_up.weight": up,
            f"{stem}.alpha": torch.tensor(float(network_alpha)),
        }
    save_file(tensors, path, {"ss_network_dim": str(rank), "ss_network_alpha": str(network_alpha)})


def write_peft(
    path: Path, denoiser: torch.nn.Module, *, base: str, rank: int, seed: int, strength: float
) -> None:
    """The same with the key names of diffusers and PEFT (FLUX: split)."""
    tensors: dict[str, Tensor] = {}
    shapes = _linear_shapes(denoiser)
    prefix = {"sdxl": "unet", "flux": "transformer"}[base]
    for module in _trained(base):
        for name in module.diffusers:
            down, up = _factors(name, shapes[name], rank, strength, seed)
            tensors |= {f"{prefix}.{name}.lora_A.weight": down, f"{prefix}.{name}.lora_B.weight": up}
    save_file(tensors, path)


def _linear_shapes(denoiser: torch.nn.Module) -> dict[str, tuple[int, int]]:
    return {
        name: (module.out_features, module.in_features)
        for name, module in denoiser.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def _trained(base: str) -> list[Module]:
    modules = sdxl_modules() if base == "sdxl" else flux_modules()
    parts = (
        (".attn1.", ".attn2.", ".ff.")
        if base == "sdxl"
        else ("_attn.qkv", "_attn.proj", "_mlp.", "linear1", "linear2")
    )
    return [
        module
        for module in modules
        if module.kind == "linear" and any(part in module.native for part in parts)
    ]


def _factors(
    name: str, shape: tuple[int, int], rank: int, strength: float, seed: int
) -> tuple[Tensor, Tensor]:
    """down (rank, columns) and up (rows, rank), with a few strong entries and a size for each layer."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ seed)
    rows, columns = shape
    size = strength * math.exp(0.5 * torch.randn((), generator=generator).clamp(-2, 2).item())
    down = torch.randn(rank, columns, generator=generator) ** 3 / 4
    up = torch.randn(rows, rank, generator=generator)
    return (down / math.sqrt(columns)).half(), (up * size / math.sqrt(rank)).half()


def _ready(pipeline: Any) -> Any:
    """Without dropout, as a loaded model is."""
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    return pipeline


def _vae(**more: Any) -> AutoencoderKL:
    blocks = 4
    return AutoencoderKL(
        block_out_channels=(8, 16, 16, 16), down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks, latent_channels=4, norm_num_groups=4,
        layers_per_block=1, **more,
    )  # fmt: skip


def _bytes() -> list[str]:
    return sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def _clip_vocabulary() -> dict[str, int]:
    words = [*_bytes(), *(letter + "</w>" for letter in _bytes()), "<|startoftext|>", "<|endoftext|>"]
    return {word: index for index, word in enumerate(words)}


def _clip_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer(vocab=_clip_vocabulary(), merges=[], model_max_length=77)


def _clip_config(layers: int) -> CLIPTextConfig:
    size = len(_clip_vocabulary())
    return CLIPTextConfig(
        vocab_size=size, hidden_size=32, intermediate_size=64,
        num_hidden_layers=layers, num_attention_heads=2, projection_dim=32,
        bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1,
    )  # fmt: skip


def letter_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {
        word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"])
    }
    letters = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    letters.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )
