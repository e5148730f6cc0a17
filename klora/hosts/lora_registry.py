"""What the host's Lora extension lists, read while any client may have it read its folders again."""

from __future__ import annotations

import sys
import threading
import time
from types import FrameType
from typing import Any

from klora.hosts.base import LoraEntry

LONGEST_REFRESH_SECONDS = 60.0

Listed = dict[str, LoraEntry]


def registry(networks: Any) -> tuple[Listed, Listed]:
    """What the host lists, {name: entry} and {name or alias: entry}: all of it, also while the host reads its folders again.

    It does so without a lock, in the thread of whoever asks for it: it empties its lists and fills them with new entries. So two looks
    that see the same entries, with no reading under way between them, have seen everything.

    Args:
        networks: the module of the host's Lora extension.
    """
    patience = time.monotonic() + LONGEST_REFRESH_SECONDS
    names = dict(networks.available_networks)
    while True:
        while _is_refreshing(networks) and time.monotonic() < patience:
            time.sleep(0.01)
        aliases = dict(networks.available_network_aliases)
        before, names = names, dict(networks.available_networks)
        unchanged = before.keys() == names.keys() and all(before[name] is names[name] for name in names)
        if unchanged or time.monotonic() >= patience:
            return names, aliases


def _is_refreshing(networks: Any) -> bool:
    """Whether another thread is within the host's reading of its LoRA folders."""
    reading, own = getattr(networks.list_available_networks, "__code__", None), threading.get_ident()
    for thread, frame in sys._current_frames().items():
        inner: FrameType | None = frame if thread != own else None
        while inner is not None:
            if inner.f_code is reading:
                return True
            inner = inner.f_back
    return False
