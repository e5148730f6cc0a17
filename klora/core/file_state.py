"""Whether a file is still the one that was seen: the one notion of it, for everything that is kept about files.

Path, size and time of change are not enough: copies keep their times, and some build systems and mounts give every file the same one.
Inode and change time tell such files apart where the system keeps them. Windows, FAT and some network mounts have no change time
(Windows gives the time of creation in its place), so the header and some blocks of the file are looked at too. There alone a change goes
unseen if it keeps size and time and lies between those blocks, which no training or conversion does.
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
"""Longer than the coarsest grain of a time stamp (2 s on FAT): a file that was changed less than this ago may be changed again without
getting another one."""

BLOCKS, BLOCK_BYTES = 16, 4096
"""Looked at beside the header, evenly spread from its end to the file's."""

_OPENING_BYTES = 4096
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class FileState:
    """A file as it was at one moment: two equal states of one path are of the same bytes, if `settled`.

    Attributes:
        path: resolved.
        text: what tells the state from others of this path. The device's number is not in it: it differs from mount to mount.
        settled: whether every later change gives another state.
    """

    path: str
    text: str
    settled: bool = field(compare=False)


def state_of(path: Path) -> FileState | None:
    """The present state of a file, in about a millisecond; None if it is no file that can be read."""
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
    """A name for the file with its present content, to key what is made of it: equal names, equal content.

    While the file is not settled no two names of it are equal. A file that cannot be read has one too.
    """
    state = state_of(path)
    if state is None:
        return f"{path} (unreadable)"
    name = f"{state.path} {state.text}"
    return name if state.settled else f"{name} {uuid4().hex}"


def _sample(file: BinaryIO, size: int) -> str:
    """SHA-256 of a safetensors file's whole header and of some blocks of what follows; of any other file of some blocks."""
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
