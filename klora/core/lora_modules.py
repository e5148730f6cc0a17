"""The modules of a LoRA file: which keys belong together, of what kind, and which layers they change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from math import prod

import torch
from torch import Tensor

from klora.core.adapter_config import AdapterConfig
from klora.core.adapters import Adapter, adapter_of, dora
from klora.core.adapters.base import DeltaShape, Shape, ShapeMismatch
from klora.core.deltas import LowRank
from klora.core.families.base import Family
from klora.core.key_names import ParsedKey, Target
from klora.core.tensor_file import FLOATS, OpenTensors, TensorFile
from klora.core.topology import NORM
from klora.errors import LoraFileError

BIAS_ROLES = ("diff_b", "up_bias", "b_norm")
_NORM_ROLES = {"w_norm", "b_norm", "diff", "diff_b"}
_BLOCK_ROWS = 512


@dataclass(frozen=True)
class FileModule:
    """One matrix or one norm of a LoRA file.

    Attributes:
        target: its place in the model.
        keys: {role: key in the file}.
        shapes: {role: shape}.
        path: the module's name as the file writes it.
        dialects: how its keys are written.
        adapter: PEFT's name of the adapter, "" if the keys have none.
        kind: how the delta is stored; None for a norm or a bias alone.
        delta_shape: shape and rank of the whole matrix; None if `kind` is None.
        network_alpha: the file's alpha, None if it has none or no formula uses it.
        scale: what the product of the factors is multiplied by.
        scale_from_metadata: the scale is only in the header, where WebUIs do not look.
    """

    target: Target
    keys: Mapping[str, str]
    shapes: Mapping[str, Shape]
    path: str
    dialects: frozenset[str] = frozenset()
    adapter: str = ""
    kind: Adapter | None = None
    delta_shape: DeltaShape | None = None
    network_alpha: float | None = None
    scale: float = 1.0
    scale_from_metadata: bool = False

    @property
    def is_norm(self) -> bool:
        return self.target.module.kind == NORM

    @property
    def bias_role(self) -> str | None:
        return next((role for role in BIAS_ROLES if role in self.keys), None)

    @property
    def magnitude_role(self) -> str | None:
        return next((role for role in dora.ROLES if role in self.keys), None)

    def pieces(self) -> Iterator[tuple[str, int, int]]:
        """(canonical layer, first row, row after the last) of each layer in the matrix, top first.

        Raises:
            ShapeMismatch: the rows cannot be divided among the layers.
        """
        columns: int | None = None
        if self.delta_shape is not None:
            rows, columns = self.delta_shape.shape
        else:
            rows = max(prod(shape) for shape in self.shapes.values())
        layers = self.target.layers
        heights = self.target.module.heights(layers, rows, columns)
        if sum(heights) != rows or heights[-1] <= 0:
            what = (
                f"{len(layers)} layers" if columns is None else f"{len(layers)} layers of {columns} columns"
            )
            raise ShapeMismatch(next(iter(self.keys)), f"has {rows} rows, which cannot be cut into {what}")
        for layer, (start, stop) in zip(layers, pairwise(accumulate(heights, initial=0)), strict=True):
            yield layer, start, stop


@dataclass
class Gathered:
    """A file's keys, sorted.

    Attributes:
        modules: at most one for each layer.
        unknown: the keys that belong to no module.
        unused: the keys of modules that change nothing, on layers that another module changes.
    """

    modules: list[FileModule] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


def gather(
    file: TensorFile, family: Family, parsed: Mapping[str, ParsedKey], tensors: OpenTensors
) -> Gathered:
    """Groups keys into modules and checks each module.

    Args:
        file: names and shapes.
        family: the one that the file is read for.
        parsed: what each key means; keys without a meaning are left out.
        tensors: the same file, open; only scalars are read, and the tensors of modules that share a layer.

    Raises:
        LoraFileError: a module is incomplete, its tensors do not fit each other, or two modules change one
            layer.
    """
    keys: dict[Target, dict[tuple[str, str], dict[str, str]]] = {}
    for key, meaning in parsed.items():
        same = keys.setdefault(meaning.target, {}).setdefault((meaning.stem, meaning.adapter), {})
        if meaning.role in same:
            raise _twice(file, same[meaning.role], key)
        same[meaning.role] = key
    result = Gathered(unknown=[key for key in file.shapes if key not in parsed])
    config = AdapterConfig(file.metadata, file.path.name, family)
    for target, stems in keys.items():
        for roles in _modules_of(list(stems.values())):
            module = _module(file, target, roles, parsed, tensors, config)
            if module is None:
                result.unknown.extend(roles.values())
            else:
                result.modules.append(module)
    _leave_out_unused(file, result, tensors)
    return result


def _modules_of(stems: list[dict[str, str]]) -> list[dict[str, str]]:
    """{role: key} of each module for one target: a single module unless a role occurs in two stems."""
    together = {role: key for roles in stems for role, key in roles.items()}
    return [together] if len(together) == sum(map(len, stems)) else stems


def _module(
    file: TensorFile,
    target: Target,
    keys: dict[str, str],
    parsed: Mapping[str, ParsedKey],
    tensors: OpenTensors,
    config: AdapterConfig,
) -> FileModule | None:
    shapes = {role: file.shapes[key] for role, key in keys.items()}
    meanings = [parsed[key] for key in keys.values()]
    path, dialects = meanings[0].path, frozenset(meaning.dialect for meaning in meanings)
    adapter = next((meaning.adapter for meaning in meanings if meaning.adapter), "")
    kind = None if target.module.kind == NORM else adapter_of(shapes)
    if kind is None:
        complete = _NORM_ROLES.issuperset(keys) if target.module.kind == NORM else "diff_b" in keys
        return _whole(file, FileModule(target, keys, shapes, path, dialects, adapter)) if complete else None
    missing = kind.missing(shapes)
    if missing is not None:
        raise LoraFileError(
            f'"{file.path.name}" is incomplete: "{next(iter(keys.values()))}" has no partner "{missing}"; '
            "download or export it again."
        )
    try:
        delta_shape = kind.delta_shape(shapes)
        _check_additions(shapes, delta_shape)
        given = _scalar(file, tensors, keys.get("scale"))
        counts = given is None and delta_shape.divisor
        alpha = _scalar(file, tensors, keys.get("alpha")) if counts else None
        in_header = None
        if given is None and alpha is None and kind.scale_in_header and delta_shape.divisor:
            in_header = config.scale(target.base, path, delta_shape.divisor)
        if given is not None:
            scale = given
        elif alpha is not None and delta_shape.divisor:
            scale = alpha / delta_shape.divisor
        else:
            scale = 1.0 if in_header is None else in_header
    except ShapeMismatch as mismatch:
        raise _mismatched(file, keys, mismatch) from None
    module = FileModule(
        target, keys, shapes, path, dialects, adapter, kind, delta_shape, alpha, scale, in_header is not None
    )
    return _whole(file, module)


def _whole(file: TensorFile, module: FileModule) -> FileModule:
    """The module, after checking that its rows can be divided among its layers."""
    try:
        list(module.pieces())
    except ShapeMismatch as mismatch:
        raise _mismatched(file, module.keys, mismatch) from None
    return module


def _mismatched(file: TensorFile, keys: Mapping[str, str], mismatch: ShapeMismatch) -> LoraFileError:
    role, what = mismatch.args
    return LoraFileError(
        f'The tensor "{keys.get(role, role)}" of "{file.path.name}" {what}: export the LoRA again.'
    )


def _check_additions(shapes: Mapping[str, Shape], delta_shape: DeltaShape) -> None:
    """Raises ShapeMismatch unless a bias has one number per row, and a magnitude one per row or per input."""
    rows, columns = delta_shape.shape
    for role in shapes.keys() & {*BIAS_ROLES, *dora.ROLES}:
        count = prod(shapes[role])
        of_inputs = role in dora.ROLES and count and columns % count == 0
        if count != rows and not of_inputs:
            raise ShapeMismatch(role, f"has {count} numbers where {rows} are needed")


def _scalar(file: TensorFile, tensors: OpenTensors, key: str | None) -> float | None:
    if key is None:
        return None
    tensor = tensors.whole(key)
    if tensor.numel() != 1 or tensor.is_complex() or not tensor.float().isfinite().all():
        raise LoraFileError(
            f'The tensor "{key}" of "{file.path.name}" is not one finite number: export the LoRA again.'
        )
    return float(tensor.float())


def _leave_out_unused(file: TensorFile, gathered: Gathered, tensors: OpenTensors) -> None:
    """Of several modules for one layer, keeps the one that changes it.

    If several change it alike, the one that holds the most layers is kept. SimpleTuner trains a fused
    projection and saves the unused single projections beside it. Some LoRAs for Z-Image contain every change
    twice, once with fused and once with split names.

    Raises:
        LoraFileError: two of them change the layer in different ways.
    """
    claims: dict[str, list[FileModule]] = {}
    for module in gathered.modules:
        for layer in module.target.layers:
            claims.setdefault(layer, []).append(module)
    contested = [modules for modules in claims.values() if len(modules) > 1]
    empty = {
        id(module): _changes_nothing(module, tensors)
        for module in {id(module): module for modules in contested for module in modules}.values()
    }
    unused: set[int] = set()
    for modules in contested:
        used = [module for module in modules if not empty[id(module)]] or modules[:1]
        used.sort(key=lambda module: -len(module.target.layers))
        for other in used[1:]:
            if not _change_alike(used[0], other, tensors):
                raise _two_modules(file, used[0], other)
        unused.update(id(module) for module in modules if module is not used[0])
    gathered.unused = [
        key for module in gathered.modules if id(module) in unused for key in module.keys.values()
    ]
    gathered.modules = [module for module in gathered.modules if id(module) not in unused]


def _changes_nothing(module: FileModule, tensors: OpenTensors) -> bool:
    """Whether a module adds only zeros. A magnitude scales the weight itself, so it always counts."""

    def is_zero(role: str) -> bool:
        tensor = tensors.whole(module.keys[role])
        return tensor.dtype in FLOATS and not tensor.float().any()

    additions = [
        role for role in module.keys if role in BIAS_ROLES or (module.kind is None and role in _NORM_ROLES)
    ]
    if module.magnitude_role is not None or not all(map(is_zero, additions)):
        return False
    return all(
        module.scale == 0 or any(is_zero(role) for role in term if role in module.keys)
        for term in (module.kind.terms if module.kind else ())
    )


_ALIKE = 0.01
"""Relative to the change: more than the rounding to bf16, and far less than the difference of two LoRAs."""


def _change_alike(one: FileModule, other: FileModule, tensors: OpenTensors) -> bool:
    """Whether two modules add the same, except for rounding, to the layers that both hold.

    Their products with one random vector are compared.
    """
    if one.adapter != other.adapter or any(m.magnitude_role or m.bias_role for m in (one, other)):
        return False
    ours, theirs = _changes(one, tensors), _changes(other, tensors)
    shared = ours.keys() & theirs.keys()
    return bool(shared) and all(
        ours[layer].shape == theirs[layer].shape
        and float(torch.linalg.vector_norm(ours[layer] - theirs[layer]))
        <= _ALIKE * float(torch.linalg.vector_norm(ours[layer]))
        for layer in shared
    )


def _changes(module: FileModule, tensors: OpenTensors) -> dict[str, Tensor]:
    """{layer: its delta times a vector that depends only on the number of columns}, empty without a delta."""
    if module.kind is None or module.delta_shape is None:
        return {}
    if any(tensors.whole(key).dtype not in FLOATS for key in module.keys.values()):
        return {}

    def get(role: str) -> Tensor:
        return tensors.whole(module.keys[role]).float()

    delta = module.kind.delta(get, module.shapes, module.scale, module.delta_shape.rank)
    if module.target.halves_swapped:
        delta = delta.with_halves_swapped()
    vector = torch.randn(delta.shape[1], generator=torch.Generator().manual_seed(0))
    changed = (
        delta.left @ (delta.right @ vector)
        if isinstance(delta, LowRank)
        else delta.rows(0, delta.shape[0]) @ vector
    )
    return {layer: changed[start:stop] * delta.scale for layer, start, stop in module.pieces()}


def _two_modules(file: TensorFile, one: FileModule, other: FileModule) -> LoraFileError:
    if one.adapter != other.adapter:
        first, second = (module.adapter or "none" for module in (one, other))
        return LoraFileError(
            f'"{file.path.name}" holds two adapters, "{first}" and "{second}", of which only one can be '
            "applied: save each to a file of its own."
        )
    return _twice(file, next(iter(one.keys.values())), next(iter(other.keys.values())))


def _twice(file: TensorFile, one: str, other: str) -> LoraFileError:
    return LoraFileError(
        f'"{file.path.name}" has two tensors for one place in the model, "{one}" and "{other}": keep the '
        "keys of one format only."
    )


def used_rank(module: FileModule, tensors: OpenTensors, start: int, stop: int) -> int | None:
    """The rank of rows start..stop: the file's, or for a piece of a fused LoRA the columns of `up` it uses.

    A column is used if it is not zero in all these rows. The rank is 0 if the rows do not change the layer,
    None for a kind without a rank. `up` is read in blocks of rows until the answer is known.
    """
    assert module.kind is not None and module.delta_shape is not None
    if module.kind.row_role is None or (module.magnitude_role is not None and len(module.target.layers) == 1):
        return module.delta_shape.rank
    matrix = tensors.whole(module.keys[module.kind.row_role])
    if matrix.dtype not in FLOATS:
        return module.delta_shape.rank
    fused = len(module.target.layers) > 1 and module.kind.rank_of_rows
    used = None
    for top in range(start, stop, _BLOCK_ROWS):
        block = matrix[top : min(top + _BLOCK_ROWS, stop)].flatten(1).float().ne(0).any(dim=0)
        used = block if used is None else used | block
        if used.all() or (not fused and used.any()):
            break
    count = 0 if used is None else int(used.sum())
    return count if fused or count == 0 else module.delta_shape.rank
