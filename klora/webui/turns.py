"""Long work for a request: one at a time, a few waiting, given up when its client hangs up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import BoundedSemaphore, Event, Lock
from typing import TypeVar

from fastapi import Request
from fastapi.concurrency import run_in_threadpool

from klora.errors import Cancelled, KLoraError

MOST_AT_ONCE = 4
SECONDS_BETWEEN_LOOKS = 0.2

places = BoundedSemaphore(MOST_AT_ONCE)
_under_way = Lock()

Answer = TypeVar("Answer")


class Busy(KLoraError):
    """As many analyses as may wait are waiting."""


@contextmanager
def turn(cancelled: Callable[[], bool]) -> Iterator[None]:
    """Wait until no other analysis is under way.

    Raises:
        Busy: too many are waiting already.
        Cancelled: `cancelled` said so while it was waiting.
    """
    if not places.acquire(blocking=False):
        raise Busy(f"{MOST_AT_ONCE} analyses are under way or waiting already: try again when one is done.")
    try:
        while not _under_way.acquire(timeout=SECONDS_BETWEEN_LOOKS):
            if cancelled():
                raise Cancelled
        try:
            yield
        finally:
            _under_way.release()
    finally:
        places.release()


async def while_connected(request: Request, work: Callable[[Callable[[], bool]], Answer]) -> Answer:
    """Do `work` in a thread; it is given what tells whether the client of `request`, whose body is read, has hung up."""
    gone = Event()
    watch = asyncio.ensure_future(_wait_for_hang_up(request, gone))
    try:
        return await run_in_threadpool(work, gone.is_set)
    finally:
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch


async def _wait_for_hang_up(request: Request, gone: Event) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    gone.set()
