"""Small random pipelines of Z-Image and Lumina 2, with all their blocks: nothing is downloaded."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from small_pipelines import letter_tokenizer
from transformers import Gemma2Config, Gemma2Model, Qwen3Config, Qwen3Model

_TEXT = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip


def z_image_pipeline() -> ZImagePipeline:
    """Z-Image's 30 blocks and 4 of the refiners at a width of 48."""
    torch.manual_seed(1)
    transformer = ZImageTransformer2DModel(
        dim=48,
        n_layers=30,
        n_refiner_layers=2,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[8, 8, 8],
        in_channels=4,
    )
    for name, parameter in transformer.named_parameters():
        if name.endswith("pad_token"):
            torch.nn.init.normal_(parameter)
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return ZImagePipeline(
        vae=_vae(), transformer=transformer.eval(), scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=Qwen3Model(Qwen3Config(**_TEXT)).eval(), tokenizer=tokenizer,
    )  # fmt: skip


def lumina_2_pipeline() -> Lumina2Pipeline:
    """Lumina 2's 26 blocks and 4 of the refiners, 72 wide: 6 heads of queries, 2 of keys and values."""
    torch.manual_seed(2)
    transformer = Lumina2Transformer2DModel(
        hidden_size=72, num_layers=26, num_refiner_layers=2, num_attention_heads=6, num_kv_heads=2,
        cap_feat_dim=32, axes_dim_rope=(4, 4, 4), in_channels=4, multiple_of=8,
    )  # fmt: skip
    return Lumina2Pipeline(
        vae=_vae(), transformer=transformer.eval(), scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=Gemma2Model(Gemma2Config(**_TEXT)).eval(), tokenizer=letter_tokenizer(),
    )  # fmt: skip


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, layers_per_block=1,
        shift_factor=0.1, scaling_factor=0.4,
    ).eval()  # fmt: skip
