"""Whether a file is still the one that was seen before: one answer for everything that is cached about files.

Path, size and time of modification are not enough: copies keep their times, and some build systems and mounts
give every file the same one. Inode and change time tell such files apart where the system has them. Windows,
FAT and some network mounts have no change time (Windows gives the time of creation instead), so the header
and some blocks of the file are compared too. Only there can a change be missed: if it keeps size and time and
lies between those blocks, which no training or conversion manages.
"""

from __future__ import annotations

import hashlib
import stat
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

SETTLED_SECONDS = 3.0
"""Longer than the coarsest step of a time stamp (2 s on FAT): a file changed less than this ago may change
again without getting a new time stamp."""

BLOCKS, BLOCK_BYTES = 16, 4096
"""Compared along with the header: this many blocks of this size, spread evenly over the rest of the file."""

_OPENING_BYTES = 4096
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class FileState:
    """A file as it was at one moment. Two equal states mean equal bytes if they are `settled`.

    Attributes:
        path: the resolved path.
        text: what tells this state from others of the path. The device number is left out, as it differs from
            mount to mount.
        settled: whether any later change is sure to give another state.
    """

    path: str
    text: str
    settled: bool = field(compare=False)


def state_of(path: Path) -> FileState | None:
    """The present state of a file, found in about a millisecond; None if there is no readable file."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            return None
        with path.open("rb") as file:
            sample = _sample(file, found.st_size)
        resolved = str(path.resolve())
    except OSError:
        return None
    times = found.st_mtime_ns, found.st_ctime_ns
    text = " ".join(map(str, (found.st_ino, found.st_size, *times, sample)))
    now = time.time()
    return FileState(
        resolved, text, all(abs(now - nanoseconds / 1e9) > SETTLED_SECONDS for nanoseconds in times)
    )


def version_of(path: Path) -> str:
    """A key for caching what is made from a file: equal keys mean equal content.

    While the file is not settled, every call gives a new key. A file that cannot be read gets a key too.
    """
    state = state_of(path)
    if state is None:
        return f"{path} (unreadable)"
    name = f"{state.path} {state.text}"
    return name if state.settled else f"{name} {uuid4().hex}"


def _sample(file: BinaryIO, size: int) -> str:
    """SHA-256 of some blocks of a file, and of the whole header if it is a safetensors file."""
    opening = file.read(_OPENING_BYTES)
    digest = hashlib.sha256(opening)
    length = struct.unpack("<Q", opening[:8])[0] if len(opening) >= 8 else 0
    start = 8 + length if length <= min(size, _LONGEST_HEADER) else 0
    digest.update(file.read(max(0, start - len(opening))))
    span = max(0, size - BLOCK_BYTES - start)
    for place in sorted({start + span * i // (BLOCKS - 1) for i in range(BLOCKS)}):
        file.seek(place)
        digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()
