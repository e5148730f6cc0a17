"""The text encoders that LoRAs change besides the denoiser, with the module names that transformers uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from klora.core.families.base import Prefix
from klora.core.topology import LINEAR, NORM, Module

_Names = Iterator[tuple[str, str]]


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """One text encoder.

    Attributes:
        key: what the canonical names of its modules start with, before a colon.
        list_names: makes the dotted name and the kind of each of its modules.
        prefixes: what its keys start with in each dialect; every WebUI reads the first one.
        components: its names in diffusers' pipelines.
        also: keys of encoders whose module names may also follow its prefixes.
        diffusers_is_read: whether WebUIs read the keys that diffusers itself writes.
    """

    key: str
    list_names: Callable[[], _Names]
    prefixes: tuple[Prefix, ...]
    components: tuple[str, ...]
    also: tuple[str, ...] = ()
    diffusers_is_read: bool = True

    @cached_property
    def modules(self) -> tuple[Module, ...]:
        """All its modules."""
        return tuple(Module(f"{self.key}:{name}", (name,), kind) for name, kind in self.list_names())


def _clip(layers: int) -> _Names:
    for layer in range(layers):
        path = f"text_model.encoder.layers.{layer}"
        for name in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.out_proj",
            "mlp.fc1",
            "mlp.fc2",
        ):
            yield f"{path}.{name}", LINEAR
        yield f"{path}.layer_norm1", NORM
        yield f"{path}.layer_norm2", NORM
    yield "text_model.embeddings.token_embedding", LINEAR
    yield "text_model.embeddings.position_embedding", LINEAR
    yield "text_model.final_layer_norm", NORM
    yield "text_projection", LINEAR


def _t5() -> _Names:
    for block in range(24):
        path = f"encoder.block.{block}.layer"
        for name in ("0.SelfAttention.q", "0.SelfAttention.k", "0.SelfAttention.v", "0.SelfAttention.o"):
            yield f"{path}.{name}", LINEAR
        for name in ("1.DenseReluDense.wi_0", "1.DenseReluDense.wi_1", "1.DenseReluDense.wo"):
            yield f"{path}.{name}", LINEAR
        yield f"{path}.0.layer_norm", NORM
        yield f"{path}.1.layer_norm", NORM
    yield "encoder.block.0.layer.0.SelfAttention.relative_attention_bias", LINEAR
    yield "encoder.final_layer_norm", NORM


def _qwen3() -> _Names:
    for layer in range(28):
        path = f"layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{path}.self_attn.{name}", LINEAR
        for name in ("gate_proj", "up_proj", "down_proj"):
            yield f"{path}.mlp.{name}", LINEAR
        for name in ("self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm"):
            yield f"{path}.{name}", NORM


def _llm_adapter() -> _Names:
    for block in range(6):
        path = f"blocks.{block}"
        for attention in ("self_attn", "cross_attn"):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                yield f"{path}.{attention}.{name}", LINEAR
            for name in ("q_norm", "k_norm"):
                yield f"{path}.{attention}.{name}", NORM
        for name in ("mlp.0", "mlp.2"):
            yield f"{path}.{name}", LINEAR
        for name in ("norm_self_attn", "norm_cross_attn", "norm_mlp"):
            yield f"{path}.{name}", NORM
    yield "out_proj", LINEAR
    yield "norm", NORM


CLIP_L = TextEncoder(
    "te1",
    lambda: _clip(12),
    (
        Prefix("lora_te1_", "_", "kohya"),
        Prefix("lora_te_", "_", "kohya"),
        Prefix("text_encoders.clip_l.transformer.", ".", "ComfyUI"),
        Prefix("conditioner.embedders.0.transformer.", ".", "dotted native"),
        Prefix("text_encoder.", ".", "diffusers"),
    ),
    ("text_encoder",),
    also=("t5",),
)
CLIP_G = TextEncoder(
    "te2",
    lambda: _clip(32),
    (
        Prefix("lora_te2_", "_", "kohya"),
        Prefix("text_encoders.clip_g.transformer.", ".", "ComfyUI"),
        Prefix("text_encoder_2.", ".", "diffusers"),
    ),
    ("text_encoder_2",),
    also=("t5",),
)
T5 = TextEncoder(
    "t5",
    _t5,
    (
        Prefix("lora_te3_", "_", "kohya"),
        Prefix("text_encoders.t5xxl.transformer.", ".", "ComfyUI"),
        Prefix("text_encoder_3.", ".", "diffusers"),
    ),
    ("text_encoder_2", "text_encoder_3"),
    diffusers_is_read=False,
)

QWEN3 = TextEncoder(
    "qwen3",
    _qwen3,
    (
        Prefix("lora_te_", "_", "kohya"),
        Prefix("lora_te1_", "_", "kohya (lora_te1_)"),
        Prefix("text_encoders.qwen3_06b.transformer.model.", ".", "ComfyUI"),
        Prefix("text_encoders.qwen3_06b.model.", ".", "Forge Neo"),
        Prefix("text_encoder.qwen3.", ".", "sd-scripts' for ComfyUI"),
    ),
    ("text_encoder",),
    diffusers_is_read=False,
)
LLM_ADAPTER = TextEncoder(
    "llm_adapter",
    _llm_adapter,
    (
        Prefix("lora_te_llm_adapter_", "_", "kohya"),
        Prefix("lora_unet_llm_adapter_", "_", "kohya"),
        Prefix("lycoris_llm_adapter_", "_", "SimpleTuner LyCORIS"),
        Prefix("diffusion_model.llm_adapter.", ".", "dotted native"),
        Prefix("text_encoders.qwen3_06b.llm_adapter.", ".", "Forge Neo"),
        Prefix("base_model.model.llm_adapter.", ".", "raw PEFT"),
        Prefix("llm_adapter.", ".", "dotted native without prefix"),
        Prefix("text_conditioner.", ".", "diffusers"),
    ),
    ("text_conditioner",),
    diffusers_is_read=False,
)

TEXT_ENCODERS: Mapping[str, TextEncoder] = {
    encoder.key: encoder for encoder in (CLIP_L, CLIP_G, T5, QWEN3, LLM_ADAPTER)
}
"""{key: CLIP-L, OpenCLIP bigG, T5-XXL's encoder, and Anima's Qwen3 0.6B and adapter to T5's tokens}.

Forge reads T5 under the prefixes of all three of the first; diffusers calls FLUX's T5 text_encoder_2.
Anima's adapter is part of the denoiser in checkpoints and LoRA files, and of the text encoder in Forge Neo.
"""
