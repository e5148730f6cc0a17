"""One LoRA written in every key dialect, with names written by hand, not taken from the reader's tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

RANK, ALPHA = 4, 2.0

_BLOCK = ".transformer_blocks.1."
_IN_BLOCK = (
    "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0",
    "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0",
)  # fmt: skip
SDXL_BLOCKS = {
    "input_blocks.4.1": "down_blocks.1.attentions.0",
    "input_blocks.8.1": "down_blocks.2.attentions.1",
    "middle_block.1": "mid_block.attentions.0",
    "output_blocks.0.1": "up_blocks.0.attentions.0",
    "output_blocks.5.1": "up_blocks.1.attentions.2",
}
SDXL_ATTENTION = {a + _BLOCK + name: b + _BLOCK + name for a, b in SDXL_BLOCKS.items() for name in _IN_BLOCK}
SDXL_OTHERS = {
    "input_blocks.4.1.proj_in": "down_blocks.1.attentions.0.proj_in",
    "middle_block.1.proj_out": "mid_block.attentions.0.proj_out",
    "output_blocks.3.1.transformer_blocks.0.ff.net.0.proj": (
        "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj"
    ),
    "output_blocks.3.1.transformer_blocks.0.ff.net.2": (
        "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.2"
    ),
    "time_embed.0": "time_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.7.0.emb_layers.1": "down_blocks.2.resnets.0.time_emb_proj",
}
SD15_BLOCKS = {
    "input_blocks.1.1": "down_blocks.0.attentions.0",
    "input_blocks.8.1": "down_blocks.2.attentions.1",
    "middle_block.1": "mid_block.attentions.0",
    "output_blocks.3.1": "up_blocks.1.attentions.0",
    "output_blocks.11.1": "up_blocks.3.attentions.2",
}
SD15_ATTENTION = {
    f"{a}.transformer_blocks.0.{name}": f"{b}.transformer_blocks.0.{name}"
    for a, b in SD15_BLOCKS.items()
    for name in _IN_BLOCK
}
_FIRST = ".transformer_blocks.0."
SD15_OTHERS = {
    f"output_blocks.6.1{_FIRST}ff.net.0.proj": f"up_blocks.2.attentions.0{_FIRST}ff.net.0.proj",
    f"output_blocks.6.1{_FIRST}ff.net.2": f"up_blocks.2.attentions.0{_FIRST}ff.net.2",
    "input_blocks.2.1.proj_in": "down_blocks.0.attentions.1.proj_in",
    "output_blocks.9.1.proj_out": "up_blocks.3.attentions.0.proj_out",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
    "input_blocks.9.0.op": "down_blocks.2.downsamplers.0.conv",
    "input_blocks.11.0.in_layers.2": "down_blocks.3.resnets.1.conv1",
    "middle_block.2.emb_layers.1": "mid_block.resnets.1.time_emb_proj",
    "output_blocks.2.1.conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks.8.2.conv": "up_blocks.2.upsamplers.0.conv",
    "output_blocks.11.0.skip_connection": "up_blocks.3.resnets.2.conv_shortcut",
}


@dataclass(frozen=True)
class Fused:
    """A FLUX matrix: its BFL name and its diffusers modules, one a piece, top rows first."""

    native: str
    diffusers: tuple[str, ...]
    pieces: tuple[str, ...] = ()

    def heights(self, width: int) -> list[int]:
        return [width, width, width, 4 * width][: len(self.pieces)]

    @property
    def layers(self) -> list[str]:
        return [f"{self.native}:{piece}" for piece in self.pieces] or [self.native]


def _double(n: int) -> list[Fused]:
    native, diffusers = f"double_blocks.{n}", f"transformer_blocks.{n}"
    qkv = ("q", "k", "v")
    return [
        Fused(f"{native}.img_attn.qkv", tuple(f"{diffusers}.attn.to_{p}" for p in qkv), qkv),
        Fused(f"{native}.txt_attn.qkv", tuple(f"{diffusers}.attn.add_{p}_proj" for p in qkv), qkv),
        Fused(f"{native}.img_attn.proj", (f"{diffusers}.attn.to_out.0",)),
        Fused(f"{native}.txt_attn.proj", (f"{diffusers}.attn.to_add_out",)),
        Fused(f"{native}.img_mlp.0", (f"{diffusers}.ff.net.0.proj",)),
        Fused(f"{native}.img_mlp.2", (f"{diffusers}.ff.net.2",)),
        Fused(f"{native}.txt_mlp.0", (f"{diffusers}.ff_context.net.0.proj",)),
        Fused(f"{native}.txt_mlp.2", (f"{diffusers}.ff_context.net.2",)),
        Fused(f"{native}.img_mod.lin", (f"{diffusers}.norm1.linear",)),
        Fused(f"{native}.txt_mod.lin", (f"{diffusers}.norm1_context.linear",)),
    ]


def _single(n: int) -> list[Fused]:
    native, diffusers = f"single_blocks.{n}", f"single_transformer_blocks.{n}"
    split = (*(f"{diffusers}.attn.to_{p}" for p in "qkv"), f"{diffusers}.proj_mlp")
    return [
        Fused(f"{native}.linear1", split, ("q", "k", "v", "mlp")),
        Fused(f"{native}.linear2", (f"{diffusers}.proj_out",)),
        Fused(f"{native}.modulation.lin", (f"{diffusers}.norm.linear",)),
    ]


FLUX_BLOCKS = [*_double(0), *_double(18), *_single(0), *_single(37)]
FLUX_ENDS = [
    Fused("img_in", ("x_embedder",)),
    Fused("txt_in", ("context_embedder",)),
    Fused("time_in.in_layer", ("time_text_embed.timestep_embedder.linear_1",)),
    Fused("vector_in.out_layer", ("time_text_embed.text_embedder.linear_2",)),
    Fused("guidance_in.in_layer", ("time_text_embed.guidance_embedder.linear_1",)),
    Fused("final_layer.linear", ("proj_out",)),
]
_XLABS_DOUBLE = {
    "img_attn.qkv": "qkv_lora1",
    "txt_attn.qkv": "qkv_lora2",
    "img_attn.proj": "proj_lora1",
    "txt_attn.proj": "proj_lora2",
}

Factors = dict[str, tuple[Tensor, Tensor]]


def sdxl_factors(width: int = 16, seed: int = 0, attention_only: bool = False) -> Factors:
    """{canonical layer: (up (rows, 4), down (4, columns))}, fp16, on a grid, so that products are exact."""
    names = SDXL_ATTENTION if attention_only else {**SDXL_ATTENTION, **SDXL_OTHERS}
    generator = torch.Generator().manual_seed(seed)
    return {name: (_grid(generator, width, RANK), _grid(generator, RANK, width)) for name in names}


def sd15_factors(width: int = 16, seed: int = 0, attention_only: bool = False) -> Factors:
    """The same for SD 1.5; the factors of its proj_in and proj_out have the shape of 1x1 convolutions."""
    names = SD15_ATTENTION if attention_only else {**SD15_ATTENTION, **SD15_OTHERS}
    generator = torch.Generator().manual_seed(seed)
    factors = {name: (_grid(generator, width, RANK), _grid(generator, RANK, width)) for name in names}
    return {
        name: tuple(part[..., None, None] for part in pair) if ".proj_" in name else pair
        for name, pair in factors.items()
    }


def flux_factors(modules: list[Fused], width: int = 12, seed: int = 0) -> Factors:
    """{BFL matrix: (up, down)} of fused matrices; see `sdxl_factors`."""
    generator = torch.Generator().manual_seed(seed)
    return {
        m.native: (_grid(generator, sum(m.heights(width)) or width, RANK), _grid(generator, RANK, width))
        for m in modules
    }


def _grid(generator: torch.Generator, rows: int, columns: int) -> Tensor:
    return (torch.randint(-64, 64, (rows, columns), generator=generator) / 64).half()


PEFT = (".lora_B.weight", ".lora_A.weight", None)
KOHYA = (".lora_up.weight", ".lora_down.weight", ".alpha")
MIDDLE = (".lora.up.weight", ".lora.down.weight", None)
Style = tuple[str, str, "str | None"]


def _put(file: dict[str, Tensor], stem: str, style: Style, up: Tensor, down: Tensor) -> None:
    """Without an alpha key the scale goes into `up`; 0.5 is exact."""
    up_key, down_key, alpha_key = style
    file[stem + up_key] = (up if alpha_key else up * (ALPHA / RANK)).contiguous().clone()
    file[stem + down_key] = down.contiguous().clone()
    if alpha_key:
        file[stem + alpha_key] = torch.tensor(ALPHA)


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _processor(name: str) -> str:
    block, _, projection = name.rpartition(".to_")
    return f"{block}.processor.to_{projection.removesuffix('.0')}_lora"


SDXL_DIALECTS: dict[str, tuple[Callable[[str, str], str], Style]] = {
    "kohya": (lambda native, diffusers: f"lora_unet_{_flat(native)}", KOHYA),
    "kohya with diffusers names": (lambda native, diffusers: f"lora_unet_{_flat(diffusers)}", KOHYA),
    "diffusers, lora.up keys": (lambda native, diffusers: f"unet.{diffusers}", MIDDLE),
    "diffusers PEFT": (lambda native, diffusers: f"unet.{diffusers}", PEFT),
    "raw PEFT": (
        lambda native, diffusers: f"base_model.model.{diffusers}",
        (".lora_B.default.weight", ".lora_A.default.weight", ".alpha"),
    ),
    "dotted native": (lambda native, diffusers: f"diffusion_model.{native}", KOHYA),
    "SimpleTuner LyCORIS": (lambda native, diffusers: f"lycoris_{_flat(diffusers)}", KOHYA),
}
"""Dialects that can name every layer: {dialect: (opening of the key by (sgm, diffusers) name, suffixes)}."""

_OLD = (".up.weight", ".down.weight", None)
SDXL_ATTENTION_DIALECTS: dict[str, tuple[Callable[[str, str], str], Style]] = {
    "diffusers, old attention processors": (lambda native, diffusers: f"unet.{_processor(diffusers)}", _OLD),
    "diffusers, old attention processors, bare": (lambda native, diffusers: _processor(diffusers), _OLD),
    "paper authors' (unet.unet.)": (lambda native, diffusers: f"unet.unet.{diffusers}", MIDDLE),
}

FLUX_FUSED_DIALECTS: dict[str, tuple[Callable[[str], str], Style]] = {
    "kohya": (lambda native: f"lora_unet_{_flat(native)}", KOHYA),
    "dotted native": (lambda native: f"diffusion_model.{native}", PEFT),
    "dotted native without prefix": (lambda native: native, PEFT),
    "raw PEFT": (lambda native: f"base_model.model.{native}", PEFT),
}
FLUX_SPLIT_DIALECTS: dict[str, tuple[Callable[[str], str], Style]] = {
    "diffusers PEFT": (lambda diffusers: f"transformer.{diffusers}", PEFT),
    "diffusers without prefix": (lambda diffusers: diffusers, PEFT),
    "OneTrainer": (lambda diffusers: f"lora_transformer_{_flat(diffusers)}", KOHYA),
    "SimpleTuner LyCORIS": (lambda diffusers: f"lycoris_{_flat(diffusers)}", KOHYA),
    "raw PEFT": (lambda diffusers: f"base_model.model.transformer.{diffusers}", PEFT),
}


def write_sdxl(path: Path, dialect: str, factors: Factors) -> Path:
    """Saves `factors` in a dialect of either SDXL table."""
    return _write_unet(path, dialect, factors, {**SDXL_ATTENTION, **SDXL_OTHERS})


def write_sd15(path: Path, dialect: str, factors: Factors) -> Path:
    """Saves `factors` in a dialect of either SDXL table, all of which trainers write for SD 1.5 too."""
    return _write_unet(path, dialect, factors, {**SD15_ATTENTION, **SD15_OTHERS})


def _write_unet(path: Path, dialect: str, factors: Factors, diffusers: dict[str, str]) -> Path:
    name, style = {**SDXL_DIALECTS, **SDXL_ATTENTION_DIALECTS}[dialect]
    file: dict[str, Tensor] = {}
    for native, (up, down) in factors.items():
        _put(file, name(native, diffusers[native]), style, up, down)
    save_file(file, path)
    return path


def write_flux_fused(path: Path, dialect: str, modules: list[Fused], factors: Factors) -> Path:
    """Saves the fused matrices as they are."""
    name, style = FLUX_FUSED_DIALECTS[dialect]
    file: dict[str, Tensor] = {}
    for module in modules:
        _put(file, name(module.native), style, *factors[module.native])
    save_file(file, path)
    return path


def write_flux_split(path: Path, dialect: str, modules: list[Fused], factors: Factors) -> Path:
    """Saves each piece by itself, with a copy of the shared down."""
    name, style = FLUX_SPLIT_DIALECTS[dialect]
    file: dict[str, Tensor] = {}
    for module in modules:
        up, down = factors[module.native]
        pieces = up.split(module.heights(down.shape[1])) if module.pieces else (up,)
        for diffusers, piece in zip(module.diffusers, pieces, strict=True):
            _put(file, name(diffusers), style, piece, down)
    save_file(file, path)
    return path


def write_flux_block_diagonal(path: Path, modules: list[Fused], factors: Factors) -> Path:
    """kohya's split_qkv: stacked downs, a block-diagonal up, and alpha times the number of downs."""
    file: dict[str, Tensor] = {}
    for module in modules:
        up, down = factors[module.native]
        pieces = up.split(module.heights(down.shape[1])) if module.pieces else (up,)
        stem = f"lora_unet_{_flat(module.native)}"
        _put(file, stem, KOHYA, torch.block_diag(*pieces), down.repeat(len(pieces), 1))
        file[f"{stem}.alpha"] = torch.tensor(ALPHA * len(pieces))
    save_file(file, path)
    return path


def write_xlabs(path: Path, factors: Factors) -> Path:
    """XLabs' processors: the attention of the blocks only, q, k, v of a single block without its MLP rows."""
    file: dict[str, Tensor] = {}
    for native, (up, down) in factors.items():
        kind, number, name = native.split(".", 2)
        if kind == "double_blocks" and name in _XLABS_DOUBLE:
            _put(file, f"{kind}.{number}.processor.{_XLABS_DOUBLE[name]}", _OLD, up, down)
        elif name == "linear1":
            _put(file, f"{kind}.{number}.processor.qkv_lora", _OLD, up[: 3 * down.shape[1]], down)
        elif name == "linear2":
            _put(file, f"{kind}.{number}.processor.proj_lora", _OLD, up, down)
    save_file(file, path)
    return path
