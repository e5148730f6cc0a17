"""DoRA's magnitudes (arXiv 2402.09353), which any kind of LoRA may have beside its delta."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from klora.core.adapters.base import Shape

NAME = "DoRA"
LYCORIS, PEFT = "dora_scale", "peft_magnitude"
ROLES = (LYCORIS, PEFT)
SUFFIXES = {
    ".dora_scale": LYCORIS,
    ".lora_magnitude_vector.weight": PEFT,
    ".lora_magnitude_vector": PEFT,
    ".magnitude": PEFT,
}


@dataclass(frozen=True)
class Magnitude:
    """DoRA's magnitude m of a layer: the weight becomes m · (W + ΔW) / ‖W + ΔW‖.

    Attributes:
        values: float32; one number an output row (axis 0) or an input column or channel (axis 1).
        axis: 0 if the norm runs over everything but the rows (PEFT, LyCORIS' wd_on_out); 1 if over everything but the
            inputs (the older LyCORIS). In a fused module the norm of axis 1 runs over the rows of all its pieces.
    """

    values: Tensor
    axis: int


def is_of_inputs(role: str, shape: Shape) -> bool:
    """Whether a magnitude of this shape has one number an input."""
    return role == LYCORIS and len(shape) > 1 and shape[0] == 1 and shape[1] > 1


def has_rows(role: str, shape: Shape) -> bool:
    """Whether a magnitude of this shape is to be cut with the rows of its layer."""
    return role == PEFT or (role == LYCORIS and max(shape[:1], default=1) > 1)
