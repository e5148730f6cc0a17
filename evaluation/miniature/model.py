"""The miniature's networks: SDXL's components, block types and names, but narrow and shallow.

Its tokenizer has whole words as tokens.
"""

from __future__ import annotations

import tokenizers
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerFast

from evaluation.miniature.world import SIZE, VOCABULARY

WIDTHS = (32, 64, 96)
TEXT_WIDTH, TEXT_LENGTH = 64, 16
TIME_IDS = [SIZE, SIZE, 0, 0, SIZE, SIZE]
START, END, UNKNOWN = "<start>", "<end>", "<unknown>"


def vae() -> AutoencoderKL:
    """4 latent channels at a quarter of the image's side."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 48), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, norm_num_groups=4, layers_per_block=1,
        sample_size=SIZE, mid_block_add_attention=False,
    )  # fmt: skip


def unet() -> UNet2DConditionModel:
    """SDXL's three levels, the first without attention."""
    return UNet2DConditionModel(
        sample_size=SIZE // 4, block_out_channels=WIDTHS, layers_per_block=2,
        transformer_layers_per_block=(1, 1, 1),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4, 4), cross_attention_dim=2 * TEXT_WIDTH, use_linear_projection=True,
        norm_num_groups=8, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=len(TIME_IDS) * 8 + TEXT_WIDTH,
    )  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of the world's captions."""
    words = {word: index for index, word in enumerate([END, START, UNKNOWN, *VOCABULARY])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=UNKNOWN))
    made.normalizer = tokenizers.normalizers.Lowercase()
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    ends = [(word, words[word]) for word in (START, END)]
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        unk_token=UNKNOWN,
        model_max_length=TEXT_LENGTH,
    )


def _text_config(layers: int) -> CLIPTextConfig:
    size = len(VOCABULARY) + 3
    return CLIPTextConfig(
        vocab_size=size, hidden_size=TEXT_WIDTH, intermediate_size=2 * TEXT_WIDTH, num_hidden_layers=layers,
        num_attention_heads=4, projection_dim=TEXT_WIDTH, max_position_embeddings=TEXT_LENGTH, bos_token_id=1,
        eos_token_id=0, pad_token_id=0,
    )  # fmt: skip


def scheduler() -> EulerDiscreteScheduler:
    """v-prediction, with enough noise to leave next to nothing of 16 by 16 latents."""
    return EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.02,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


def pipeline() -> StableDiffusionXLPipeline:
    """All components, untrained."""
    torch.manual_seed(0)
    words = tokenizer()
    return StableDiffusionXLPipeline(
        vae=vae(), unet=unet(), tokenizer=words, tokenizer_2=words,
        text_encoder=CLIPTextModel(_text_config(2)),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(3)), scheduler=scheduler(),
        add_watermarker=False,
    )  # fmt: skip
