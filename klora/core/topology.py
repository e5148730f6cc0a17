"""Every module of SDXL's UNet, FLUX's transformer and their text encoders, generated from how the networks are built.

A module has a native name (SGM/LDM for SDXL, BFL for FLUX, transformers for text encoders) and the name or names that
diffusers gives it. FLUX keeps q, k, v (and the MLP input of a single block) in one matrix where diffusers has one module
for each: such a module has pieces, stacked from top to bottom, and the layer of a piece is called "<native>:<piece>".
Sources: sgm/modules/diffusionmodules/openaimodel.py with sd_xl_base.yaml, black-forest-labs/flux model.py, and the
diffusers conversion scripts of both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

LINEAR, CONV, NORM = "linear", "conv", "norm"

DOUBLE_BLOCKS, SINGLE_BLOCKS = 19, 38
CLIP_LAYERS = {"te1": 12, "te2": 32}
T5_BLOCKS = 24


@dataclass(frozen=True)
class Module:
    """One module of a network.

    Attributes:
        native: its dotted path in the original network.
        diffusers: its dotted path in diffusers; one path a piece where diffusers splits it.
        kind: LINEAR, CONV or NORM; norms are carried by a LoRA, not scored.
        pieces: names of the stacked pieces, empty for a module that is one layer.
        halves_swapped: diffusers stores the two halves of the rows (shift, scale) in the other order.
    """

    native: str
    diffusers: tuple[str, ...]
    kind: str = LINEAR
    pieces: tuple[str, ...] = ()
    halves_swapped: bool = False

    @property
    def layers(self) -> tuple[str, ...]:
        """The canonical layer names, top rows first."""
        return tuple(f"{self.native}:{piece}" for piece in self.pieces) or (self.native,)


@cache
def sdxl_modules() -> tuple[Module, ...]:
    """All modules of SDXL's UNet: 3 levels of 320, 640 and 1280 channels with 0, 2 and 10 transformer blocks."""
    pairs = [
        ("time_embed.0", "time_embedding.linear_1", LINEAR),
        ("time_embed.2", "time_embedding.linear_2", LINEAR),
        ("label_emb.0.0", "add_embedding.linear_1", LINEAR),
        ("label_emb.0.2", "add_embedding.linear_2", LINEAR),
        ("input_blocks.0.0", "conv_in", CONV),
        ("out.0", "conv_norm_out", NORM),
        ("out.2", "conv_out", CONV),
        *_sdxl_down(),
        *_residual("middle_block.0", "mid_block.resnets.0", widens=False),
        *_transformer("middle_block.1", "mid_block.attentions.0", depth=10),
        *_residual("middle_block.2", "mid_block.resnets.1", widens=False),
        *_sdxl_up(),
    ]
    return tuple(Module(native, (diffusers,), kind) for native, diffusers, kind in pairs)


_Pairs = Iterator[tuple[str, str, str]]
_SDXL_DEPTHS = (0, 2, 10)


def _sdxl_down() -> _Pairs:
    for level, depth in enumerate(_SDXL_DEPTHS):
        for index in range(2):
            native, diffusers = f"input_blocks.{1 + 3 * level + index}", f"down_blocks.{level}"
            yield from _residual(
                f"{native}.0", f"{diffusers}.resnets.{index}", widens=level > 0 and index == 0
            )
            yield from _transformer(f"{native}.1", f"{diffusers}.attentions.{index}", depth)
        if level < 2:
            yield f"input_blocks.{3 * level + 3}.0.op", f"down_blocks.{level}.downsamplers.0.conv", CONV


def _sdxl_up() -> _Pairs:
    for level, depth in enumerate(reversed(_SDXL_DEPTHS)):
        for index in range(3):
            native, diffusers = f"output_blocks.{3 * level + index}", f"up_blocks.{level}"
            yield from _residual(f"{native}.0", f"{diffusers}.resnets.{index}", widens=True)
            yield from _transformer(f"{native}.1", f"{diffusers}.attentions.{index}", depth)
        if level < 2:
            yield f"output_blocks.{3 * level + 2}.2.conv", f"up_blocks.{level}.upsamplers.0.conv", CONV


def _residual(native: str, diffusers: str, widens: bool) -> _Pairs:
    yield f"{native}.in_layers.0", f"{diffusers}.norm1", NORM
    yield f"{native}.in_layers.2", f"{diffusers}.conv1", CONV
    yield f"{native}.emb_layers.1", f"{diffusers}.time_emb_proj", LINEAR
    yield f"{native}.out_layers.0", f"{diffusers}.norm2", NORM
    yield f"{native}.out_layers.3", f"{diffusers}.conv2", CONV
    if widens:
        yield f"{native}.skip_connection", f"{diffusers}.conv_shortcut", CONV


def _transformer(native: str, diffusers: str, depth: int) -> _Pairs:
    if depth == 0:
        return
    for name, kind in (("norm", NORM), ("proj_in", LINEAR), ("proj_out", LINEAR)):
        yield f"{native}.{name}", f"{diffusers}.{name}", kind
    attention = [
        f"{attn}.{part}" for attn in ("attn1", "attn2") for part in ("to_q", "to_k", "to_v", "to_out.0")
    ]
    linear = [*attention, "ff.net.0.proj", "ff.net.2"]
    for block in range(depth):
        for name in linear:
            yield (
                f"{native}.transformer_blocks.{block}.{name}",
                f"{diffusers}.transformer_blocks.{block}.{name}",
                LINEAR,
            )
        for name in ("norm1", "norm2", "norm3"):
            yield (
                f"{native}.transformer_blocks.{block}.{name}",
                f"{diffusers}.transformer_blocks.{block}.{name}",
                NORM,
            )


@cache
def flux_modules() -> tuple[Module, ...]:
    """All modules of FLUX.1's transformer: 19 double and 38 single blocks, 304 fused matrices inside them."""
    return (*_flux_ends(), *_flux_doubles(), *_flux_singles())


def _flux_ends() -> Iterator[Module]:
    for native, diffusers in (
        ("time_in", "timestep_embedder"),
        ("vector_in", "text_embedder"),
        ("guidance_in", "guidance_embedder"),
    ):
        yield Module(f"{native}.in_layer", (f"time_text_embed.{diffusers}.linear_1",))
        yield Module(f"{native}.out_layer", (f"time_text_embed.{diffusers}.linear_2",))
    yield Module("img_in", ("x_embedder",))
    yield Module("txt_in", ("context_embedder",))
    yield Module("final_layer.linear", ("proj_out",))
    yield Module("final_layer.adaLN_modulation.1", ("norm_out.linear",), halves_swapped=True)


_STREAMS = (
    ("img", ("to_q", "to_k", "to_v"), "to_out.0", "ff", "norm1", ("norm_q", "norm_k")),
    (
        "txt",
        ("add_q_proj", "add_k_proj", "add_v_proj"),
        "to_add_out",
        "ff_context",
        "norm1_context",
        ("norm_added_q", "norm_added_k"),
    ),
)


def _flux_doubles() -> Iterator[Module]:
    for block in range(DOUBLE_BLOCKS):
        diffusers = f"transformer_blocks.{block}"
        for stream, qkv, out, mlp, modulation, norms in _STREAMS:
            native = f"double_blocks.{block}.{stream}"
            yield Module(
                f"{native}_attn.qkv",
                tuple(f"{diffusers}.attn.{name}" for name in qkv),
                pieces=("q", "k", "v"),
            )
            yield Module(f"{native}_attn.proj", (f"{diffusers}.attn.{out}",))
            yield Module(f"{native}_mlp.0", (f"{diffusers}.{mlp}.net.0.proj",))
            yield Module(f"{native}_mlp.2", (f"{diffusers}.{mlp}.net.2",))
            yield Module(f"{native}_mod.lin", (f"{diffusers}.{modulation}.linear",))
            yield Module(f"{native}_attn.norm.query_norm", (f"{diffusers}.attn.{norms[0]}",), NORM)
            yield Module(f"{native}_attn.norm.key_norm", (f"{diffusers}.attn.{norms[1]}",), NORM)


def _flux_singles() -> Iterator[Module]:
    for block in range(SINGLE_BLOCKS):
        native, diffusers = f"single_blocks.{block}", f"single_transformer_blocks.{block}"
        split = (*(f"{diffusers}.attn.{name}" for name in ("to_q", "to_k", "to_v")), f"{diffusers}.proj_mlp")
        yield Module(f"{native}.linear1", split, pieces=("q", "k", "v", "mlp"))
        yield Module(f"{native}.linear2", (f"{diffusers}.proj_out",))
        yield Module(f"{native}.modulation.lin", (f"{diffusers}.norm.linear",))
        yield Module(f"{native}.norm.query_norm", (f"{diffusers}.attn.norm_q",), NORM)
        yield Module(f"{native}.norm.key_norm", (f"{diffusers}.attn.norm_k",), NORM)


@cache
def text_encoder_modules(encoder: str) -> tuple[Module, ...]:
    """All modules of "te1" (CLIP-L), "te2" (OpenCLIP bigG, by its transformers names) or "t5" (T5-XXL's encoder)."""
    names = _t5() if encoder == "t5" else _clip(CLIP_LAYERS[encoder])
    return tuple(Module(f"{encoder}:{name}", (name,), kind) for name, kind in names)


def _clip(layers: int) -> Iterator[tuple[str, str]]:
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


def _t5() -> Iterator[tuple[str, str]]:
    for block in range(T5_BLOCKS):
        path = f"encoder.block.{block}.layer"
        for name in ("0.SelfAttention.q", "0.SelfAttention.k", "0.SelfAttention.v", "0.SelfAttention.o"):
            yield f"{path}.{name}", LINEAR
        for name in ("1.DenseReluDense.wi_0", "1.DenseReluDense.wi_1", "1.DenseReluDense.wo"):
            yield f"{path}.{name}", LINEAR
        yield f"{path}.0.layer_norm", NORM
        yield f"{path}.1.layer_norm", NORM
    yield "encoder.block.0.layer.0.SelfAttention.relative_attention_bias", LINEAR
    yield "encoder.final_layer_norm", NORM
