"""One folder of bounded size for files that can be made again, such as caches.

A file appears in one step, and the least recently used are deleted first. Safe for several processes and
threads. A killed process leaves at most a temporary file behind, which is deleted once it is an hour old.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from uuid import uuid4

STALE_TEMPORARY_SECONDS = 3600.0
"""A temporary file older than this was left by a process that was killed while writing."""

_TEMPORARY = ".tmp"
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
_CANNOT_FLUSH = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}
"""What file systems that cannot flush answer."""


class DiskStore:
    """Files with certain suffixes in one folder.

    Args:
        suffixes: those of the store's files. Temporary files (.tmp, and .tmp…, as safetensors names its own)
            belong to the store too.
        is_current: whether a file of this name may still be asked for; `trim` deletes all others.
        in_use_seconds: a file used less than this ago is kept even above the limit, as someone may be about
            to open it.

    Attributes:
        folder: where the files are; created when the first one is written.
        limit: the most bytes that all files may take together.
    """

    def __init__(
        self,
        folder: Path,
        limit: int,
        suffixes: Sequence[str],
        is_current: Callable[[str], bool] = lambda name: True,
        in_use_seconds: float = 0.0,
    ) -> None:
        self.folder = folder
        self.limit = limit
        self._patterns = (*(f"*{suffix}" for suffix in suffixes), f"*{_TEMPORARY}", f"{_TEMPORARY}*")
        self._is_current = is_current
        self._in_use_seconds = in_use_seconds

    def write(self, name: str, fill: Callable[[Path], object], durable: bool = False) -> Path:
        """Writes the file `name` in one step, so that no reader ever sees half of it, not even after a crash.

        Args:
            name: the file's name in the folder; an existing file is replaced.
            fill: writes the content to the path it is given.
            durable: flush the content to the disk before the file gets its name, for files without a
                checksum.

        Raises:
            OSError: the file cannot be written; nothing is left of it.
            Exception: whatever `fill` raises.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        target, temporary = self.folder / name, self.folder / f"{uuid4().hex}{_TEMPORARY}"
        try:
            fill(temporary)
            if durable:
                _flush(temporary)
            temporary.replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        return target

    def get_or_make(self, name: str, fill: Callable[[Path], object]) -> Path:
        """The file of this name, made by `fill` if there is none. The name must determine the content.

        Raises:
            OSError: the file cannot be written, even after all files that are not in use were deleted to make
                room.
            Exception: whatever `fill` raises.
        """
        target = self.folder / name
        self.mark_used(target)
        if target.exists():
            return target
        try:
            self.write(name, fill, durable=True)
        except PermissionError:
            # Windows: another process has made the same file in the meantime and has it open.
            if not target.exists():
                raise
        except OSError as error:
            if error.errno not in _FULL:
                raise
            self._delete_down_to(0)
            self.write(name, fill, durable=True)
        self._delete_down_to(self.limit, keep=target)
        return target

    def mark_used(self, path: Path) -> None:
        """Counts a file as used now; a file that does not exist is ignored."""
        with contextlib.suppress(OSError):
            os.utime(path)

    def trim(self) -> None:
        """Brings the folder below the limit by deleting the least recently used files."""
        self._delete_down_to(self.limit)

    def size(self) -> int:
        """Bytes on disk."""
        return sum(size for _, size, _ in self._files())

    def clear(self) -> None:
        """Deletes all the store's files that can be deleted."""
        for _, _, path in self._files():
            _delete(path)

    def _delete_down_to(self, limit: int, keep: Path | None = None) -> None:
        files = self._files()
        total = sum(size for _, size, _ in files)
        newest = files[-1][0] if files else 0.0
        for used, size, path in files:
            age = newest - used  # by the clock of the file system, which may differ from ours
            if _TEMPORARY in (path.suffix, path.name[: len(_TEMPORARY)]):
                doomed = age > STALE_TEMPORARY_SECONDS
            else:
                doomed = not self._is_current(path.name) or (total > limit and age >= self._in_use_seconds)
            if doomed and path != keep and _delete(path):
                total -= size

    def _files(self) -> list[tuple[float, int, Path]]:
        """(time of last use, bytes, file) of all the store's files, the least recently used first."""
        found = []
        for pattern in self._patterns:
            for path in self.folder.glob(pattern):
                with contextlib.suppress(OSError):
                    stat = path.stat()
                    found.append((stat.st_mtime, stat.st_size, path))
        return sorted(found)


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in _CANNOT_FLUSH:
                raise


def _delete(path: Path) -> bool:
    """Whether the file is gone. Windows deletes no file that is open or mapped: a later call gets it."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True
