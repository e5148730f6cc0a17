"""Profiles of LoRA files on disk, by the files' content, so that files seen before pair in milliseconds.

An entry is a checksum and a numpy archive. Whatever is wrong with one (damaged, cut off, of another format), it is ignored and written
again; whatever is wrong with the folder (read-only, full), scoring goes on without it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from klora.core.scores import FileProfile
from klora.core.topk import LayerProfile

FORMAT = b"klora-profile-1\n"
"""Change it with anything that changes a profile's numbers or layout: entries of another format are never read."""

DIGEST_SIZE = 32
NO_RANK = -1


class ScoreCache:
    """Profiles by file content, in one folder of bounded size. Safe for several processes and threads at once.

    Attributes:
        folder: made when the first profile is stored.
        limit: bytes; the least recently used entries go first.
    """

    def __init__(self, folder: Path, limit: int = 256 * 2**20) -> None:
        self.folder = folder
        self.limit = limit

    def load(self, path: Path) -> FileProfile | None:
        """The profile of the LoRA file at `path`, None if there is none to trust."""
        try:
            entry = self._entry(self._content(path))
            data = entry.read_bytes()
            file_profile = _unpack(data)
            if file_profile is not None:
                os.utime(entry)
        except OSError:
            return None
        return file_profile

    def store(self, path: Path, file_profile: FileProfile) -> None:
        """Remember the profile of the LoRA file at `path`."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self._entry(self._content(path)), _pack(file_profile))
            self._evict()
        except OSError:
            return

    def size(self) -> int:
        """Bytes of all entries."""
        return sum(size for _, size, _ in self._entries())

    def clear(self) -> None:
        """Drop all entries."""
        for path in [*(path for _, _, path in self._entries()), *self.folder.glob("*.path")]:
            path.unlink(missing_ok=True)

    def _entry(self, content: str) -> Path:
        return self.folder / f"{content}.profile"

    def _content(self, path: Path) -> str:
        """SHA-256 of the file, hashed anew when its size or time of change differs from when it was last hashed."""
        stat = path.stat()
        place = str(path.resolve())
        state = [place, stat.st_size, stat.st_mtime_ns]
        note = self.folder / f"{hashlib.sha256(place.encode()).hexdigest()[:32]}.path"
        try:
            known = json.loads(note.read_text(encoding="utf-8"))
            if known["state"] == state:
                return str(known["content"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(note, json.dumps({"state": state, "content": digest.hexdigest()}).encode())
        except OSError:
            pass
        return digest.hexdigest()

    def _entries(self) -> list[tuple[float, int, Path]]:
        """(time of last use, bytes, file) of every entry, the least recently used first."""
        found = []
        for path in self.folder.glob("*.profile"):
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            found.append((stat.st_mtime, stat.st_size, path))
        return sorted(found)

    def _evict(self) -> None:
        entries = self._entries()
        total = sum(size for _, size, _ in entries)
        for _, size, path in entries[:-1]:
            if total <= self.limit:
                return
            path.unlink(missing_ok=True)
            total -= size


def _write(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step, so that no reader and no crash ever sees half of it."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem[:16], suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _pack(file_profile: FileProfile) -> bytes:
    layers = file_profile.layers.values()
    extra = file_profile.extra_sums
    archive = io.BytesIO()
    np.savez(
        archive,
        names=np.array(list(file_profile.layers), dtype=np.str_),
        ranks=np.array([NO_RANK if layer.rank is None else layer.rank for layer in layers], np.int64),
        numels=np.array([layer.numel for layer in layers], np.int64),
        abs_sums=np.array([layer.abs_sum for layer in layers]),
        squared_sums=np.array([layer.squared_sum for layer in layers]),
        top_sums=np.stack([layer.top_sums for layer in layers]),
        extra_names=np.array([name for name, _ in extra], dtype=np.str_),
        extra_ks=np.array([k for _, k in extra], np.int64),
        extra_sums=np.array(list(extra.values())),
    )
    payload = archive.getvalue()
    return FORMAT + hashlib.sha256(payload).digest() + payload


def _unpack(data: bytes) -> FileProfile | None:
    """The profile in an entry's bytes, None if they are not exactly what `_pack` wrote."""
    start = len(FORMAT) + DIGEST_SIZE
    payload = data[start:]
    if not data.startswith(FORMAT) or hashlib.sha256(payload).digest() != data[len(FORMAT) : start]:
        return None
    try:
        with np.load(io.BytesIO(payload), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, zipfile.BadZipFile):
        return None
    columns = [arrays[name].tolist() for name in ("names", "ranks", "numels", "abs_sums", "squared_sums")]
    layers = {
        name: LayerProfile(None if rank == NO_RANK else rank, numel, abs_sum, squared_sum, top_sums)
        for name, rank, numel, abs_sum, squared_sum, top_sums in zip(*columns, arrays["top_sums"], strict=True)
    }
    extra = zip(arrays["extra_names"].tolist(), arrays["extra_ks"].tolist(), arrays["extra_sums"].tolist(), strict=True)
    return FileProfile(layers, {(name, k): value for name, k, value in extra})
