"""Where the extension keeps what it may delete at any time."""

from pathlib import Path

EXTENSION = Path(__file__).resolve().parents[2]


def cache_folder() -> Path:
    """Folder of the score cache. Made by whoever writes there first."""
    return EXTENSION / "cache" / "scores"
