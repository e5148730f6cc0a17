"""A base model without a record here, made of a loaded checkpoint's weights and a WebUI's names for them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import NamedTuple

from klora.core.families.base import HOSTS_OWN, Family, Found
from klora.core.topology import CONV, LINEAR, NORM, Module


class Place(NamedTuple):
    """Where a WebUI puts what a key stands for.

    Attributes:
        path: of the module in the WebUI's denoiser.
        rows: (first row, number of rows) of its weight; None for all of it.
    """

    path: str
    rows: tuple[int, int] | None = None


def unlisted(
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    place_of: Callable[[str], Place | None],
    pieces: Mapping[str, Place],
) -> Family:
    """The family of a loaded checkpoint that belongs to none of the listed ones. Its weights are not kept.

    Args:
        name: of the model, for people.
        shapes: {path of a module: shape of its weight}.
        place_of: told a key without its suffix, where the WebUI puts it; None if it does not know the key.
        pieces: {key without its suffix: place} of all keys that stand for a part of a weight.
    """
    cuts: dict[str, dict[tuple[int, int], str]] = {}
    for key, place in pieces.items():
        if place.rows is not None and place.path in shapes:
            cuts.setdefault(place.path, {}).setdefault(place.rows, key)
    modules = {path: _module(path, shape, cuts.get(path, {})) for path, shape in shapes.items() if shape}

    def find(key: str) -> Found | None:
        place = place_of(key)
        module = modules.get(place.path) if place is not None else None
        if module is None or place is None:
            return None
        return Found(module, module.layers if place.rows is None else _within(module, *place.rows))

    return Family(
        key=f"unlisted-{re.sub(r'[^0-9A-Za-z]+', '-', name)}",
        name=name,
        short_name=name,
        words=(),
        list_modules=lambda: iter(modules.values()),
        blocks={},
        component="transformer",
        text_encoders={},
        is_checkpoint=lambda _model, _denoiser: False,
        readable=(HOSTS_OWN,),
        prefixes=(),
        find=find,
    )


def _module(path: str, shape: tuple[int, ...], cuts: Mapping[tuple[int, int], str]) -> Module:
    """The module with one piece between any two rows at which a key of the WebUI begins or ends."""
    kind = NORM if len(shape) == 1 else LINEAR if len(shape) == 2 else CONV
    edges = sorted({0, shape[0], *(edge for start, count in cuts for edge in (start, start + count))})
    if len(edges) == 2 or edges[-1] != shape[0]:
        return Module(path, (path,), kind)
    spans = [(start, stop - start) for start, stop in pairwise(edges)]
    return Module(
        path,
        tuple(cuts.get(span, "") for span in spans),
        kind,
        pieces=tuple(str(number) for number in range(len(spans))),
        rows=tuple(count for _, count in spans),
    )


def _within(module: Module, start: int, count: int) -> tuple[str, ...]:
    """The layers of a module between two rows."""
    found, top = [], 0
    for layer, rows in zip(module.layers, module.rows, strict=False):
        if start <= top and top + rows <= start + count:
            found.append(layer)
        top += rows
    return tuple(found) or module.layers
