"""Small random pipelines built like SDXL, SD 1.5, FLUX.1, Chroma and FLUX.2 Klein, and LoRAs for them."""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any

import tokenizers
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    ChromaPipeline,
    ChromaTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
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
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

from klora.core.families import FAMILIES
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


def sd15_pipeline() -> StableDiffusionPipeline:
    """SD 1.5's blocks and names at a tenth of its width: 16 transformer blocks."""
    torch.manual_seed(3)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64, 128, 128), layers_per_block=2, attention_head_dim=8,
        cross_attention_dim=32, norm_num_groups=8,
    )  # fmt: skip
    return _ready(StableDiffusionPipeline(
        vae=_vae(), unet=unet, tokenizer=_clip_tokenizer(), text_encoder=CLIPTextModel(_clip_config(12)),
        scheduler=EulerDiscreteScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ))  # fmt: skip


def flux_pipeline() -> FluxPipeline:
    """FLUX.1's 19 double and 38 single blocks at a hidden size of 64."""
    torch.manual_seed(2)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=19,
        num_single_layers=38,
        attention_head_dim=16,
        num_attention_heads=4,
        axes_dims_rope=(4, 6, 6),
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
    )
    return _ready(
        FluxPipeline(
            vae=_flux_vae(),
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            text_encoder=CLIPTextModel(_clip_config(12)),
            tokenizer=_clip_tokenizer(),
            text_encoder_2=_t5(),
            tokenizer_2=letter_tokenizer(),
        )
    )


def chroma_pipeline() -> ChromaPipeline:
    """Chroma's 19 double and 38 single blocks at a hidden size of 64."""
    torch.manual_seed(3)
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=19,
        num_single_layers=38,
        attention_head_dim=16,
        num_attention_heads=4,
        axes_dims_rope=(4, 6, 6),
        joint_attention_dim=32,
        approximator_hidden_dim=32,
        approximator_num_channels=16,
    )
    return _ready(
        ChromaPipeline(
            vae=_flux_vae(),
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            text_encoder=_t5(),
            tokenizer=letter_tokenizer(),
        )
    )


def klein_pipeline() -> Flux2KleinPipeline:
    """FLUX.2 Klein 4B's 5 double and 20 single blocks at a hidden size of 64."""
    torch.manual_seed(4)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=5,
        num_single_layers=20,
        attention_head_dim=16,
        num_attention_heads=4,
        axes_dims_rope=(4, 4, 4, 4),
        joint_attention_dim=3 * 16,
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
    )
    encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=27,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    )
    return _ready(
        Flux2KleinPipeline(
            vae=vae,
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            text_encoder=encoder,
            tokenizer=letter_tokenizer(
                chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}"
            ),
            is_distilled=True,
        )
    )


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
    shapes = _shapes(denoiser)
    for module in _trained(base):
        rows = sum(shapes[name][0] for name in module.diffusers)
        shape = (rows, *shapes[module.diffusers[0]][1:])
        down, up = _factors(module.native, shape, rank, strength * rank / network_alpha, seed)
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
    shapes = _shapes(denoiser)
    prefix = FAMILIES[base].component
    for module in _trained(base):
        for name in module.diffusers:
            down, up = _factors(name, shapes[name], rank, strength, seed)
            tensors |= {f"{prefix}.{name}.lora_A.weight": down, f"{prefix}.{name}.lora_B.weight": up}
    save_file(tensors, path)


def _shapes(denoiser: torch.nn.Module) -> dict[str, torch.Size]:
    return {
        name: module.weight.shape
        for name, module in denoiser.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
    }


_PARTS = {
    "sdxl": (".attn1.", ".attn2.", ".ff."),
    "sd15": (".attn1.", ".attn2.", ".ff.", ".proj_in", ".proj_out"),
    "flux": ("_attn.qkv", "_attn.proj", "_mlp.", "linear1", "linear2", "distilled_guidance_layer"),
}
"""Of the names of what is trained; those of SD 1.5 are convolutions of one tap."""


def _trained(base: str) -> list[Module]:
    return [
        module
        for module in FAMILIES[base].modules
        if module.kind != "norm" and any(part in module.native for part in _PARTS.get(base, _PARTS["flux"]))
    ]


def _factors(
    name: str, shape: tuple[int, ...], rank: int, strength: float, seed: int
) -> tuple[Tensor, Tensor]:
    """down (rank, columns) and up (rows, rank), with a few strong entries and a size for each layer."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ seed)
    rows, columns, *taps = shape
    size = strength * math.exp(0.5 * torch.randn((), generator=generator).clamp(-2, 2).item())
    down = (torch.randn(rank, columns, generator=generator) ** 3 / 4 / math.sqrt(columns)).half()
    up = (torch.randn(rows, rank, generator=generator) * size / math.sqrt(rank)).half()
    return down.reshape(rank, columns, *taps), up.reshape(rows, rank, *taps)


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


def _flux_vae() -> AutoencoderKL:
    return _vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159, scaling_factor=0.3611)


def _t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=64, num_layers=4, num_heads=4))


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


def letter_tokenizer(**more: Any) -> PreTrainedTokenizerFast:
    vocabulary = {
        word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"])
    }
    letters = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    letters.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=letters,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=64,
        **more,
    )
