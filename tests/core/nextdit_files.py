"""LoRAs for Z-Image and Lumina 2 in every dialect, and Forge Neo's reading of them: names set by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

RANK, ALPHA, WIDTH = 4, 2.0, 12
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Matrix:
    """A matrix of the network: its native name, diffusers' names and the heights of its pieces, columns."""

    native: str
    diffusers: tuple[str, ...]
    heights: tuple[int, ...]
    columns: int = WIDTH

    @property
    def layers(self) -> list[str]:
        return [self.native] if len(self.heights) == 1 else [f"{self.native}:{piece}" for piece in "qkv"]


def _z_image_block(path: str) -> Iterator[Matrix]:
    attention, inner = f"{path}.attention", 32
    yield Matrix(f"{attention}.qkv", tuple(f"{attention}.to_{piece}" for piece in "qkv"), (WIDTH,) * 3)
    yield Matrix(f"{attention}.out", (f"{attention}.to_out.0",), (WIDTH,))
    for name, rows, columns in (("w1", inner, WIDTH), ("w2", WIDTH, inner), ("w3", inner, WIDTH)):
        yield Matrix(f"{path}.feed_forward.{name}", (f"{path}.feed_forward.{name}",), (rows,), columns)
    if not path.startswith("context"):
        yield Matrix(f"{path}.adaLN_modulation.0", (f"{path}.adaLN_modulation.0",), (4 * WIDTH,), 8)


def _lumina_block(path: str) -> Iterator[Matrix]:
    attention, other, inner = f"{path}.attention", f"{path}.attn", 4 * WIDTH
    heights = (WIDTH, WIDTH // 3, WIDTH // 3)
    yield Matrix(f"{attention}.qkv", tuple(f"{other}.to_{piece}" for piece in "qkv"), heights)
    yield Matrix(f"{attention}.out", (f"{other}.to_out.0",), (WIDTH,))
    for number, rows, columns in ((1, inner, WIDTH), (2, WIDTH, inner), (3, inner, WIDTH)):
        names = f"{path}.feed_forward.w{number}", (f"{path}.feed_forward.linear_{number}",)
        yield Matrix(*names, (rows,), columns)
    if not path.startswith("context"):
        yield Matrix(f"{path}.adaLN_modulation.1", (f"{path}.norm1.linear",), (4 * WIDTH,), WIDTH)


_BLOCKS = ("layers.0", "noise_refiner.1", "context_refiner.0")
MATRICES = {
    "z_image": [
        *(matrix for path in (*_BLOCKS, "layers.29") for matrix in _z_image_block(path)),
        Matrix("x_embedder", ("all_x_embedder.2-1",), (WIDTH,), 16),
        Matrix("cap_embedder.1", ("cap_embedder.1",), (WIDTH,), 8),
        Matrix("t_embedder.mlp.2", ("t_embedder.mlp.2",), (8,), 16),
        Matrix("final_layer.linear", ("all_final_layer.2-1.linear",), (16,)),
    ],
    "lumina_2": [
        *(matrix for path in (*_BLOCKS, "layers.25") for matrix in _lumina_block(path)),
        Matrix("x_embedder", ("x_embedder",), (WIDTH,), 16),
        Matrix("cap_embedder.1", ("time_caption_embed.caption_embedder.1",), (WIDTH,), 8),
        Matrix("t_embedder.mlp.2", ("time_caption_embed.timestep_embedder.linear_2",), (WIDTH,)),
        Matrix("final_layer.linear", ("norm_out.linear_2",), (16,)),
    ],
}
"""Some blocks and ends of each, by key of the family."""

QKV = {
    base: next(m for m in matrices if m.native == "layers.0.attention.qkv")
    for base, matrices in MATRICES.items()
}

KOHYA = ".lora_up.weight", ".lora_down.weight", ".alpha"
PEFT = ".lora_B.weight", ".lora_A.weight", None
Style = tuple[str, str, "str | None"]


def flat(name: str) -> str:
    return name.replace(".", "_")


FUSED: dict[str, tuple[Callable[[str], str], Style]] = {
    "kohya": (lambda name: f"lora_unet_{flat(name)}", KOHYA),
    "dotted native": (lambda name: f"diffusion_model.{name}", PEFT),
    "dotted native without prefix": (lambda name: name, PEFT),
    "raw PEFT": (lambda name: f"base_model.model.{name}", PEFT),
    "SimpleTuner LyCORIS": (lambda name: f"lycoris_{flat(name)}", KOHYA),
}
SPLIT: dict[str, tuple[Callable[[str], str], Style]] = {
    "musubi-tuner": (lambda name: f"lora_unet_{flat(name)}", KOHYA),
    "ai-toolkit": (lambda name: f"diffusion_model.{name}", PEFT),
    "diffusers PEFT": (lambda name: f"transformer.{name}", PEFT),
    "diffusers without prefix": (lambda name: name, PEFT),
    "raw PEFT": (lambda name: f"base_model.model.transformer.{name}", PEFT),
    "OneTrainer": (lambda name: f"lora_transformer_{flat(name)}", KOHYA),
    "SimpleTuner LyCORIS": (lambda name: f"lycoris_{flat(name)}", KOHYA),
}
DIALECTS = [
    *(("fused", name) for name in FUSED),
    *(("split", name) for name in SPLIT),
    ("fused", "split_qkv"),
]

Factors = Mapping[str, tuple[Tensor, Tensor]]


def factors_of(base: str, seed: int = 0) -> Factors:
    """{native matrix: (up, down)} in fp16, on a grid so that products are exact."""
    generator = torch.Generator().manual_seed(seed)

    def grid(rows: int, columns: int) -> Tensor:
        return (torch.randint(-64, 64, (rows, columns), generator=generator) / 64).half()

    return {m.native: (grid(sum(m.heights), RANK), grid(RANK, m.columns)) for m in MATRICES[base]}


def deltas_of(base: str, factors: Factors) -> Tensors:
    """{native matrix: ΔW}, float64."""
    return {name: up.double() @ down.double() * (ALPHA / RANK) for name, (up, down) in factors.items()}


def put(file: Tensors, stem: str, style: Style, up: Tensor, down: Tensor, alpha: float = ALPHA) -> None:
    """Without an alpha key the scale goes into `up`; 0.5 is exact."""
    up_key, down_key, alpha_key = style
    file[stem + up_key] = (up if alpha_key else up * (alpha / len(down))).contiguous().clone()
    file[stem + down_key] = down.contiguous().clone()
    if alpha_key:
        file[stem + alpha_key] = torch.tensor(alpha)


def tensors_of(base: str, kind: str, dialect: str, factors: Factors) -> Tensors:
    """The file in one of `DIALECTS`."""
    file: Tensors = {}
    for matrix in MATRICES[base]:
        up, down = factors[matrix.native]
        pieces = up.split(list(matrix.heights))
        if dialect == "split_qkv":
            count = len(pieces)
            stem = f"lora_unet_{flat(matrix.native)}"
            put(file, stem, KOHYA, torch.block_diag(*pieces), down.repeat(count, 1), ALPHA * count)
        elif kind == "fused":
            name, style = FUSED[dialect]
            put(file, name(matrix.native), style, up, down)
        else:
            name, style = SPLIT[dialect]
            for diffusers, piece in zip(matrix.diffusers, pieces, strict=True):
                put(file, name(diffusers), style, piece, down)
    return file


def save(path: Path, tensors: Tensors) -> Path:
    save_file(tensors, path)
    return path


class Neo:
    """Forge Neo's reading of a LoRA for one of the two models.

    It knows native names after "lora_unet_" and "diffusion_model.", and Z-Image's diffusers names, also for
    Lumina 2, after "diffusion_model.", "transformer.", "lycoris_" and nothing. It takes q, k and v for three
    square pieces (modules_forge/packages/comfy/lora.py, utils.py and weight_adapter/lora.py).
    """

    def __init__(self, base: str) -> None:
        self.weights = {
            m.native: torch.zeros(sum(m.heights), m.columns, dtype=torch.float64) for m in MATRICES[base]
        }
        self._places: dict[str, tuple[str, slice]] = {}
        for name, weight in self.weights.items():
            whole = name, slice(None)
            self._places |= {f"lora_unet_{flat(name)}": whole, f"diffusion_model.{name}": whole}
            for diffusers, place in self._diffusers(name, weight.shape[1]):
                openings = (
                    f"diffusion_model.{diffusers}",
                    f"transformer.{diffusers}",
                    f"lycoris_{flat(diffusers)}",
                )
                self._places |= dict.fromkeys((*openings, diffusers), (name, place))

    def _diffusers(self, name: str, width: int) -> Iterator[tuple[str, slice]]:
        ends = {"x_embedder": "all_x_embedder.2-1", "final_layer.linear": "all_final_layer.2-1.linear"}
        block = name.removesuffix(".qkv")
        if block != name:
            yield from (
                (f"{block}.to_{piece}", slice(n * width, (n + 1) * width)) for n, piece in enumerate("qkv")
            )
        elif ".adaLN_modulation.1" not in name:
            yield ends.get(name, name.replace(".attention.out", ".attention.to_out.0")), slice(None)

    def load(self, path: Path) -> list[str]:
        """Adds a file to the weights. Returns the keys that it does not know."""
        file = load_file(path)
        known: set[str] = set()
        for stem, (name, place) in self._places.items():
            weight = self.weights[name][place]
            for up, down, _ in (KOHYA, PEFT):
                if stem + up in file:
                    alpha = file.get(f"{stem}.alpha", torch.tensor(float(len(file[stem + down]))))
                    scale = alpha.item() / len(file[stem + down])
                    weight += file[stem + up].double() @ file[stem + down].double() * scale
                    known |= {stem + up, stem + down, f"{stem}.alpha"}
            if f"{stem}.diff" in file:
                weight += file[f"{stem}.diff"].double()
                known.add(f"{stem}.diff")
        return sorted(file.keys() - known)
