"""The font that the host writes its own grids in."""

from __future__ import annotations

from klora.lettering import Font, own_font


def host_font(size: int) -> Font:
    """The host's font, which A1111 and Forge let the user choose, or Pillow's if the host has none."""
    try:
        from modules.images import get_font
    except ImportError:
        return own_font(size)
    return get_font(size)
