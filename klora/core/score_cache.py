"""Profiles of LoRA files on disk, by content, so that files seen before are scored in milliseconds.

An entry is a checksum and a numpy archive. An entry that cannot be trusted (damaged, cut off, in another
format) is ignored and written again. If the folder cannot be used (read-only, full), scoring goes on without
it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from itertools import islice
from pathlib import Path

import numpy as np

from klora.core.disk_store import DiskStore
from klora.core.file_state import FileState, state_of
from klora.core.profiles import FileProfile, LayerProfile

FORMAT = "klora-profile-4"
"""Must change whenever a profile's numbers or layout do: entries in another format are never read."""

MAX_EXTRA_SUMS = 8192
"""Top-K sums kept per file beside the profiles; the oldest are dropped first."""

NO_RANK = -1


class ScoreCache:
    """Profiles by file content, in one folder of bounded size.

    Safe for several processes and threads at once.

    Besides the entries there are notes in the folder. A note says what content the file at a path had in some
    state, so that the file need not be hashed again.

    Args:
        folder: created when the first profile is stored.
        limit: the most bytes that entries and notes may take together; the least recently used are deleted
            first.
    """

    def __init__(self, folder: Path, limit: int = 256 * 2**20) -> None:
        self._store = DiskStore(folder, limit, (".profile", ".note"))
        self._contents: dict[str, tuple[FileState, str]] = {}

    @property
    def folder(self) -> Path:
        return self._store.folder

    def content(self, path: Path, state: FileState | None = None) -> str | None:
        """SHA-256 of the file at `path`, computed unless there is a note for the file's present state.

        Args:
            path: the file.
            state: the state that the file must still be in; None accepts any.

        Returns:
            The hash in hexadecimal; None if the file cannot be read, is no longer in `state`, or changes
            while it is being hashed.
        """
        now = state_of(path)
        if now is None or (state is not None and now != state):
            return None
        content = self._known(now)
        if content is None:
            content = _hash(path)
            if content is None or state_of(path) != now:
                return None
            self._note(now, content)
        return content

    def load(self, content: str) -> FileProfile | None:
        """What is known of a file with this content, None if there is no valid entry."""
        entry = self.folder / _entry(content)
        try:
            payload = _checked(entry.read_bytes(), content)
        except OSError:
            return None
        if payload is None:
            return None
        self._store.mark_used(entry)
        return _unpack(payload)

    def store(self, content: str, known: FileProfile) -> None:
        """Stores what is known of a file with this content, if the folder can be written to."""
        payload = _pack(known)
        self._write(_entry(content), _digest(payload, content) + payload)
        self.trim()

    def trim(self) -> None:
        """Brings the folder below the limit by deleting the least recently used entries and notes."""
        self._store.trim()

    def size(self) -> int:
        """Bytes on disk."""
        return self._store.size()

    def clear(self) -> None:
        """Deletes all entries and notes."""
        self._contents.clear()
        self._store.clear()

    def _known(self, state: FileState) -> str | None:
        if not state.settled:
            return None
        known, content = self._contents.get(state.path, (None, None))
        if known != state:
            content = self._noted(state)
            if content is not None:
                self._contents[state.path] = state, content
        return content

    def _noted(self, state: FileState) -> str | None:
        place = self.folder / _note_name(state.path)
        try:
            note = json.loads(place.read_text(encoding="ascii"))
            content = str(note["content"]) if note["state"] == [state.path, state.text] else None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        self._store.mark_used(place)
        return content

    def _note(self, state: FileState, content: str) -> None:
        if state.settled:
            self._contents[state.path] = state, content
            note = {"state": [state.path, state.text], "content": content}
            self._write(_note_name(state.path), json.dumps(note).encode("ascii"))

    def _write(self, name: str, data: bytes) -> None:
        with contextlib.suppress(OSError):
            self._store.write(name, lambda place: place.write_bytes(data))


def _entry(content: str) -> str:
    return f"{content}.profile"


def _note_name(path: str) -> str:
    return f"{hashlib.sha256(path.encode(errors='surrogatepass')).hexdigest()}.note"


def _hash(path: Path) -> str | None:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError:
        return None
    return digest.hexdigest()


def _digest(payload: bytes, content: str) -> bytes:
    """Checksum (32 bytes) over an entry, the content of the file it belongs to, and the format."""
    return hashlib.sha256(b"\n".join((FORMAT.encode(), content.encode(), payload))).digest()


def _checked(data: bytes, content: str) -> bytes | None:
    """The payload of an entry, None unless it was written for this content in this format and is intact."""
    payload = data[32:]
    return payload if data[:32] == _digest(payload, content) else None


def _pack(known: FileProfile) -> bytes:
    """A numpy archive of only three arrays, as each takes time to read. Integers are exact in float64."""
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
