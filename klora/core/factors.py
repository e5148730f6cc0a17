"""From the tensors of one module to its delta: LoRA, LoCon, LoHa, LoKr, GLoRA and full differences.

Each kind is one entry of `KINDS`: the roles (see key_names.SUFFIXES) it needs, its shape and rank from the tensors'
shapes alone, and its delta. A convolution (out, in, kh, kw) is the matrix (out, in * kh * kw). Formulas and scale rules
are those of LyCORIS (lycoris/modules) and of A1111's extensions-builtin/Lora; where they differ, it is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor

from klora.core.deltas import Delta, Dense, Hadamard, Kronecker, LowRank
from klora.core.products import product, second_axis_product

LARGEST = 1 << 27
"""Entries of a matrix: the largest layer of SDXL and FLUX.1 has half as many. Two thin factors of any size could ask for any number."""

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Tensors = Callable[[str], Tensor]


class Misfit(Exception):
    """Tensors of a module that do not fit each other: (role at fault, what is wrong)."""


@dataclass(frozen=True)
class Measure:
    """Shape (rows, columns) of a delta, its rank, and the number that network alpha is divided by (None: scale 1)."""

    shape: tuple[int, int]
    rank: int | None
    divisor: int | None


@dataclass(frozen=True)
class Kind:
    """One way of storing a delta.

    Attributes:
        name: as people call it.
        marks: roles any of which says that a module is of this kind.
        needed: every role of at least one of these groups must be there.
        terms: the roles of each product that is added to a weight, the delta's first; one factor of zeros, and a product adds nothing.
        row_role: the factor whose rows are the delta's rows, for a look at which rows are used; None if there is none.
        measure: shapes by role -> Measure; raises Misfit.
        delta: float32 tensors by role, roles that are there, scale, rank -> Delta.
    """

    name: str
    marks: tuple[str, ...]
    needed: tuple[tuple[str, ...], ...]
    terms: tuple[tuple[str, ...], ...]
    row_role: str | None
    measure: Callable[[Shapes], Measure]
    delta: Callable[[Tensors, Shapes, float, int | None], Delta]

    def missing(self, roles: Shapes) -> str | None:
        """The first role that is needed but not there."""
        gaps = [[role for role in group if role not in roles] for group in self.needed]
        best = min(gaps, key=len)
        return best[0] if best else None


def kind_of(roles: Shapes) -> Kind | None:
    """The kind that these roles belong to, None if they hold no delta of a weight."""
    return next((kind for kind in KINDS if any(mark in roles for mark in kind.marks)), None)


def row_piece(delta: Delta, start: int, stop: int) -> Delta:
    """The rows start..stop of a fused delta; a Kronecker product stays one where whole blocks of rows are cut."""
    if isinstance(delta, Kronecker):
        block = delta.second.shape[0]
        if start % block == 0 and stop % block == 0:
            return Kronecker(
                delta.first[start // block : stop // block], delta.second, delta.scale, delta.rank
            )
    return delta.row_slice(start, stop)


def swap_row_halves(delta: Delta) -> Delta:
    """The delta with its upper and lower half of rows exchanged."""
    half = delta.shape[0] // 2
    if isinstance(delta, LowRank):
        return LowRank(delta.left.roll(half, 0), delta.right, delta.scale, delta.rank)
    if isinstance(delta, Hadamard):
        return Hadamard(
            delta.left1.roll(half, 0),
            delta.right1,
            delta.left2.roll(half, 0),
            delta.right2,
            delta.scale,
            delta.rank,
        )
    return Dense(delta.rows(0, 2 * half).roll(half, 0), delta.scale, delta.rank)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.flatten(1)


def _columns(shape: Shape) -> int:
    return prod(shape[1:])


def _matrix(shapes: Shapes, role: str) -> Shape:
    if len(shapes[role]) < 2 or 0 in shapes[role]:
        raise Misfit(role, f"has the shape {list(shapes[role])}, which is no matrix")
    return shapes[role]


def _core(shapes: Shapes, role: str) -> Shape:
    if len(shapes[role]) != 4 or 0 in shapes[role]:
        raise Misfit(
            role, f"has the shape {list(shapes[role])}, which is no Tucker core (out, in, height, width)"
        )
    return shapes[role]


def _no_larger(role: str, rows: int, columns: int) -> tuple[int, int]:
    if rows * columns > LARGEST:
        raise Misfit(role, f"makes a matrix of {rows} × {columns}, which no layer of SDXL or FLUX.1 is")
    return rows, columns


def _meet(role: str, found: int, expected: int, other: str) -> None:
    if found != expected:
        raise Misfit(role, f"does not fit {other}: {found} where {expected} is needed")


def _measure_lora(shapes: Shapes) -> Measure:
    up, down = _matrix(shapes, "up"), _matrix(shapes, "down")
    if "mid" not in shapes:
        _meet("up", _columns(up), down[0], "its down")
        return Measure(_no_larger("up", up[0], _columns(down)), down[0], down[0])
    mid = _core(shapes, "mid")
    _meet("up", _columns(up), mid[0], "its mid")
    _meet("mid", mid[1], down[0], "its down")
    _, columns = _no_larger("mid", mid[0], _columns(down) * prod(mid[2:]))
    return Measure(_no_larger("up", up[0], columns), down[0], down[0])


def _lora(get: Tensors, shapes: Shapes, scale: float, rank: int | None) -> LowRank:
    """up @ down; with LoCon's mid, the Tucker core, (mid ×₂ down) takes the place of down."""
    down = _flat(get("down"))
    if "mid" in shapes:
        down = second_axis_product(get("mid"), down).flatten(1)
    return LowRank(_flat(get("up")), down, scale, rank or 0)


def _measure_loha(shapes: Shapes) -> Measure:
    halves = [_measure_half(shapes, n) for n in "12"]
    if halves[0] != halves[1]:
        raise Misfit(
            "hada_w2_a", f"makes a matrix of {list(halves[1])} where hada_w1_a makes one of {list(halves[0])}"
        )
    rank = shapes["hada_w1_b"][0]
    return Measure(halves[0], rank, rank)


def _measure_half(shapes: Shapes, n: str) -> tuple[int, int]:
    a, b = _matrix(shapes, f"hada_w{n}_a"), _matrix(shapes, f"hada_w{n}_b")
    if f"hada_t{n}" in shapes:
        return _measure_tucker(shapes, f"hada_t{n}", f"hada_w{n}_a", f"hada_w{n}_b")
    _meet(f"hada_w{n}_a", _columns(a), b[0], f"hada_w{n}_b")
    return _no_larger(f"hada_w{n}_a", a[0], _columns(b))


def _measure_tucker(shapes: Shapes, core: str, a: str, b: str) -> tuple[int, int]:
    """(rows, columns) of what `_tucker` makes."""
    inner, outer, *size = _core(shapes, core)
    for role in (a, b):
        if len(_matrix(shapes, role)) != 2:
            raise Misfit(role, f"has the shape {list(shapes[role])} where {core} needs a matrix")
    _meet(core, inner, shapes[a][0], a)
    _meet(core, outer, shapes[b][0], b)
    _, columns = _no_larger(core, inner, shapes[b][1] * prod(size))
    return _no_larger(a, shapes[a][1], columns)


def _loha(get: Tensors, shapes: Shapes, scale: float, rank: int | None) -> Hadamard:
    """(w1_a @ w1_b) ∘ (w2_a @ w2_b); with cores t1 and t2, (w_a)ᵀ ×₁ core ×₂ w_b."""
    left1, right1 = _tucker(get, shapes, "hada_t1", "hada_w1_a", "hada_w1_b")
    left2, right2 = _tucker(get, shapes, "hada_t2", "hada_w2_a", "hada_w2_b")
    return Hadamard(left1, right1, left2, right2, scale, rank or 0)


def _tucker(get: Tensors, shapes: Shapes, core: str, a: str, b: str) -> tuple[Tensor, Tensor]:
    """Two matrices whose product is the (out, in * kh * kw) matrix that a, b and their core, if any, stand for."""
    if core not in shapes:
        return _flat(get(a)), _flat(get(b))
    return get(a).T, second_axis_product(get(core), get(b)).flatten(1)


def _measure_lokr(shapes: Shapes) -> Measure:
    (m1, n1), rank1 = _kron_factor(shapes, "lokr_w1", None)
    (m2, n2), rank2 = _kron_factor(shapes, "lokr_w2", "lokr_t2")
    rank = rank2 if rank2 is not None else rank1
    return Measure(
        _no_larger("lokr_w1" if "lokr_w1" in shapes else "lokr_w1_a", m1 * m2, n1 * n2), rank, rank
    )


def _kron_factor(shapes: Shapes, name: str, core: str | None) -> tuple[tuple[int, int], int | None]:
    if name in shapes:
        full = _matrix(shapes, name)
        return (full[0], _columns(full)), None
    a, b = _matrix(shapes, f"{name}_a"), _matrix(shapes, f"{name}_b")
    if core is not None and core in shapes:
        return _measure_tucker(shapes, core, f"{name}_a", f"{name}_b"), b[0]
    _meet(f"{name}_a", _columns(a), b[0], f"{name}_b")
    return _no_larger(f"{name}_a", a[0], _columns(b)), b[0]


def _lokr(get: Tensors, shapes: Shapes, scale: float, rank: int | None) -> Kronecker:
    """w1 ⊗ w2, each full or a product of two. Scale is alpha / rank of the factorised factor (w2's first), else 1."""
    first = (
        _flat(get("lokr_w1"))
        if "lokr_w1" in shapes
        else product(_flat(get("lokr_w1_a")), _flat(get("lokr_w1_b")))
    )
    if "lokr_w2" in shapes:
        second = get("lokr_w2").flatten(2) if len(shapes["lokr_w2"]) > 2 else get("lokr_w2").unsqueeze(2)
    elif "lokr_t2" in shapes:
        left, right = _tucker(get, shapes, "lokr_t2", "lokr_w2_a", "lokr_w2_b")
        second = product(left, right).reshape(left.shape[0], shapes["lokr_w2_b"][1], -1)
    else:
        second = product(_flat(get("lokr_w2_a")), _flat(get("lokr_w2_b"))).unsqueeze(2)
    return Kronecker(first, second, scale, rank)


def _glora_order(shapes: Shapes) -> tuple[str, str]:
    """The roles (up, down) of GLoRA's b pair: (b1, b2) as LyCORIS has it, (b2, b1) in its first files, which A1111 reads."""
    b1, b2 = _matrix(shapes, "b1"), _matrix(shapes, "b2")
    today, first = _columns(b1) == b2[0], b2[1] == b1[0] and _columns(b2) == b1[0]
    if today and (not first or b2[0] <= b1[0]):
        return "b1", "b2"
    if first:
        return "b2", "b1"
    raise Misfit("b1", f"of shape {list(b1)} does not fit b2 of shape {list(b2)}")


def _measure_glora(shapes: Shapes) -> Measure:
    up, down = _glora_order(shapes)
    rank = shapes[down][0]
    left, right = _matrix(shapes, up.replace("b", "a")), _matrix(shapes, down.replace("b", "a"))
    _meet(up.replace("b", "a"), _columns(left), right[0], down.replace("b", "a"))
    _no_larger(up.replace("b", "a"), left[0], _columns(right))
    columns = _columns(shapes[down])
    if "bm" in shapes:
        core = _core(shapes, "bm")
        _meet("bm", core[0], _columns(shapes[up]), up)
        _meet("bm", core[1], rank, down)
        _, columns = _no_larger("bm", core[0], columns * prod(core[2:]))
    return Measure(_no_larger(up, shapes[up][0], columns), rank, rank)


def _glora(get: Tensors, shapes: Shapes, scale: float, rank: int | None) -> LowRank:
    """B = b1 @ b2 of ΔW = W a1 a2 + b1 b2: the part that needs no base weights, as DoRA is scored before its magnitude.

    Scale is alpha / rank as in LyCORIS and Forge (A1111 leaves it out, which no comparison within one file notices).
    """
    up, down = _glora_order(shapes)
    right = _flat(get(down))
    if "bm" in shapes:
        right = second_axis_product(get("bm"), right).flatten(1)
    return LowRank(_flat(get(up)), right, scale, rank or 0)


def glora_input_factor(get: Tensors, shapes: Shapes, scale: float) -> LowRank:
    """A = a1 @ a2, (in, in), of ΔW = W A + B; W is (out, in), and (out, in, kh, kw) is multiplied along `in`."""
    left, right = ("a1", "a2") if _glora_order(shapes) == ("b1", "b2") else ("a2", "a1")
    return LowRank(_flat(get(left)), _flat(get(right)), scale, shapes[right][0])


def _measure_full(shapes: Shapes) -> Measure:
    diff = _matrix(shapes, "diff")
    return Measure(_no_larger("diff", diff[0], _columns(diff)), None, None)


def _full(get: Tensors, shapes: Shapes, scale: float, rank: int | None) -> Dense:
    return Dense(_flat(get("diff")), scale, rank)


KINDS = (
    Kind(
        "LoRA", ("up", "down", "mid"), (("up", "down"),), (("up", "mid", "down"),), "up", _measure_lora, _lora
    ),
    Kind(
        "LoHa",
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),),
        (("hada_w1_a", "hada_w1_b", "hada_t1", "hada_w2_a", "hada_w2_b", "hada_t2"),),
        None,
        _measure_loha,
        _loha,
    ),
    Kind(
        "LoKr",
        ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
        tuple(
            (*w1, *w2)
            for w1 in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
            for w2 in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
        ),
        (("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),),
        None,
        _measure_lokr,
        _lokr,
    ),
    Kind(
        "GLoRA",
        ("a1", "a2", "b1", "b2"),
        (("a1", "a2", "b1", "b2"),),
        (("b1", "bm", "b2"), ("a1", "a2")),
        None,
        _measure_glora,
        _glora,
    ),
    Kind("full diff", ("diff",), (("diff",),), (("diff",),), "diff", _measure_full, _full),
)
