"""Profiles of LoRA files on disk, by the files' content, so that files seen before pair in milliseconds.

An entry is a checksum and a numpy archive. Whatever is wrong with one (damaged, cut off, of another format), it is ignored and written
again; whatever is wrong with the folder (read-only, full), scoring goes on without it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np

from klora.core.profiles import FileProfile, LayerProfile

FORMAT = "klora-profile-4"
"""Change it with anything that changes a profile's numbers or layout: entries of another format are never read."""

MAX_EXTRA_SUMS = 8192
"""Top-K sums kept per file beside the profiles; older ones go."""

STALE_TEMPORARY_SECONDS = 3600.0
"""A temporary file as old as this was left by a process that was killed while it wrote."""

NO_RANK = -1


class ScoreCache:
    """Profiles by file content, in one folder of bounded size. Safe for several processes and threads at once.

    Beside the entries the folder holds notes: what content the file at a path had at a size and time of change, so that
    it is not hashed again.

    Attributes:
        folder: made when the first profile is stored.
        limit: bytes of entries and notes; the least recently used go first.
    """

    def __init__(self, folder: Path, limit: int = 256 * 2**20) -> None:
        self.folder = folder
        self.limit = limit
        self._contents: dict[tuple[str, int, int], str] = {}

    def content(self, path: Path) -> str | None:
        """SHA-256 of the file at `path`, hashed anew when its size or time of change is not the noted one; None if unreadable."""
        try:
            stat = path.stat()
            state = (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
            if state not in self._contents:
                self._contents[state] = self._noted(state) or self._hash(path, state)
            return self._contents[state]
        except OSError:
            return None

    def load(self, content: str) -> FileProfile | None:
        """What is known of a file of this content, None if there is no entry to trust."""
        entry = self._entry(content)
        try:
            payload = _checked(entry.read_bytes(), content)
        except OSError:
            return None
        if payload is None:
            return None
        _used(entry)
        return _unpack(payload)

    def store(self, content: str, known: FileProfile) -> None:
        """Remember what is known of a file of this content."""
        payload = _pack(known)
        self._write(self._entry(content), _digest(payload, content) + payload)
        self.trim()

    def trim(self) -> None:
        """Bring the folder below the limit: the least recently used go first."""
        files = self._files()
        total = sum(size for _, size, _ in files)
        newest = files[-1][0] if files else 0.0
        for used, size, path in files:
            abandoned = path.suffix == ".tmp" and used < newest - STALE_TEMPORARY_SECONDS
            if abandoned or (total > self.limit and path.suffix != ".tmp"):
                with contextlib.suppress(OSError):
                    path.unlink()
                total -= size

    def size(self) -> int:
        """Bytes on disk."""
        return sum(size for _, size, _ in self._files())

    def clear(self) -> None:
        """Drop all entries and notes."""
        self._contents.clear()
        for _, _, path in self._files():
            with contextlib.suppress(OSError):
                path.unlink()

    def _entry(self, content: str) -> Path:
        return self.folder / f"{content}.profile"

    def _note(self, path: str) -> Path:
        return self.folder / f"{hashlib.sha256(path.encode(errors='surrogatepass')).hexdigest()}.note"

    def _noted(self, state: tuple[str, int, int]) -> str | None:
        place = self._note(state[0])
        try:
            note = json.loads(place.read_text(encoding="ascii"))
            content = str(note["content"]) if note["state"] == list(state) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        _used(place)
        return content

    def _hash(self, path: Path, state: tuple[str, int, int]) -> str:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        self._write(
            self._note(state[0]), json.dumps({"state": state, "content": digest.hexdigest()}).encode("ascii")
        )
        return digest.hexdigest()

    def _write(self, path: Path, data: bytes) -> None:
        """Replace `path` by `data` in one step, so that no reader and no crash ever sees half of it; without success if it can't be."""
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                Path(temporary).replace(path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise

    def _files(self) -> list[tuple[float, int, Path]]:
        """(time of last use, bytes, file) of all files of the cache, the least recently used first."""
        found = []
        for pattern in ("*.profile", "*.note", "*.tmp"):
            for path in self.folder.glob(pattern):
                with contextlib.suppress(OSError):
                    stat = path.stat()
                    found.append((stat.st_mtime, stat.st_size, path))
        return sorted(found)


def _used(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.utime(path)


def _digest(payload: bytes, content: str) -> bytes:
    """Checksum (32 bytes) of an entry, of the file it belongs to and of the format."""
    return hashlib.sha256(b"\n".join((FORMAT.encode(), content.encode(), payload))).digest()


def _checked(data: bytes, content: str) -> bytes | None:
    """The payload of an entry, None unless it is what was written for this content in this format."""
    payload = data[32:]
    return payload if data[:32] == _digest(payload, content) else None


def _pack(known: FileProfile) -> bytes:
    """A numpy archive of three arrays, as every array costs time to read. Ranks, sizes and K are exact in float64."""
    extra = dict(islice(known.extra_sums.items(), max(0, len(known.extra_sums) - MAX_EXTRA_SUMS), None))
    places = {name: place for place, name in enumerate(known.layers)}
    numbers = [
        (
            NO_RANK if layer.rank is None else layer.rank,
            layer.numel,
            layer.abs_sum,
            layer.squared_sum,
            *layer.top_sums.tolist(),
        )
        for layer in known.layers.values()
    ]
    archive = io.BytesIO()
    np.savez(
        archive,
        names=np.frombuffer("\n".join(known.layers).encode(), np.uint8),
        layers=np.array(numbers, np.float64),
        extra_sums=np.array(
            [(places[name], k, value) for (name, k), value in extra.items()], np.float64
        ).reshape(-1, 3),
    )
    return archive.getvalue()


def _unpack(payload: bytes) -> FileProfile:
    with np.load(io.BytesIO(payload), allow_pickle=False) as archive:
        names, numbers, extra_sums = (archive[name] for name in ("names", "layers", "extra_sums"))
    names = names.tobytes().decode().split("\n")
    layers = {
        name: LayerProfile(None if rank == NO_RANK else int(rank), int(numel), abs_sum, squared_sum, top_sums)
        for name, (rank, numel, abs_sum, squared_sum), top_sums in zip(
            names, numbers[:, :4].tolist(), numbers[:, 4:], strict=True
        )
    }
    return FileProfile(
        layers, {(names[int(place)], int(k)): value for place, k, value in extra_sums.tolist()}
    )
