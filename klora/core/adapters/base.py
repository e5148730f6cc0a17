"""What a kind of LoRA has to declare, and the checks that kinds share.

A module's kind is found from the roles (see `suffixes`) of its tensors. A convolution (out, in, kh, kw) is
treated as the matrix (out, in * kh * kw). Formulas and scale rules are those of LyCORIS (lycoris/modules) and
A1111 (extensions-builtin/Lora); where the two differ, the kind's docstring says so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import ClassVar

from torch import Tensor

from klora.core.deltas import Delta, LowRank
from klora.core.families import listed
from klora.core.products import second_axis_product

MAX_ENTRIES = 1 << 29
"""More than the largest layer that files are told apart by: linear1 of FLUX.2 dev has 340 million. Without a
limit, two thin factors could make a matrix of any size."""

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Tensors = Callable[[str], Tensor]


class ShapeMismatch(Exception):
    """Tensors of a module that do not fit each other. Its args are the role at fault and what is wrong."""


@dataclass(frozen=True)
class DeltaShape:
    """Shape and rank of a delta.

    Attributes:
        shape: (rows, columns).
        rank: the rank that enters K in eq. (5); None for a delta that has none.
        divisor: what network alpha is divided by to get the scale; None if alpha is not used.
    """

    shape: tuple[int, int]
    rank: int | None
    divisor: int | None


class Adapter(ABC):
    """One way of storing a delta.

    Attributes:
        name: its usual name.
        suffixes: {end of a key: role of its tensor}; an end that itself ends with another one comes first.
        marks: roles that occur in this kind only, so that one of them is enough to recognise it.
        needed: groups of roles; a module is complete if it has all the roles of at least one group.
        terms: the factors of each product that is added to a weight, the delta's first. A product with a
            factor of all zeros adds nothing.
        row_role: the factor whose rows are the delta's rows, so that only some of them need to be read for a
            piece of a fused layer; None if there is none.
        cut_roles: the factors that are cut when a file is written piece by piece; empty if that is
            impossible.
        rank_of_rows: whether the rank of a piece of a fused layer is the number of columns of `row_role` that
            it uses.
        scale_in_header: whether PEFT may keep alpha in the header, for files without alpha tensors.
        needs_alpha: whether hosts need an alpha in the file to apply it at the right scale.
    """

    name: ClassVar[str]
    suffixes: ClassVar[Mapping[str, str]]
    marks: ClassVar[tuple[str, ...]]
    needed: ClassVar[tuple[tuple[str, ...], ...]]
    terms: ClassVar[tuple[tuple[str, ...], ...]]
    row_role: ClassVar[str | None] = None
    cut_roles: ClassVar[tuple[str, ...]] = ()
    rank_of_rows: ClassVar[bool] = False
    scale_in_header: ClassVar[bool] = False
    needs_alpha: ClassVar[bool] = False

    @abstractmethod
    def delta_shape(self, shapes: Shapes) -> DeltaShape:
        """Shape and rank of the delta, from {role: shape}; raises ShapeMismatch if the tensors do not fit."""

    @abstractmethod
    def delta(self, get: Tensors, shapes: Shapes, scale: float, rank: int | None) -> Delta:
        """ΔW of the whole module.

        Args:
            get: returns the float32 tensor of a role.
            shapes: {role: shape} of the module's tensors.
            scale, rank: those of the new delta.
        """

    def input_factor(self, get: Tensors, shapes: Shapes, scale: float) -> LowRank | None:
        """A of ΔW = W A + B, shape (in, in), where B is the delta; None for a kind that does not use W."""
        return None

    def name_of(self, is_convolution: bool) -> str:
        """The usual name of this kind on a linear layer or a 1x1 convolution, or on any other convolution."""
        return self.name

    def missing(self, roles: Shapes) -> str | None:
        """The first role that is missing from a module, None if it is complete."""
        gaps = [[role for role in group if role not in roles] for group in self.needed]
        best = min(gaps, key=len)
        return best[0] if best else None


def flat(tensor: Tensor) -> Tensor:
    """A tensor as a matrix that keeps the first axis and flattens the others."""
    return tensor.flatten(1)


def columns_of(shape: Shape) -> int:
    """The number of columns that `flat` gives a tensor of this shape."""
    return prod(shape[1:])


def matrix(shapes: Shapes, role: str) -> Shape:
    """The shape of a tensor that must be a matrix or a convolution; raises ShapeMismatch if it is not."""
    if len(shapes[role]) < 2 or 0 in shapes[role]:
        raise ShapeMismatch(role, f"has the shape {list(shapes[role])}, which is not a matrix")
    return shapes[role]


def core(shapes: Shapes, role: str) -> Shape:
    """The shape of a tensor that must be a Tucker decomposition's core; raises ShapeMismatch if it is not."""
    if len(shapes[role]) != 4 or 0 in shapes[role]:
        raise ShapeMismatch(
            role, f"has the shape {list(shapes[role])}, which is not a Tucker core (out, in, height, width)"
        )
    return shapes[role]


def no_larger(role: str, rows: int, columns: int) -> tuple[int, int]:
    """(rows, columns), if a layer may be that large; raises ShapeMismatch if not."""
    if rows * columns > MAX_ENTRIES:
        raise ShapeMismatch(
            role, f"makes a matrix of {rows} × {columns}, larger than any layer of {listed('or')}"
        )
    return rows, columns


def meet(role: str, found: int, expected: int, other: str) -> None:
    """Raises ShapeMismatch if two factors cannot be multiplied."""
    if found != expected:
        raise ShapeMismatch(role, f"does not fit {other}: {found} where {expected} is needed")


def tucker_shape(shapes: Shapes, middle: str, a: str, b: str) -> tuple[int, int]:
    """(rows, columns) of what `tucker` makes; raises ShapeMismatch if the tensors do not fit."""
    inner, outer, *size = core(shapes, middle)
    for role in (a, b):
        if len(matrix(shapes, role)) != 2:
            raise ShapeMismatch(role, f"has the shape {list(shapes[role])} where {middle} needs a matrix")
    meet(middle, inner, shapes[a][0], a)
    meet(middle, outer, shapes[b][0], b)
    _, columns = no_larger(middle, inner, shapes[b][1] * prod(size))
    return no_larger(a, shapes[a][1], columns)


def tucker(get: Tensors, shapes: Shapes, middle: str, a: str, b: str) -> tuple[Tensor, Tensor]:
    """Two matrices whose product is the (out, in * kh * kw) matrix made by a, b and their core, if any."""
    if middle not in shapes:
        return flat(get(a)), flat(get(b))
    return get(a).T, second_axis_product(get(middle), get(b)).flatten(1)
