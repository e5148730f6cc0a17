"""The kinds of LoRA, one file each: how its tensors are called, what shape they make, and the delta they are."""

from __future__ import annotations

from klora.core.adapters.base import Adapter, Shapes
from klora.core.adapters.full import Full
from klora.core.adapters.glora import GLoRA
from klora.core.adapters.loha import LoHa
from klora.core.adapters.lokr import LoKr
from klora.core.adapters.lora import Lora

ADAPTERS: tuple[Adapter, ...] = (Lora(), LoHa(), LoKr(), GLoRA(), Full())


def adapter_of(roles: Shapes) -> Adapter | None:
    """The kind that these roles belong to, None if they hold no delta of a weight."""
    return next((adapter for adapter in ADAPTERS if any(mark in roles for mark in adapter.marks)), None)
