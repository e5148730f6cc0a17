"""LoRA files as trainers write them: real names, small matrices, and the plan that a pair should give.

The expected plan is computed in float64 with numpy alone, from the numbers that a file was made of. No reader
of ours takes part in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

WIDTH = 12
"""Of FLUX; of SDXL 32."""

RANK = 4
STEPS = 30
Tensors = dict[str, Tensor]
Deltas = dict[str, tuple[NDArray[np.float64], "int | None"]]
"""{canonical layer: (ΔW, rank, None for a matrix stored full)}."""

SDXL_BLOCKS = {
    "input_blocks.4.1": "down_blocks.1.attentions.0",
    "middle_block.1": "mid_block.attentions.0",
    "output_blocks.0.1": "up_blocks.0.attentions.0",
    "output_blocks.1.1": "up_blocks.0.attentions.1",
}
ATTENTION = tuple(
    f"transformer_blocks.0.{attention}.{projection}"
    for attention in ("attn1", "attn2")
    for projection in ("to_q", "to_k", "to_v", "to_out.0")
)


@dataclass
class Wild:
    """A file to be written, and its deltas."""

    tensors: Tensors = field(default_factory=dict)
    deltas: Deltas = field(default_factory=dict)
    metadata: dict[str, str] | None = None

    def save(self, path: Path) -> Path:
        save_file(
            {key: value.contiguous().clone() for key, value in self.tensors.items()}, path, self.metadata
        )
        return path


class Maker:
    """Random tensors from one seed."""

    def __init__(self, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)

    def matrix(self, *shape: int, gain: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        values = self._random.standard_normal(shape) * gain
        return torch.from_numpy(values.astype(np.float32)).to(dtype)

    def pair(self, rows: int, columns: int, rank: int = RANK) -> tuple[Tensor, Tensor]:
        """(up, down), of a loudness of its own, so that layers are chosen differently."""
        gain = 0.3 * float(np.exp(0.5 * self._random.standard_normal()))
        return self.matrix(rows, rank, gain=gain), self.matrix(rank, columns)


def exact(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.double().numpy()


def product(up: Tensor, down: Tensor, scale: float = 1.0) -> NDArray[np.float64]:
    return exact(up) @ exact(down) * scale


def cut(layer: str, delta: NDArray[np.float64], pieces: str, rank: int | None) -> Deltas:
    """The rows of a fused FLUX matrix by piece: "qkv", or "qkvm" where the MLP's are below them."""
    if not pieces:
        return {layer: (delta, rank)}
    width = delta.shape[1]
    rows = {piece: delta[i * width : (i + 1) * width] for i, piece in enumerate("qkv")}
    if pieces == "qkvm":
        rows["mlp"] = delta[3 * width :]
    return {f"{layer}:{piece}": (part, rank) for piece, part in rows.items()}


def kohya(stem: str, up: Tensor, down: Tensor, alpha: float = float(RANK)) -> Tensors:
    return {
        f"{stem}.lora_up.weight": up,
        f"{stem}.lora_down.weight": down,
        f"{stem}.alpha": torch.tensor(alpha),
    }


def peft(stem: str, up: Tensor, down: Tensor) -> Tensors:
    return {f"{stem}.lora_B.weight": up, f"{stem}.lora_A.weight": down}


def underscored(name: str) -> str:
    return name.replace(".", "_")


def flux_matrices(
    doubles: tuple[int, ...] = (0, 5), singles: tuple[int, ...] = (0, 20)
) -> list[tuple[str, int, int, str]]:
    """(BFL name, rows, columns, pieces) of the matrices of some blocks of FLUX.1."""
    h = WIDTH
    found = []
    for n in doubles:
        for stream in ("img", "txt"):
            block = f"double_blocks.{n}.{stream}"
            found += [(f"{block}_attn.qkv", 3 * h, h, "qkv"), (f"{block}_attn.proj", h, h, "")]
            found += [(f"{block}_mlp.0", 4 * h, h, ""), (f"{block}_mlp.2", h, 4 * h, "")]
    for n in singles:
        found += [
            (f"single_blocks.{n}.linear1", 7 * h, h, "qkvm"),
            (f"single_blocks.{n}.linear2", h, 5 * h, ""),
        ]
    return found


def flux_partner(
    seed: int = 100, doubles: tuple[int, ...] = (0, 5), singles: tuple[int, ...] = (0, 20)
) -> Wild:
    """A plain FLUX LoRA in kohya's fused keys."""
    make, wild = Maker(seed), Wild()
    for name, rows, columns, pieces in flux_matrices(doubles, singles):
        up, down = make.pair(rows, columns)
        wild.tensors |= kohya(f"lora_unet_{underscored(name)}", up, down)
        wild.deltas |= cut(name, product(up, down), pieces, RANK)
    return wild


def sdxl_partner(
    seed: int = 100, blocks: tuple[str, ...] = tuple(SDXL_BLOCKS), opening: str = "lora_unet_"
) -> Wild:
    """A plain SDXL LoRA in kohya's sgm keys, or the same under another opening."""
    make, wild = Maker(seed), Wild()
    for block in blocks:
        for leaf in ATTENTION:
            name = f"{block}.{leaf}"
            up, down = make.pair(32, 32)
            wild.tensors |= kohya(opening + underscored(name), up, down)
            wild.deltas[name] = product(up, down), RANK
    return wild


SHARED_BLOCKS = ("input_blocks.4.1", "middle_block.1")
"""Of SD 1.5's blocks those that SDXL has under the same names, as wide."""


def sd15_lora(
    seed: int,
    put: Callable[[str, Tensor, Tensor], Tensors],
    opening: str,
    separator: str,
    blocks: tuple[str, ...] = ("input_blocks.1.1", "input_blocks.4.1", "middle_block.1", "output_blocks.9.1"),
) -> Wild:
    """A plain LoRA for SD 1.5, as kohya trains it: context 768 wide, proj_in a 1x1 convolution."""
    names = {
        "input_blocks.1.1": "down_blocks.0.attentions.0",
        "input_blocks.4.1": "down_blocks.1.attentions.0",
        "middle_block.1": "mid_block.attentions.0",
        "output_blocks.9.1": "up_blocks.3.attentions.0",
    }
    make, wild = Maker(seed), Wild()
    for block in blocks:
        for leaf in ("proj_in", *ATTENTION):
            up, down = make.pair(32, 768 if leaf.endswith(("attn2.to_k", "attn2.to_v")) else 32)
            wild.deltas[f"{block}.{leaf}"] = product(up, down), RANK
            if leaf == "proj_in":
                up, down = up[..., None, None], down[..., None, None]
            wild.tensors |= put(opening + f"{names[block]}.{leaf}".replace(".", separator), up, down)
    return wild


def some_lora(*stems: str, style: str = "peft") -> Tensors:
    """Small pairs under these names, for files of which only the names matter."""
    make = Maker(1)
    put = peft if style == "peft" else kohya
    return {
        key: value for stem in stems for key, value in put(stem, make.matrix(8, 2), make.matrix(2, 8)).items()
    }


# Read, and planned


def aitoolkit_lokr(dtype: torch.dtype, opening: str) -> Wild:
    """ai-toolkit's LoKr for FLUX, at full rank by default: an unused alpha of 9999999999, inf in fp16."""
    make, wild = Maker(1), Wild()
    places = {
        "to_q": "img_attn.qkv:q",
        "to_k": "img_attn.qkv:k",
        "to_v": "img_attn.qkv:v",
        "to_out.0": "img_attn.proj",
    }
    for n in (0, 5):
        for leaf, layer in places.items():
            first, second = make.matrix(3, 3, dtype=dtype), make.matrix(4, 4, gain=0.1, dtype=dtype)
            name = f"transformer_blocks.{n}.attn.{leaf}"
            stem = opening + (name if opening.endswith(".") else underscored(name))
            alpha = torch.tensor(9999999999).to(dtype)
            wild.tensors |= {f"{stem}.lokr_w1": first, f"{stem}.lokr_w2": second, f"{stem}.alpha": alpha}
            wild.deltas[f"double_blocks.{n}.{layer}"] = np.kron(exact(first), exact(second)), None
    return wild


def simpletuner_fused(kind: str) -> Wild:
    """SimpleTuner with fused projections: LyCORIS saves to_qkv, and empty to_q, to_k and to_v beside it."""
    make, wild = Maker(2), Wild()
    alpha = torch.tensor(float(RANK))
    for n in (0, 5):
        stem = f"lycoris_transformer_blocks_{n}_attn_to_"
        layer = f"double_blocks.{n}.img_attn.qkv"
        if kind == "LoKr":
            first, second = make.matrix(6, 2), make.matrix(6, 6)
            wild.tensors |= {
                f"{stem}qkv.lokr_w1": first,
                f"{stem}qkv.lokr_w2": second,
                f"{stem}qkv.alpha": alpha,
            }
            wild.deltas |= cut(layer, np.kron(exact(first), exact(second)), "qkv", None)
        else:
            up, down = make.matrix(3 * WIDTH, RANK), make.matrix(RANK, WIDTH)
            wild.tensors |= kohya(f"{stem}qkv", up, down)
            wild.deltas |= cut(layer, product(up, down), "qkv", RANK)
        for part in "qkv":
            if kind == "LoKr":
                wild.tensors |= {
                    f"{stem}{part}.lokr_w1": make.matrix(2, 2),
                    f"{stem}{part}.lokr_w2": torch.zeros(6, 6),
                    f"{stem}{part}.alpha": alpha,
                }
            else:
                wild.tensors |= kohya(f"{stem}{part}", torch.zeros(WIDTH, RANK), make.matrix(RANK, WIDTH))
    return wild


def control_lora() -> Wild:
    """BFL's FLUX.1 Depth and Canny LoRAs: bare names, lora_B.bias, norm scales, a wide img_in."""
    make, wild = Maker(3), Wild()
    for name, rows, columns, pieces in [*flux_matrices(), ("img_in", WIDTH, 16, "")]:
        up, down = make.matrix(rows, RANK), make.matrix(RANK, columns)
        wild.tensors |= peft(name, up, down) | {f"{name}.lora_B.bias": make.matrix(rows, gain=0.01)}
        wild.deltas |= cut(name, product(up, down), pieces, RANK)
    for n in (0, 20):
        wild.tensors[f"single_blocks.{n}.norm.key_norm.scale"] = make.matrix(4)
    return wild


def with_img_in(wild: Wild, columns: int) -> Wild:
    make = Maker(4)
    stem = "lora_unet_img_in"
    return Wild(wild.tensors | kohya(stem, make.matrix(WIDTH, RANK), make.matrix(RANK, columns)), wild.deltas)


def with_first_convolution(wild: Wild, channels: int) -> Wild:
    make = Maker(4)
    up, down = make.matrix(WIDTH, RANK)[..., None, None], make.matrix(RANK, 9 * channels)
    factors = kohya("lora_unet_input_blocks_0_0", up, down.reshape(RANK, channels, 3, 3))
    return Wild(wild.tensors | factors, wild.deltas)


def alphas_in_the_header(alpha: int) -> Wild:
    """diffusers' save_lora_adapter: PEFT's settings as JSON in the header, with a pattern for one module."""
    odd = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    make = Maker(5)
    settings = f'{{"unet.r": {RANK}, "unet.lora_alpha": {alpha}, "unet.alpha_pattern": {{"{odd}": 2}}}}'
    wild = Wild(metadata={"lora_adapter_metadata": settings})
    for native, diffusers in SDXL_BLOCKS.items():
        for leaf in ATTENTION:
            up, down = make.matrix(32, RANK), make.matrix(RANK, 32)
            wild.tensors |= peft(f"unet.{diffusers}.{leaf}", up, down)
            scale = (2 if f"{diffusers}.{leaf}" == odd else alpha) / RANK
            wild.deltas[f"{native}.{leaf}"] = product(up, down, scale), RANK
    return wild


# Of other models


def hunyuan_video(doubles: int, singles: int, native: bool) -> Tensors:
    """musubi-tuner's names, or ComfyUI's native ones: 20 double and 40 single blocks, as wide as FLUX.1."""
    h, make = WIDTH, Maker(6)
    parts = (
        ("attn.qkv", "attn.proj", "mlp.0", "mlp.2", "mod.lin")
        if native
        else ("attn_qkv", "attn_proj", "mlp.fc1", "mlp.fc2", "mod.linear")
    )
    sizes = ((3 * h, h), (h, h), (4 * h, h), (h, 4 * h), (6 * h, h))
    matrices = [
        (f"double_blocks.{n}.{stream}_{part}", *size)
        for n in range(doubles) for stream in ("img", "txt") for part, size in zip(parts, sizes, strict=True)
    ]  # fmt: skip
    for n in range(singles):
        matrices += [(f"single_blocks.{n}.linear1", 7 * h, h), (f"single_blocks.{n}.linear2", h, 5 * h)]
    tensors: Tensors = {}
    for name, rows, columns in matrices:
        stem = f"diffusion_model.{name}" if native else f"lora_unet_{underscored(name)}"
        tensors |= kohya(stem, make.matrix(rows, RANK), make.matrix(RANK, columns))
    return tensors


def klein(attention_only: bool = False) -> Tensors:
    """FLUX.2 Klein 4B by ai-toolkit: BFL's names, 5 and 20 blocks, FLUX.1's width, a gated MLP."""
    h, make = WIDTH, Maker(7)
    matrices = [(f"double_blocks.{n}.{s}_attn.qkv", 3 * h, h) for n in range(5) for s in ("img", "txt")]
    matrices += [(f"double_blocks.{n}.{s}_attn.proj", h, h) for n in range(5) for s in ("img", "txt")]
    if not attention_only:
        matrices += [(f"double_blocks.{n}.img_mlp.0", 6 * h, h) for n in range(5)]
        matrices += [(f"double_blocks.{n}.img_mlp.2", h, 3 * h) for n in range(5)]
        matrices += [(f"single_blocks.{n}.linear1", 9 * h, h) for n in range(20)]
        matrices += [(f"single_blocks.{n}.linear2", h, 4 * h) for n in range(20)]
    tensors: Tensors = {}
    for name, rows, columns in matrices:
        tensors |= peft(f"diffusion_model.{name}", make.matrix(rows, RANK), make.matrix(RANK, columns))
    return tensors


def aura_flow() -> Tensors:
    """AuraFlow and Pony V7 in diffusers' names: FLUX's single blocks and joint_transformer_blocks."""
    return some_lora(
        *(
            f"transformer.single_transformer_blocks.{n}.attn.{x}"
            for n in range(32)
            for x in ("to_q", "to_k", "to_v")
        ),
        *(
            f"transformer.joint_transformer_blocks.{n}.attn.{x}"
            for n in range(4)
            for x in ("to_q", "to_k", "to_v")
        ),
    )


def chroma(opening: str) -> Tensors:
    """OneTrainer's and ai-toolkit's Chroma: FLUX.1's blocks and a guidance layer that FLUX.1 lacks."""
    guidance = [
        f"{opening}.distilled_guidance_layer.layers.{n}.{side}"
        for n in range(5)
        for side in ("in_layer", "out_layer")
    ]
    return some_lora(f"{opening}.transformer_blocks.0.attn.to_q", *guidance, style="kohya")


def onetrainer_internal() -> Tensors:
    """lora/lora.safetensors of a OneTrainer backup: OMI names, numbered q, k, v and MLP, clip_l. and t5."""
    numbered = [f"transformer.double_blocks.0.img_attn.qkv.{i}" for i in range(3)]
    numbered += [f"transformer.single_blocks.0.linear1.{i}" for i in range(4)]
    return some_lora(
        *numbered,
        "transformer.double_blocks.0.img_attn.proj",
        "clip_l.text_model.encoder.layers.0.mlp.fc1",
        style="kohya",
    )


# What should come of a pair


@dataclass(frozen=True)
class ExpectedLayer:
    """One layer of a plan; a layer that only one of the two changes is not scored."""

    name: str
    only: str | None
    k: int = 0
    subject_score: float = 0.0
    style_score: float = 0.0
    subject_abs_sum: float = 0.0
    style_abs_sum: float = 0.0


def expected_layers(subject: Deltas, style: Deltas) -> list[ExpectedLayer]:
    """K-LoRA eqs. (1)-(5) on whole matrices in float64."""
    return [_expected_layer(name, subject.get(name), style.get(name)) for name in sorted({*subject, *style})]


def _expected_layer(name: str, ours: tuple | None, theirs: tuple | None) -> ExpectedLayer:
    if ours is None or theirs is None:
        return ExpectedLayer(name, "style" if ours is None else "subject")
    (a, rank_a), (b, rank_b) = ours, theirs
    if rank_a is None and rank_b is None:
        rank_a = rank_b = min(a.shape)
    k = min((rank_a or rank_b) * (rank_b or rank_a), a.size)

    def top(delta: NDArray[np.float64]) -> float:
        return float(np.sort(np.abs(delta), axis=None)[-k:].sum())

    return ExpectedLayer(name, None, k, top(a), top(b), float(np.abs(a).sum()), float(np.abs(b).sum()))


def expected_gamma(layers: list[ExpectedLayer]) -> float:
    """K-LoRA eq. (9)."""
    return sum(layer.subject_abs_sum for layer in layers) / sum(layer.style_abs_sum for layer in layers)


def expected_choices(layers: list[ExpectedLayer], gamma: float) -> list[list[int]]:
    """K-LoRA eqs. (6)-(10) under S with α 1.5 and β 0.5: 1 is the subject."""

    def choice(layer: ExpectedLayer, step: int) -> int:
        if layer.only:
            return int(layer.only == "subject")
        return int(layer.subject_score >= layer.style_score * gamma * (1.5 * step / STEPS + 0.5))

    return [[choice(layer, step) for layer in layers] for step in range(STEPS)]
