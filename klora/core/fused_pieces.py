"""Pieces of a fused matrix joined to the whole matrix, for hosts whose loaders know only that.

If all pieces are plain LoRAs, their downs are stacked and their ups are put on a block diagonal, as kohya's
`split_qkv` saves them. This is exactly the same change, and the ranks add up. Pieces of any other kind are
written as ΔW in float32. Rows of pieces that the file does not have stay zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from klora.core.adapters import dora
from klora.core.deltas import dense
from klora.core.lora_file import LoraFile
from klora.core.lora_modules import FileModule
from klora.core.lora_reader import LoraReader
from klora.core.tensor_file import OpenTensors
from klora.errors import LoraFileError

MAGNITUDE, BIAS = dora.LYCORIS, "diff_b"
_WRITTEN_AS = {dora.PEFT: MAGNITUDE, "up_bias": BIAS}
_COPIED = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Piece:
    """Rows of one module of a file that go into a fused matrix.

    Attributes:
        module: of the file.
        layer: whose rows these are.
        rows: in the module's own matrix.
        place: in the fused matrix.
    """

    module: FileModule
    layer: str
    rows: slice
    place: slice


@dataclass(frozen=True)
class FusedTensor:
    """One tensor of a fused matrix, made when it is written.

    Attributes:
        role: "up", "down", "alpha", "diff", `MAGNITUDE` or `BIAS`.
        pieces: in the order of their rows.
        height: of the fused matrix.
        source: a key of the file that the tensor is made of.
    """

    role: str
    pieces: Sequence[Piece]
    height: int
    source: str

    def read(self, lora: LoraFile, tensors: OpenTensors) -> Tensor:
        """The tensor, in the file's number type where that can hold it exactly, otherwise in float32."""
        if self.role == "down":
            return torch.cat(self._factors("down", tensors))
        if self.role == "up":
            return self._block_diagonal(tensors)
        if self.role == "alpha":
            rank = sum(piece.module.shapes["down"][0] for piece in self.pieces)
            return torch.tensor(self.pieces[0].module.scale * rank, dtype=torch.float32)
        return self._difference(lora, tensors) if self.role == "diff" else self._rows(tensors)

    def _block_diagonal(self, tensors: OpenTensors) -> Tensor:
        factors = self._factors("up", tensors)
        up = torch.zeros(self.height, sum(factor.shape[1] for factor in factors), dtype=factors[0].dtype)
        left = 0
        for piece, factor in zip(self.pieces, factors, strict=True):
            block = (
                factor[piece.rows] if _share_a_scale(self.pieces) else factor[piece.rows] * piece.module.scale
            )
            up[piece.place, left : left + factor.shape[1]] = block
            left += factor.shape[1]
        return up

    def _factors(self, role: str, tensors: OpenTensors) -> list[Tensor]:
        found = [tensors.whole(piece.module.keys[role]).flatten(1) for piece in self.pieces]
        dtypes = {factor.dtype for factor in found}
        scaled = role == "up" and not _share_a_scale(self.pieces)
        keep = len(dtypes) == 1 and dtypes.issubset(_COPIED) and not scaled
        return found if keep else [factor.float() for factor in found]

    def _difference(self, lora: LoraFile, tensors: OpenTensors) -> Tensor:
        parts = {piece.layer: (piece.module, piece.rows.start, piece.rows.stop) for piece in self.pieces}
        reader = LoraReader(lora.path, parts, tensors)
        deltas = [dense(reader(piece.layer)) for piece in self.pieces]
        whole = torch.zeros(self.height, deltas[0].shape[1])
        for piece, delta in zip(self.pieces, deltas, strict=True):
            whole[piece.place] = delta
        return whole

    def _rows(self, tensors: OpenTensors) -> Tensor:
        """One number per row. PEFT's bias is multiplied by the scale, as its delta is."""
        whole = torch.zeros(self.height)
        for piece in self.pieces:
            for role, key in piece.module.keys.items():
                if _WRITTEN_AS.get(role, role) == self.role:
                    factor = piece.module.scale if role == "up_bias" else 1.0
                    whole[piece.place] = tensors.whole(key).float().flatten()[piece.rows] * factor
        return whole.reshape(-1, 1) if self.role == MAGNITUDE else whole


def fuse(lora: LoraFile, modules: Sequence[FileModule]) -> Iterator[FusedTensor]:
    """The tensors of the fused matrix of which these modules of `lora` hold pieces.

    Raises:
        LoraFileError: their sizes are not those of the network's pieces, or they are of a kind that cannot be
            applied to the whole matrix.
    """
    source = next(iter(modules[0].keys.values()))
    pieces, height = _pieces(modules)
    if not pieces:
        raise LoraFileError(
            f'The tensor "{source}" of "{lora.path.name}" is for one part of a matrix that WebUIs have as a '
            "whole, and the sizes of its parts do not fit together: export the LoRA again."
        )
    matrices = [piece for piece in pieces if piece.module.kind is not None]
    roles = {_WRITTEN_AS.get(role, role) for piece in pieces for role in piece.module.keys}
    is_low_rank = all(_is_low_rank(piece.module) for piece in matrices)
    if _depends_on_the_whole_weight(pieces) or (MAGNITUDE in roles and not is_low_rank):
        raise LoraFileError(
            f'The tensor "{source}" of "{lora.path.name}" belongs to a DoRA or GLoRA for one part of a '
            "matrix that WebUIs have as a whole, where it would change the other parts too: train it on the "
            "fused matrices of the original model, or as a LoRA without DoRA."
        )
    made = ["diff"]
    if is_low_rank:
        plain = _share_a_scale(matrices) and matrices[0].module.scale != 1
        made = ["up", "down", "alpha"] if plain else ["up", "down"]
    yield from (FusedTensor(role, matrices, height, source) for role in made)
    yield from (FusedTensor(role, pieces, height, source) for role in (MAGNITUDE, BIAS) if role in roles)


def _pieces(modules: Sequence[FileModule]) -> tuple[list[Piece], int]:
    """The pieces by their rows and the height of the fused matrix; none where sizes do not fit."""
    network = modules[0].target.module
    widths = {module.delta_shape.shape[1] for module in modules if module.delta_shape is not None}
    if len(widths) != 1:
        return [], 0
    (columns,) = widths
    height = int(network.widths * columns)
    heights = network.heights(network.layers, height, columns)
    tops = dict(zip(network.layers, accumulate(heights, initial=0), strict=False))
    found = [
        Piece(module, layer, slice(start, stop), slice(tops[layer], tops[layer] + stop - start))
        for module in modules
        for layer, start, stop in module.pieces()
    ]
    expected = dict(zip(network.layers, heights, strict=True))
    if any(piece.place.stop - piece.place.start != expected[piece.layer] for piece in found):
        return [], 0
    return sorted(found, key=lambda piece: piece.place.start), height


def _is_low_rank(module: FileModule) -> bool:
    return module.kind is not None and module.kind.rank_of_rows and "mid" not in module.keys


def _depends_on_the_whole_weight(pieces: Sequence[Piece]) -> bool:
    """Whether a piece's change would be another one if it were applied to the whole weight.

    GLoRA multiplies the weight. A magnitude per input depends on all rows, and magnitudes per row are needed
    for every row.
    """
    modules = [piece.module for piece in pieces]
    if any(module.kind is not None and len(module.kind.terms) > 1 for module in modules):
        return True
    magnitudes = [module.magnitude_role for module in modules]
    if not any(magnitudes):
        return False
    every = {layer for module in modules for layer in module.target.module.layers}
    return len(pieces) != len(every) or not all(
        role and dora.has_rows(role, module.shapes[role])
        for role, module in zip(magnitudes, modules, strict=True)
    )


def _share_a_scale(pieces: Sequence[Piece]) -> bool:
    return len({piece.module.scale for piece in pieces}) == 1
