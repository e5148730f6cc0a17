"""Copies of LoRA files in keys that the host's own loader understands, kept by the content of their originals beside the score cache."""

from __future__ import annotations

import re
from pathlib import Path

from klora.core.disk_store import DiskStore
from klora.core.lora_file import LoraFile
from klora.core.rewrite import FORMAT, rewrite
from klora.core.score_cache import ScoreCache
from klora.errors import LoraFileError
from klora.webui import loras, paths

LIMIT = 4 * 2**30
"""Bytes of all copies."""

IN_USE_SECONDS = 60.0
"""A copy is opened by the host right after it was asked for; once open or mapped it stays readable, deleted or not."""

_NAME = re.compile(rf"[0-9a-f]{{64}}\.{FORMAT}\.safetensors")


def readable_copy(lora: LoraFile) -> Path:
    """The copy of a LoRA file, as it now is, for the host's loader; made when there is none of this content.

    Raises:
        LoraFileError: the file holds what cannot be written in the host's keys, or is changed meanwhile, or the copy cannot be written.
    """
    cache, path, store = ScoreCache(paths.cache_folder()), lora.path, _store()
    changed = LoraFileError(f'The LoRA file "{path}" was changed or taken away while it was read: try again.')
    content = cache.content(path)
    if content is None:
        raise changed

    def fill(place: Path) -> None:
        rewrite(loras.read(path), place)
        if cache.content(path) != content:
            raise changed

    try:
        return store.made(f"{content}.{FORMAT}.safetensors", fill)
    except OSError as error:
        raise LoraFileError(
            f'"{path.name}" has keys that this WebUI does not load, and the copy that it loads in its place cannot be written to '
            f"{store.folder} ({error.strerror or error}): free some space there, or make the folder writable."
        ) from error


def _store() -> DiskStore:
    """The copies. Of earlier versions are those named by stem, size and time, and half-written ones (.part)."""
    return DiskStore(
        paths.cache_folder().parent / "rewritten",
        LIMIT,
        (".safetensors", ".part"),
        is_current=lambda name: _NAME.fullmatch(name) is not None,
        in_use_seconds=IN_USE_SECONDS,
    )
