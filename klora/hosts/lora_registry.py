"""Reads the list of LoRAs in the host's Lora extension, which any client may have rebuilt at any moment."""

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
    """All LoRAs that the host lists, even while it rebuilds its list.

    The host reads its folders again in the thread of whoever asks for it, without a lock: it empties its
    lists and fills them with new entries. So a list is complete if two looks at it see the same entries and
    nothing was being read in between.

    Args:
        networks: the module of the host's Lora extension.

    Returns:
        {name: entry} and {name or alias: entry}. After a minute of waiting, what the host lists by then.
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
    """Whether another thread is inside the host's function that reads its LoRA folders."""
    reading, own = getattr(networks.list_available_networks, "__code__", None), threading.get_ident()
    for thread, frame in sys._current_frames().items():
        inner: FrameType | None = frame if thread != own else None
        while inner is not None:
            if inner.f_code is reading:
                return True
            inner = inner.f_back
    return False
