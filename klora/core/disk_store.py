"""Files that can be made again, in one folder of bounded size: written in one step, the least recently used deleted first.

Safe for several processes and threads. A process that is killed leaves a temporary file at most, which goes when it is an hour old.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from uuid import uuid4

STALE_TEMPORARY_SECONDS = 3600.0
"""A temporary file as old as this was left by a process that was killed while it wrote."""

_TEMPORARY = ".tmp"
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
_CANNOT_FLUSH = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}
"""What file systems that know no flushing answer."""


class DiskStore:
    """Files of some kinds in one folder.

    Args:
        suffixes: of the files that are the store's. Temporary files (.tmp, and .tmp… as safetensors names its own) are too.
        is_current: whether a file of this name may still be asked for; any other is deleted at the next `trim`.
        in_use_seconds: a file that was used less than this ago is not deleted: somebody may be about to open it.

    Attributes:
        folder: made when the first file is written.
        limit: bytes of all files; the least recently used go first.
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
        """Puts a file in the place of `name` in one step, so that no reader and no crash ever sees half of it.

        Args:
            fill: writes the content to the path it is given.
            durable: have the content on the disk before the name is, for files that carry no checksum.

        Raises:
            OSError: the file cannot be written; nothing is left of it. Whatever `fill` raises as well.
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

    def made(self, name: str, fill: Callable[[Path], object]) -> Path:
        """The file of this name, made by `fill` if there is none, for names that stand for one content.

        Raises:
            OSError: it cannot be written, not even after all that is not in use has been deleted. Whatever `fill` raises as well.
        """
        target = self.folder / name
        self.used(target)
        if target.exists():
            return target
        try:
            self.write(name, fill, durable=True)
        except PermissionError:
            # Windows: another process has made the same file meanwhile and has it open.
            if not target.exists():
                raise
        except OSError as error:
            if error.errno not in _FULL:
                raise
            self._delete_down_to(0)
            self.write(name, fill, durable=True)
        self._delete_down_to(self.limit, keep=target)
        return target

    def used(self, path: Path) -> None:
        """Count a file as used now."""
        with contextlib.suppress(OSError):
            os.utime(path)

    def trim(self) -> None:
        """Bring the folder below the limit: the least recently used go first."""
        self._delete_down_to(self.limit)

    def size(self) -> int:
        """Bytes on disk."""
        return sum(size for _, size, _ in self._files())

    def clear(self) -> None:
        """Delete all files of the store that can be deleted."""
        for _, _, path in self._files():
            _delete(path)

    def _delete_down_to(self, limit: int, keep: Path | None = None) -> None:
        files = self._files()
        total = sum(size for _, size, _ in files)
        newest = files[-1][0] if files else 0.0
        for used, size, path in files:
            age = newest - used  # by the clock of the folder's file system, which need not be ours
            if _TEMPORARY in (path.suffix, path.name[: len(_TEMPORARY)]):
                goes = age > STALE_TEMPORARY_SECONDS
            else:
                goes = not self._is_current(path.name) or (total > limit and age >= self._in_use_seconds)
            if goes and path != keep and _delete(path):
                total -= size

    def _files(self) -> list[tuple[float, int, Path]]:
        """(time of last use, bytes, file) of all files of the store, the least recently used first."""
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
    """Whether the file is gone. Windows deletes none that is open or mapped; it goes another time."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True
