"""DoRA's magnitudes (arXiv 2402.09353), which any kind of LoRA may have in addition to its delta."""

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
class DoraMagnitude:
    """DoRA's magnitude m of a layer: the weight becomes m · (W + ΔW) / ‖W + ΔW‖.

    Attributes:
        values: float32, one number per output row (axis 0) or per input column or channel (axis 1).
        axis: 0 if there is one norm per row (PEFT, LyCORIS' wd_on_out), 1 if there is one per input (older
            LyCORIS). In a fused module, a norm of axis 1 includes the rows of all its pieces.
    """

    values: Tensor
    axis: int


def is_of_inputs(role: str, shape: Shape) -> bool:
    """Whether a magnitude of this shape has one number per input."""
    return role == LYCORIS and len(shape) > 1 and shape[0] == 1 and shape[1] > 1


def has_rows(role: str, shape: Shape) -> bool:
    """Whether a magnitude of this shape must be cut along with the rows of its layer."""
    return role == PEFT or (role == LYCORIS and max(shape[:1], default=1) > 1)
