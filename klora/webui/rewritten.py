"""Copies of LoRA files in keys that the host's own loader understands, kept beside the score cache."""

from __future__ import annotations

from pathlib import Path

from klora.core.lora_file import LoraFile
from klora.core.rewrite import rewrite
from klora.webui import paths

MOST_COPIES = 8


def readable_copy(lora: LoraFile) -> Path:
    """The copy of a LoRA file for the host's loader, made when there is none of this state of the file.

    Raises:
        LoraFileError: the file holds what cannot be written in the host's keys.
    """
    folder = paths.cache_folder().parent / "rewritten"
    folder.mkdir(parents=True, exist_ok=True)
    stat = lora.path.stat()
    copy = folder / f"{lora.path.stem}-{stat.st_size:x}-{stat.st_mtime_ns:x}.safetensors"
    if not copy.exists():
        rewrite(lora, copy)
        for old in sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)[:-MOST_COPIES]:
            old.unlink(missing_ok=True)
    return copy
