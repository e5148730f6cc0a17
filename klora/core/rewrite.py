"""Writing a LoRA file with the key names that A1111, Forge and similar WebUIs load.

A module is written with kohya's keys and native names. Pieces of a fused module that come as matrices of
their own are written with diffusers' names and PEFT's lora_A / lora_B instead. One file may contain both, as
Forge reads such files. Tensors are copied byte for byte. Where the host has no correct names for such
pieces, they are joined to the fused module (see `fused_pieces`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from klora.core.adapters import dora
from klora.core.families.base import DIFFUSERS, Family
from klora.core.fused_pieces import FusedTensor, fuse
from klora.core.key_names import SUFFIXES
from klora.core.lora_file import LoraFile
from klora.core.lora_modules import FileModule
from klora.core.tensor_file import OpenTensors
from klora.core.text_encoders import TEXT_ENCODERS
from klora.errors import LoraFileError

_KOHYA = {"up": ".lora_up.weight", "down": ".lora_down.weight", "mid": ".lora_mid.weight", "alpha": ".alpha"}
_PEFT = {**_KOHYA, "up": ".lora_B.weight", "down": ".lora_A.weight"}
_OTHER = {role: suffix for suffix, role in SUFFIXES.items() if role not in _KOHYA}
_RENAMED = {"up_bias": ".diff_b", dora.PEFT: ".dora_scale"}
_BIASES = ("diff_b", "up_bias")
_DTYPES = {
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2",
    "int64", "int32", "int16", "int8", "uint8", "bool",
}  # fmt: skip
"""Types that all versions of safetensors installed by the hosts can write."""

_HASHES_OF_THE_ORIGINAL = {"sshs_model_hash", "sshs_legacy_hash"}
"""kohya's hashes of the tensors' bytes: with them, a host would take the copy for the original."""

FORMAT = "klora-keys-1"
"""Must change whenever a file would be written differently: hosts never get copies in another format."""


@dataclass(frozen=True)
class _Entry:
    """One tensor to write.

    Attributes:
        source: the file's key to copy from; None writes `number`.
        rows: the rows to copy; None copies all.
        shape: the shape to write; None keeps the source's.
        factor: what the values are multiplied by.
    """

    source: str | None
    number: float = 0.0
    rows: slice | None = None
    shape: tuple[int, ...] | None = None
    factor: float = 1.0


def is_in(lora: LoraFile, dialects: Collection[str]) -> bool:
    """Whether a host's loader that knows these dialects applies the whole of a file as it is.

    No host's loader looks for a scale in the header or knows PEFT's names for magnitudes and biases.
    """
    odd = any(role in _RENAMED for module in lora.modules for role in module.keys)
    return lora.dialects <= set(dialects) and not (lora.scale_from_metadata or lora.unused_keys or odd)


def rewrite(lora: LoraFile, destination: str | os.PathLike[str]) -> tuple[str, ...]:
    """Writes `lora` as a safetensors file that the hosts can load.

    If writing fails, a partial file may be left.

    Only names change, with these exceptions: a scale that is only in the header's adapter metadata is written
    as alpha; PEFT's magnitude of shape (rows,) gets LyCORIS' shape (rows, 1); PEFT's `lora_B.bias` becomes
    `diff_b`, multiplied by the scale; kohya's hashes of the original are left out.

    Returns:
        The keys left out because no host knows them: `lora.unknown_keys`. `lora.unused_keys` are left out
        too.

    Raises:
        LoraFileError: a tensor cannot be read, has a number type that hosts do not know, or cannot be cut
            into the layers that they load.
        OSError: the destination cannot be written.
    """
    entries: dict[str, _Entry | FusedTensor] = dict(_all_entries(lora))
    entries.update({key: _Entry(key) for key in lora.embeddings})
    metadata = {name: text for name, text in lora.metadata.items() if name not in _HASHES_OF_THE_ORIGINAL}
    with lora.tensor_file.open() as opened:
        tensors = _tensors(entries, opened, lora)
        try:
            save_file(tensors, destination, metadata or None)
        except SafetensorError as error:
            raise _system_error(error, os.fspath(destination)) from error
    return lora.unknown_keys


def _all_entries(lora: LoraFile) -> Iterator[tuple[str, _Entry | FusedTensor]]:
    by_the_whole = lora.family.find is None and not lora.family.diffusers_is_read
    pieces: dict[str, list[FileModule]] = {}
    for module in lora.modules:
        network = module.target.module
        if by_the_whole and module.target.base == lora.base and module.target.layers != network.layers:
            pieces.setdefault(network.native, []).append(module)
        else:
            yield from _entries(lora, module)
    for native, modules in pieces.items():
        for tensor in fuse(lora, modules):
            suffix = _KOHYA.get(tensor.role) or _OTHER[tensor.role]
            yield f"lora_unet_{_flat(native)}{suffix}", tensor


def _entries(lora: LoraFile, module: FileModule) -> Iterator[tuple[str, _Entry]]:
    kind = module.kind
    cut_roles = (*_BIASES, *(kind.cut_roles if kind else ()))
    for name, suffixes, rows in _places(module, lora.family):
        if rows is not None and kind is not None and not kind.cut_roles:
            key = next(module.keys[role] for role in kind.terms[0] if role in module.keys)
            raise LoraFileError(
                f'The fused tensor "{key}" of "{lora.path.name}" cannot be cut into the layers that WebUIs '
                "load: export the LoRA in kohya's format."
            )
        for role, key in module.keys.items():
            cut = rows if role in cut_roles or dora.has_rows(role, module.shapes[role]) else None
            suffix = suffixes.get(role) or _RENAMED.get(role) or _OTHER[role]
            shape = _magnitude_shape(module, cut) if role == dora.PEFT else None
            yield (
                name + suffix,
                _Entry(key, rows=cut, shape=shape, factor=module.scale if role == "up_bias" else 1.0),
            )
        needs_alpha = module.scale_from_metadata or (kind is not None and kind.needs_alpha)
        divisor = module.delta_shape.divisor if module.delta_shape else None
        if needs_alpha and "alpha" not in module.keys and divisor:
            yield name + ".alpha", _Entry(None, number=module.scale * divisor)


def _places(module: FileModule, family: Family) -> Iterator[tuple[str, Mapping[str, str], slice | None]]:
    """(start of the key, suffixes of the factors, rows or None for all) of each module to be written."""
    target = module.target
    native = target.module.native
    if target.base in TEXT_ENCODERS:
        yield TEXT_ENCODERS[target.base].prefixes[0].text + _flat(native.partition(":")[2]), _KOHYA, None
        return
    if target.layers == target.module.layers and not target.halves_swapped:
        split_name = family.diffusers_is_read and target.naming == DIFFUSERS and len(target.layers) == 1
        yield (
            (family.dotted(target.module.diffusers[0]), _PEFT, None)
            if split_name
            else (f"lora_unet_{_flat(native)}", _KOHYA, None)
        )
    else:
        names = dict(zip(target.module.layers, target.module.diffusers, strict=True))
        for layer, start, stop in module.pieces():
            yield (
                family.dotted(names[layer]),
                _PEFT,
                slice(start, stop) if len(target.layers) > 1 else None,
            )


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _magnitude_shape(module: FileModule, rows: slice | None) -> tuple[int, ...]:
    height = prod(module.shapes[dora.PEFT]) if rows is None else rows.stop - rows.start
    return (height, *[1] * (len(module.shapes["down"]) - 1))


def _tensors(
    entries: Mapping[str, _Entry | FusedTensor], opened: OpenTensors, lora: LoraFile
) -> dict[str, Tensor]:
    """{key: tensor to write}, memory-mapped from the file where a whole tensor is copied unchanged."""
    found: dict[str, Tensor] = {}
    places = set()
    for key, entry in entries.items():
        tensor = entry.read(lora, opened) if isinstance(entry, FusedTensor) else _tensor(entry, opened)
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in _DTYPES:
            raise LoraFileError(
                f'The tensor "{entry.source}" of "{lora.path.name}" holds {dtype} numbers: save the LoRA in '
                "fp32, fp16, bf16 or fp8."
            )
        is_part = tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
        if is_part or tensor.data_ptr() in places:
            tensor = tensor.clone()  # safetensors refuses tensors that share memory
        places.add(tensor.data_ptr())
        found[key] = tensor
    return found


def _tensor(entry: _Entry, tensors: OpenTensors) -> Tensor:
    if entry.source is None:
        return torch.tensor(entry.number, dtype=torch.float32)
    tensor = tensors.whole(entry.source)
    tensor = tensor if entry.rows is None else tensor[entry.rows]
    tensor = tensor if entry.factor == 1.0 else (tensor.float() * entry.factor).to(tensor.dtype)
    return (tensor if entry.shape is None else tensor.reshape(entry.shape)).contiguous()


def _system_error(error: SafetensorError, destination: str) -> OSError:
    """The system's error inside the library's, which gives the error number in its text only."""
    number = re.search(r"(?:code:|os error) (\d+)", str(error))
    code = int(number[1]) if number else 0
    reason = os.strerror(code) if code and os.name == "posix" else str(error)
    return OSError(code, reason, destination, code)
