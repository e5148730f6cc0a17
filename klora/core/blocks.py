"""Layers grouped by the block of the network they sit in, for people to read."""

from __future__ import annotations

import re
from collections.abc import Sequence

GROUPS = {
    "time_embed": "time", "label_emb": "label", "input_blocks": "down", "middle_block": "mid", "output_blocks": "up", "out": "out",
    "img_in": "in", "txt_in": "in", "time_in": "in", "vector_in": "in", "guidance_in": "in",
    "double_blocks": "double", "single_blocks": "single", "final_layer": "out",
}  # fmt: skip
"""First part of a canonical layer name -> its group, in the order of the forward pass of SDXL's UNet and of FLUX."""

_RANKS = {head: place for place, head in enumerate(GROUPS)}


def group_of(layer: str) -> str:
    """The part of the network that a canonical layer is in: "down", "mid", "up", "double", "single", …"""
    head = layer.partition(".")[0]
    return GROUPS.get(head, head)


def block_of(layer: str) -> str:
    """The block of a canonical layer, as people call it: "down 4", "mid", "up 0", "double 3", "single 37"."""
    head, *rest = layer.split(".")
    group = group_of(layer)
    numbered = head in ("input_blocks", "output_blocks", "double_blocks", "single_blocks")
    return f"{group} {rest[0]}" if numbered and rest else group


def forward_order(layer: str) -> tuple:
    """Sort key that puts canonical layers in the order of the network's blocks, numbers by value."""
    parts = re.split(r"(\d+)", layer)
    return (
        _RANKS.get(layer.split(".")[0], len(_RANKS)),
        [int(part) if part.isdigit() else part for part in parts],
    )


def leader_of(carried: str, layers: Sequence[str]) -> str:
    """The layer whose choice a norm or a lone bias follows.

    It is the layer with the longest path in common; among equals the first of the network.
    """
    path = carried.split(".")

    def common(layer: str) -> int:
        parts = layer.split(".")
        return next(
            (i for i, (own, other) in enumerate(zip(path, parts, strict=False)) if own != other),
            min(len(path), len(parts)),
        )

    return min(layers, key=lambda layer: (-common(layer), forward_order(layer)))
