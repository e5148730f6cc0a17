"""The kinds of LoRA, one file each: the names of its tensors, and the shape and the delta that they make."""

from __future__ import annotations

from klora.core.adapters.base import Adapter, Shapes
from klora.core.adapters.full import Full
from klora.core.adapters.glora import GLoRA
from klora.core.adapters.loha import LoHa
from klora.core.adapters.lokr import LoKr
from klora.core.adapters.lora import LoRA

ADAPTERS: tuple[Adapter, ...] = (LoRA(), LoHa(), LoKr(), GLoRA(), Full())


def adapter_of(roles: Shapes) -> Adapter | None:
    """The kind that these roles belong to, None if they make no delta of a weight."""
    return next((adapter for adapter in ADAPTERS if any(mark in roles for mark in adapter.marks)), None)
