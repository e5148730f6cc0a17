"""A file of named tensors: .safetensors is memory-mapped, .pt and its like are read with `weights_only`."""

from __future__ import annotations

import json
import pickle
import re
import struct
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import safetensors
import torch
from torch import Tensor

from klora.errors import LoraFileError

_PICKLED = {".pt", ".pth", ".ckpt", ".bin"}
_LONGEST_HEADER = 100_000_000
"""Bytes; the safetensors format allows no more (MAX_HEADER_SIZE in its source)."""

_IMAGES = {"ssmd_cover_images", "modelspec.thumbnail"}
"""Metadata that may be many megabytes of images, which K-LoRA does not need."""

FLOATS = {
    dtype
    for name in ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
    if (dtype := getattr(torch, name, None)) is not None
}
"""Number types in which a LoRA may be stored."""

_AGAIN = "download or copy it again"
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_ARCHIVES = (b"PK\x03\x04", b"Rar!\x1a\x07", b"7z\xbc\xaf\x27\x1c", b"\x1f\x8b")
_PICKLE = re.compile(rb"\x80[\x02-\x05]")


class OpenTensors(Protocol):
    """Tensors of an open file by key."""

    def whole(self, key: str) -> Tensor:
        """The tensor of `key`, in the file's dtype, on the CPU, not copied where the file is mapped."""


@dataclass(frozen=True)
class TensorFile:
    """What a file contains, except for the tensors themselves.

    Attributes:
        path: the file.
        shapes: {key: shape}, in the file's order.
        metadata: the header's __metadata__ without its images; empty for formats other than safetensors.
        types: {key: number type, in safetensors' codes such as "BF16"}; empty for formats other than
            safetensors.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]
    types: Mapping[str, str] = field(default_factory=dict)

    def open(self) -> AbstractContextManager[OpenTensors]:
        """The file's tensors; usable from several threads.

        Raises:
            LoraFileError: the file is gone, damaged, or of a type that an installed library does not know.
        """
        if self.path.suffix.lower() in _PICKLED:
            with _readable(self.path):
                return nullcontext(_Loaded(_unpickle(self.path)))
        return _open_safetensors(self)


def read_tensor_file(path: Path) -> TensorFile:
    """Reads the names and shapes of a file's tensors.

    Raises:
        LoraFileError: the file is missing, unreadable, truncated, or in another format.
    """
    with _readable(path):
        if path.is_dir():
            raise LoraFileError(f'"{path}" is a folder, not a LoRA file: name the .safetensors file in it.')
        if any("\ud800" <= char <= "\udfff" for char in str(path)):
            raise LoraFileError(
                f'The name of the LoRA file "{path}" is not valid UTF-8, so no WebUI can record it: rename '
                "the file."
            )
        size = path.stat().st_size
        if size == 0:
            raise LoraFileError(f'The LoRA file "{path.name}" is empty: {_AGAIN}.')
        _check_container(path, size)
        if path.suffix.lower() in _PICKLED:
            tensors = _unpickle(path)
            return TensorFile(path, {key: tuple(tensor.shape) for key, tensor in tensors.items()}, {})
        return _read_safetensors(path, size)


def _check_container(path: Path, size: int) -> None:
    """Refuses a file whose first bytes show that it is not in the format that its ending says."""
    with path.open("rb") as stream:
        start = stream.read(len(_LFS_POINTER))
    pickled = path.suffix.lower() in _PICKLED
    if start.startswith(_LFS_POINTER):
        raise LoraFileError(
            f'"{path.name}" is a git-lfs pointer of {size} bytes, not the LoRA itself: '
            'fetch it with "git lfs pull", or download it.'
        )
    if pickled and start[8:9] == b"{" and 2 <= struct.unpack("<Q", start[:8])[0] <= size - 8:
        raise LoraFileError(
            f'"{path.name}" is a safetensors file with the ending {path.suffix}: rename it to '
            f'"{path.stem}.safetensors".'
        )
    if _is_pytorch(path, start):
        if not pickled:
            raise LoraFileError(
                f'"{path.name}" is a PyTorch file with the wrong ending: rename it to "{path.stem}.pt", or '
                "take the LoRA saved as .safetensors."
            )
    elif start.startswith(_ARCHIVES[1:]) or (start.startswith(_ARCHIVES[0]) and zipfile.is_zipfile(path)):
        kind = "a zip archive" if start.startswith(_ARCHIVES[0]) else "an archive"
        raise LoraFileError(f'"{path.name}" is {kind}: unpack it and choose the LoRA file that is in it.')


def _is_pytorch(path: Path, start: bytes) -> bool:
    """Whether `torch.save` wrote this file: a zip archive with a pickle; before PyTorch 1.6 only a pickle."""
    if not start.startswith(_ARCHIVES[0]):
        return _PICKLE.match(start) is not None
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return False


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise LoraFileError(f'The LoRA file "{path}" does not exist: check its name and folder.') from None
    except OSError as error:
        raise LoraFileError(
            f'The LoRA file "{path}" cannot be read ({error.strerror or error}): check its permissions.'
        ) from error


def _read_safetensors(path: Path, size: int) -> TensorFile:
    not_safetensors = (
        f'The file "{path.name}" is not a safetensors file: {_AGAIN}, or name a LoRA saved as .safetensors.'
    )
    with path.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        opening = stream.read(1)
        if opening != b"{" or length < 2:
            raise LoraFileError(not_safetensors)
        if length > _LONGEST_HEADER:
            raise LoraFileError(
                f'The header of "{path.name}" claims to be {length} bytes long, more than the safetensors '
                f"format allows: {_AGAIN}."
            )
        if length + 8 > size:
            raise LoraFileError(f'The LoRA file "{path.name}" is cut off inside its header: {_AGAIN}.')
        text = opening + stream.read(length - 1)
    try:
        header: dict[str, Any] = json.loads(text)
        metadata = dict((header.pop("__metadata__", None) or {}).items())
        shapes = {key: tuple(int(n) for n in entry["shape"]) for key, entry in header.items()}
        types = {key: str(entry["dtype"]) for key, entry in header.items()}
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        raise LoraFileError(not_safetensors) from None
    if 8 + length + end > size:
        raise LoraFileError(
            f'The LoRA file "{path.name}" is cut off: {8 + length + end - size} of its bytes are missing; '
            f"{_AGAIN}."
        )
    foreign = next((key for key, value in metadata.items() if not isinstance(value, str)), None)
    if foreign is not None:
        raise LoraFileError(
            f'The metadata "{foreign}" in the header of "{path.name}" is not text, so neither K-LoRA nor any '
            "WebUI can read the file: save it again with all its metadata as text."
        )
    without_images = {key: value for key, value in metadata.items() if key not in _IMAGES}
    return TensorFile(path, shapes, without_images, types)


@contextmanager
def _open_safetensors(file: TensorFile) -> Iterator[OpenTensors]:
    path = file.path
    try:
        opened = safetensors.safe_open(str(path), framework="pt", device="cpu")
    except FileNotFoundError:
        raise LoraFileError(
            f'The LoRA file "{path}" is no longer there: check its name and folder.'
        ) from None
    except (safetensors.SafetensorError, OSError) as error:
        known = {code: _is_known(code) for code in set(file.types.values())}
        new = next((key for key, code in file.types.items() if not known[code]), None)
        if new is not None:
            raise _too_new(file, new, f"safetensors {safetensors.__version__}") from error
        raise LoraFileError(f'The LoRA file "{path.name}" cannot be read ({error}): {_AGAIN}.') from error
    with opened as tensors:
        yield _Mapped(file, tensors)


def _is_known(code: str) -> bool:
    """Whether the installed version of safetensors knows a number type."""
    header = json.dumps({"none": {"dtype": code, "shape": [0], "data_offsets": [0, 0]}}).encode()
    try:
        safetensors.deserialize(struct.pack("<Q", len(header)) + header)
    except safetensors.SafetensorError:
        return False
    return True


def _too_new(file: TensorFile, key: str, library: str) -> LoraFileError:
    return LoraFileError(
        f'The tensor "{key}" of "{file.path.name}" holds numbers of the type {file.types[key]}, which '
        f"{library} does not know: take the LoRA saved in fp32, fp16 or bf16, or a newer version of that "
        "library."
    )


@dataclass(frozen=True)
class _Mapped:
    file: TensorFile
    tensors: Any

    def whole(self, key: str) -> Tensor:
        name = self.file.path.name
        try:
            tensor: Tensor = self.tensors.get_tensor(key)
        except AttributeError as error:
            raise _too_new(self.file, key, f"torch {torch.__version__}") from error
        except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            if "Dtype not understood" in str(error):
                raise _too_new(self.file, key, f"safetensors {safetensors.__version__}") from error
            raise LoraFileError(
                f'The tensor "{key}" of "{name}" cannot be read ({error}): {_AGAIN}.'
            ) from error
        if tuple(tensor.shape) != self.file.shapes[key]:
            raise LoraFileError(
                f'The tensor "{key}" of "{name}" does not have the shape that the header says: {_AGAIN}.'
            )
        return tensor


@dataclass(frozen=True)
class _Loaded:
    tensors: Mapping[str, Tensor]

    def whole(self, key: str) -> Tensor:
        return self.tensors[key]


def _unpickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch file; no code in the file is ever run."""
    # Before 2.6, torch runs code from tar files in spite of weights_only (CVE-2025-32434).
    if tarfile.is_tarfile(path):
        raise LoraFileError(
            f'The file "{path.name}" is in a PyTorch format that can run code: use a .safetensors file.'
        )
    try:
        content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        # torch.save writes this for the number types that torch 2.2 and later have.
        if "_rebuild_tensor_v3" in str(error):
            raise LoraFileError(
                f'The file "{path.name}" holds numbers of a type that torch {torch.__version__} does not '
                "know: take the LoRA saved in fp32, fp16 or bf16, or a newer torch."
            ) from None
        raise LoraFileError(
            f'The file "{path.name}" is broken or holds more than tensors: use a .safetensors file.'
        ) from None
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can make its reader raise anything
        raise LoraFileError(
            f'The file "{path.name}" cannot be read as a PyTorch file ({error}): {_AGAIN}.'
        ) from error
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    content = content if isinstance(content, dict) else {}
    tensors = {
        key: value.detach()
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    for key, tensor in tensors.items():
        if (
            tensor.layout != torch.strided
            or tensor.is_quantized
            or tensor.device.type != "cpu"
            or not _is_whole(tensor)
        ):
            raise LoraFileError(
                f'The tensor "{key}" of "{path.name}" is not stored as plain numbers: use a .safetensors '
                "file."
            )
    if not tensors:
        raise LoraFileError(
            f'The file "{path.name}" holds no tensors by name, so it is not a LoRA: use a .safetensors file.'
        )
    return tensors


def _is_whole(tensor: Tensor) -> bool:
    """Whether every entry of a tensor is stored. One that repeats a few entries could claim any size."""
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()
