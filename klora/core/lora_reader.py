"""Deltas, DoRA magnitudes, biases and norms of an open LoRA file, in float32 and one layer at a time."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from klora.core.adapters.dora import DoraMagnitude, is_of_inputs
from klora.core.deltas import Delta, LowRank
from klora.core.lora_modules import FileModule
from klora.core.tensor_file import FLOATS, OpenTensors
from klora.errors import LoraFileError


@dataclass(frozen=True)
class NormChange:
    """What a LoRA adds to a norm's weight and bias, float32; None for what it leaves alone."""

    weight: Tensor | None
    bias: Tensor | None


class LoraReader:
    """The contents of an open LoRA file by canonical name: `reader(layer)` is the layer's delta.

    Usable from several threads.

    Every method raises LoraFileError, naming file and tensor, if a tensor holds NaN or Inf, and KeyError for
    a name that is not in the file.
    """

    def __init__(
        self, path: Path, parts: Mapping[str, tuple[FileModule, int, int]], tensors: OpenTensors
    ) -> None:
        self._path = path
        self._parts = parts
        self._tensors = tensors

    def __call__(self, layer: str) -> Delta:
        """ΔW of a layer or text-encoder module, float32, on the CPU.

        DoRA's magnitude is not applied to it, and GLoRA's W·A is not in it.
        """
        module, start, stop = self._parts[layer]
        if module.kind is None or module.delta_shape is None:
            raise KeyError(layer)
        fused = len(module.target.layers) > 1
        rows = module.kind.row_role if fused else None

        def get(role: str) -> Tensor:
            return self._float(module, role, slice(start, stop) if role == rows else None)

        delta = module.kind.delta(get, module.shapes, module.scale, module.delta_shape.rank)
        if module.target.halves_swapped:
            return delta.with_halves_swapped()
        if not fused:
            return delta
        return delta.row_slice(0, stop - start) if rows else delta.row_slice(start, stop)

    def magnitude(self, layer: str) -> DoraMagnitude | None:
        """The layer's DoRA magnitude, None if it has none."""
        module, start, stop = self._parts[layer]
        role = module.magnitude_role
        if role is None:
            return None
        values = self._float(module, role)
        if is_of_inputs(role, values.shape):
            return DoraMagnitude(values.flatten(), 1)
        return DoraMagnitude(_rows(module, values.flatten(), start, stop), 0)

    def bias(self, layer: str) -> Tensor | None:
        """What the LoRA adds to the layer's bias, float32, shape (rows,); None if nothing.

        PEFT's `lora_B.bias` comes multiplied by the scale.
        """
        module, start, stop = self._parts[layer]
        role = module.bias_role
        if role is None:
            return None
        factor = module.scale if role == "up_bias" else 1.0
        return _rows(module, self._float(module, role).flatten() * factor, start, stop)

    def norm(self, name: str) -> NormChange:
        """What the LoRA adds to the norm `name`; for any other name in `LoraFile.unscored` only the bias."""
        module, _, _ = self._parts[name]
        weight = next((role for role in ("w_norm", "diff") if module.is_norm and role in module.keys), None)
        return NormChange(self._float(module, weight) if weight else None, self.bias(name))

    def input_factor(self, layer: str) -> LowRank | None:
        """A of ΔW = W A + B, shape (in, in), where B is the delta.

        None for a kind whose change does not depend on the weight W.
        """
        module, _, _ = self._parts[layer]
        if module.kind is None:
            return None
        return module.kind.input_factor(lambda role: self._float(module, role), module.shapes, module.scale)

    def check(self, module: FileModule, leave_out: Collection[str] = ()) -> None:
        """Looks for NaN and Inf in a module's tensors; scalars were checked when the file was read.

        Args:
            module: one of the file's.
            leave_out: roles that need no check.
        """
        for role, key in module.keys.items():
            if role not in ("alpha", "scale", *leave_out) and self._tensors.whole(key).dtype in FLOATS:
                self._float(module, role)

    def _float(self, module: FileModule, role: str, rows: slice | None = None) -> Tensor:
        key = module.keys[role]
        tensor = self._tensors.whole(key)
        tensor = tensor if rows is None else tensor[rows]
        if tensor.dtype not in FLOATS:
            raise LoraFileError(
                f'The tensor "{key}" of "{self._path.name}" holds {str(tensor.dtype).removeprefix("torch.")} '
                "numbers: save the LoRA in fp32, fp16, bf16 or fp8."
            )
        values = tensor.to(torch.float32)
        if not values.sum().isfinite() and not values.isfinite().all():
            raise LoraFileError(
                f'The tensor "{key}" of "{self._path.name}" holds NaN or infinite numbers: download or train '
                "it again."
            )
        return values


def _rows(module: FileModule, values: Tensor, start: int, stop: int) -> Tensor:
    if module.target.halves_swapped:
        return values.roll(len(values) // 2)
    return values if len(module.target.layers) == 1 else values[start:stop]
