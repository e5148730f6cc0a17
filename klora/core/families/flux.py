"""FLUX.1: dev, schnell, Krea, Kontext and Fill.

Native names are Black Forest Labs' (black-forest-labs/flux, model.py), where one matrix contains q, k, v (and
the MLP input of a single block), while diffusers has one module for each. The other names are those of
diffusers' conversion script.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from klora.core.families.base import DIFFUSERS_FUSED, XLABS, Alias, Block, Family, LayerShapes
from klora.core.topology import NORM, Module

DOUBLE_BLOCKS, SINGLE_BLOCKS = 19, 38


def flux_modules() -> Iterator[Module]:
    """All modules of FLUX.1's transformer: 19 double and 38 single blocks, 304 fused matrices inside them."""
    yield from _ends()
    yield from _doubles()
    yield from _singles()


def _ends() -> Iterator[Module]:
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


def _doubles() -> Iterator[Module]:
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


def _singles() -> Iterator[Module]:
    for block in range(SINGLE_BLOCKS):
        native, diffusers = f"single_blocks.{block}", f"single_transformer_blocks.{block}"
        split = (*(f"{diffusers}.attn.{name}" for name in ("to_q", "to_k", "to_v")), f"{diffusers}.proj_mlp")
        yield Module(f"{native}.linear1", split, pieces=("q", "k", "v", "mlp"), square=3, widths=7)
        yield Module(f"{native}.linear2", (f"{diffusers}.proj_out",))
        yield Module(f"{native}.modulation.lin", (f"{diffusers}.norm.linear",))
        yield Module(f"{native}.norm.query_norm", (f"{diffusers}.attn.norm_q",), NORM)
        yield Module(f"{native}.norm.key_norm", (f"{diffusers}.attn.norm_k",), NORM)


def _aliases() -> Iterator[Alias]:
    """XLabs' processors (XLabs-AI/x-flux) and diffusers' own fused projections (`fuse_qkv_projections`)."""
    for module in FLUX.modules:
        block, _, end = module.native.partition("_attn.")
        block = block.removesuffix(".img").removesuffix(".txt")
        number = "1" if ".img_attn" in module.native else "2"
        attention = module.diffusers[0].rpartition(".")[0]
        if end == "qkv":
            yield Alias(f"{block}.processor.qkv_lora{number}", module, module.layers, XLABS)
            fused = "to_qkv" if number == "1" else "to_added_qkv"
            yield Alias(f"{attention}.{fused}", module, module.layers, DIFFUSERS_FUSED)
        elif end == "proj":
            yield Alias(f"{block}.processor.proj_lora{number}", module, module.layers, XLABS)
        elif module.native.endswith(".linear1"):
            block = module.native.removesuffix(".linear1")
            yield Alias(f"{block}.processor.qkv", module, module.layers[:3], XLABS)
            yield Alias(f"{attention}.to_qkv", module, module.layers[:3], DIFFUSERS_FUSED)
        elif module.native.endswith(".linear2"):
            block = module.native.removesuffix(".linear2")
            yield Alias(f"{block}.processor.proj", module, module.layers, XLABS)


_WIDTHS = {
    1536: "Stable Diffusion 3 Medium",
    2432: "Stable Diffusion 3.5 Large",
    4096: "FLUX.2 Klein 9B",
    6144: "FLUX.2",
}
"""{columns of an attention projection: model}; FLUX.1 has 3072."""


def _other_by_size(name: str, rows: int, columns: int) -> str | None:
    """FLUX.2's gated MLP is 3 widths wide inside, its first matrix 6 widths high; FLUX.1 has 4 and 4."""
    if name.endswith((".linear1:mlp", "_mlp.0")):
        return "FLUX.2" if rows == 6 * columns else None
    if name.endswith("_mlp.2"):
        return "FLUX.2" if columns == 3 * rows else None
    if name.endswith(".linear2"):
        return "FLUX.2" if columns == 4 * rows else None
    return _WIDTHS.get(columns) if "_attn." in name or ".linear1:" in name else None


def _is_control(unknown_keys: Collection[str], shapes: LayerShapes) -> bool:
    """Black Forest Labs' Depth and Canny replace norms and widen the image input, as LoRAs for Fill do."""
    return any(key.endswith("_norm.scale") for key in unknown_keys) or (
        "img_in" in shapes and shapes["img_in"][1] in (128, 384)
    )


def _is_checkpoint(model: Any, denoiser: Any) -> bool:
    depths = [len(getattr(denoiser, name, ())) for name in ("double_blocks", "single_blocks")]
    return depths == [DOUBLE_BLOCKS, SINGLE_BLOCKS] and hasattr(denoiser, "vector_in")


def _is_pipeline(pipeline: Any) -> bool:
    return type(getattr(pipeline, "transformer", None)).__name__ == "FluxTransformer2DModel"


FLUX = Family(
    key="flux",
    name="FLUX.1",
    short_name="FLUX",
    words=("flux", "dev"),
    list_modules=flux_modules,
    list_aliases=_aliases,
    blocks={
        **dict.fromkeys(("img_in", "txt_in", "time_in", "vector_in", "guidance_in"), Block("in")),
        "double_blocks": Block("double", numbered=True),
        "single_blocks": Block("single", numbered=True),
        "final_layer": Block("out"),
    },
    component="transformer",
    text_encoders={"te1": "text_encoder", "t5": "text_encoder_2"},
    readable=("kohya", "diffusers PEFT"),
    is_checkpoint=_is_checkpoint,
    is_pipeline=_is_pipeline,
    other_by_size=_other_by_size,
    namesakes=(
        (r"chroma", "Chroma"),
        (r"flux[-_. ]?2", "FLUX.2"),
        (r"hunyuan", "HunyuanVideo"),
        (r"^(stable-diffusion-3|sd_?3)", "Stable Diffusion 3"),
        (r"qwen", "Qwen-Image"),
        (r"aura_?flow|pony-?v7", "AuraFlow (Pony V7)"),
    ),
    is_control=_is_control,
    schedule="s*",
)
