"""Copies of LoRA files whose keys the host's own loader does not know, written with keys that it knows.

They are kept beside the score cache, by the content of their originals.
"""

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
"""Bytes that all copies may take together."""

IN_USE_SECONDS = 60.0
"""How long a copy must not be deleted after it was asked for.

The host opens it right away, and once it is open or mapped it stays readable even if it is deleted.
"""

_NAME = re.compile(rf"[0-9a-f]{{64}}\.[\w-]+\.{re.escape(FORMAT)}\.safetensors")


def readable_copy(lora: LoraFile) -> Path:
    """The copy of a LoRA file for the host's loader, made if there is none of its present content.

    Raises:
        LoraFileError: the file holds something that has no name among the host's keys, it is changed
            meanwhile, or the copy cannot be written.
    """
    cache, path, store = ScoreCache(paths.cache_folder()), lora.path, _store()
    changed = LoraFileError(f'The LoRA file "{path}" was changed or removed while it was read: try again.')
    content = cache.content(path)
    if content is None:
        raise changed

    def fill(place: Path) -> None:
        rewrite(loras.read(path, lora.family), place)
        if cache.content(path) != content:
            raise changed

    try:
        return store.get_or_make(f"{content}.{lora.base}.{FORMAT}.safetensors", fill)
    except OSError as error:
        raise LoraFileError(
            f'"{path.name}" has keys that this WebUI cannot load, and the copy that it would load instead '
            f"cannot be written to {store.folder} ({error.strerror or error}): free some space there, or "
            "make the folder writable."
        ) from error


def _store() -> DiskStore:
    """The store of copies.

    Files in it with other names are left over: half-written copies (.part), and those of earlier versions,
    which were named by stem, size and time.
    """
    return DiskStore(
        paths.cache_folder().parent / "rewritten",
        LIMIT,
        (".safetensors", ".part"),
        is_current=lambda name: _NAME.fullmatch(name) is not None,
        in_use_seconds=IN_USE_SECONDS,
    )
