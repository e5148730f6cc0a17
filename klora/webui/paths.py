"""Where the extension keeps files that it may delete at any time."""

from pathlib import Path

EXTENSION = Path(__file__).resolve().parents[2]


def cache_folder() -> Path:
    """The folder of the score cache. Whoever writes there first creates it."""
    return EXTENSION / "cache" / "scores"
