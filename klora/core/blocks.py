"""Layers grouped by the block of the network they belong to, for display."""

from __future__ import annotations

import re
from collections.abc import Sequence
from graphlib import TopologicalSorter
from itertools import pairwise

from klora.core.families import FAMILIES

_BLOCKS = {head: block for family in FAMILIES.values() for head, block in family.blocks.items()}


def _ranks() -> dict[str, int]:
    """{first part of a layer's name: place} in an order that is that of every family's forward pass."""
    order: TopologicalSorter[str] = TopologicalSorter()
    for family in FAMILIES.values():
        for earlier, later in pairwise(family.blocks):
            order.add(later, earlier)
    return {head: place for place, head in enumerate(order.static_order())}


_RANKS = _ranks()


def group_of(layer: str) -> str:
    """The part of the network that a canonical layer is in: "down", "mid", "up", "double", "single", …"""
    head = layer.partition(".")[0]
    return _BLOCKS[head].group if head in _BLOCKS else head


def block_of(layer: str) -> str:
    """The block of a canonical layer, as it is displayed: "down 4", "mid", "up 0", "single 37", …"""
    head, *rest = layer.split(".")
    group = group_of(layer)
    numbered = _BLOCKS[head].numbered if head in _BLOCKS else bool(rest) and rest[0].isdigit()
    return f"{group} {rest[0]}" if rest and numbered else group


def forward_order(layer: str) -> tuple:
    """Sort key that puts canonical layers in the order of the forward pass, with numbers by value."""
    parts = re.split(r"(\d+)", layer)
    return (
        _RANKS.get(layer.split(".")[0], len(_RANKS)),
        [int(part) if part.isdigit() else part for part in parts],
    )


def leader_of(unscored: str, layers: Sequence[str]) -> str:
    """The layer whose strengths a norm or a lone bias takes, as it has no score of its own.

    It is the layer that shares the longest path with it; of several, the first in the network.
    """
    path = unscored.split(".")

    def common(layer: str) -> int:
        parts = layer.split(".")
        return next(
            (i for i, (own, other) in enumerate(zip(path, parts, strict=False)) if own != other),
            min(len(path), len(parts)),
        )

    return min(layers, key=lambda layer: (-common(layer), forward_order(layer)))
