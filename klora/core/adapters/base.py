"""What a kind of LoRA has to say of itself, and the checks that kinds share.

A kind is told by the roles (see `suffixes`) of a module's tensors. A convolution (out, in, kh, kw) is the matrix
(out, in * kh * kw). Formulas and scale rules are those of LyCORIS (lycoris/modules) and of A1111's
extensions-builtin/Lora; where they differ, it is said.
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

LARGEST = 1 << 27
"""Entries of a matrix: the largest layer of SDXL and FLUX.1 has half as many. Two thin factors of any size could ask for any number."""

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Tensors = Callable[[str], Tensor]


class ShapeMismatch(Exception):
    """Tensors of a module that do not fit each other: (role at fault, what is wrong)."""


@dataclass(frozen=True)
class DeltaShape:
    """Shape (rows, columns) of a delta, its rank, and the number that network alpha is divided by (None: scale 1)."""

    shape: tuple[int, int]
    rank: int | None
    divisor: int | None


class Adapter(ABC):
    """One way of storing a delta.

    Attributes:
        name: as people call it.
        suffixes: {end of a key: role of its tensor}, a longer end before a shorter one that it ends with.
        marks: roles any of which says that a module is of this kind.
        needed: every role of at least one of these groups must be there.
        terms: the roles of each product that is added to a weight, the delta's first; one factor of zeros, and a product adds nothing.
        row_role: the factor whose rows are the delta's rows, so that a piece of a fused layer needs only these; None if there is none.
        cut_roles: the factors to be cut where a file is written piece by piece; empty where that cannot be done.
        rank_of_rows: whether the rank of a piece of a fused layer is told by which columns of `row_role` it uses.
        scale_in_header: whether PEFT keeps its alpha in the header, where a file has no alpha of its own.
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
        """Shape and rank from the shapes of the tensors by role; raises ShapeMismatch."""

    @abstractmethod
    def delta(self, get: Tensors, shapes: Shapes, scale: float, rank: int | None) -> Delta:
        """ΔW.

        Args:
            get: the float32 tensor of a role.
            shapes: of the roles that are there.
            scale, rank: the delta's own.
        """

    def input_factor(self, get: Tensors, shapes: Shapes, scale: float) -> LowRank | None:
        """A of ΔW = W A + B, (in, in), where B is the delta; None for a kind that does not need the weight W."""
        return None

    def name_of(self, is_convolution: bool) -> str:
        """What people call this kind on a linear layer or on a convolution."""
        return self.name

    def missing(self, roles: Shapes) -> str | None:
        """The first role that is needed but not there."""
        gaps = [[role for role in group if role not in roles] for group in self.needed]
        best = min(gaps, key=len)
        return best[0] if best else None


def flat(tensor: Tensor) -> Tensor:
    """A tensor as a matrix of its first axis."""
    return tensor.flatten(1)


def columns_of(shape: Shape) -> int:
    """The columns of a tensor of this shape as a matrix."""
    return prod(shape[1:])


def matrix(shapes: Shapes, role: str) -> Shape:
    """The shape of a tensor that must be a matrix or a convolution."""
    if len(shapes[role]) < 2 or 0 in shapes[role]:
        raise ShapeMismatch(role, f"has the shape {list(shapes[role])}, which is no matrix")
    return shapes[role]


def core(shapes: Shapes, role: str) -> Shape:
    """The shape of a tensor that must be the core of a Tucker decomposition."""
    if len(shapes[role]) != 4 or 0 in shapes[role]:
        raise ShapeMismatch(
            role, f"has the shape {list(shapes[role])}, which is no Tucker core (out, in, height, width)"
        )
    return shapes[role]


def no_larger(role: str, rows: int, columns: int) -> tuple[int, int]:
    """The size of a matrix, if a layer may have it."""
    if rows * columns > LARGEST:
        raise ShapeMismatch(
            role, f"makes a matrix of {rows} × {columns}, which no layer of {listed('or')} is"
        )
    return rows, columns


def meet(role: str, found: int, expected: int, other: str) -> None:
    """Raises ShapeMismatch where two factors do not meet."""
    if found != expected:
        raise ShapeMismatch(role, f"does not fit {other}: {found} where {expected} is needed")


def tucker_shape(shapes: Shapes, middle: str, a: str, b: str) -> tuple[int, int]:
    """(rows, columns) of what `tucker` makes."""
    inner, outer, *size = core(shapes, middle)
    for role in (a, b):
        if len(matrix(shapes, role)) != 2:
            raise ShapeMismatch(role, f"has the shape {list(shapes[role])} where {middle} needs a matrix")
    meet(middle, inner, shapes[a][0], a)
    meet(middle, outer, shapes[b][0], b)
    _, columns = no_larger(middle, inner, shapes[b][1] * prod(size))
    return no_larger(a, shapes[a][1], columns)


def tucker(get: Tensors, shapes: Shapes, middle: str, a: str, b: str) -> tuple[Tensor, Tensor]:
    """Two matrices whose product is the (out, in * kh * kw) matrix that a, b and their core, if any, stand for."""
    if middle not in shapes:
        return flat(get(a)), flat(get(b))
    return get(a).T, second_axis_product(get(middle), get(b)).flatten(1)
