"""Long work for a request: a few at a time, in turn with all else that uses the machine, given up when its client hangs up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import BoundedSemaphore, Event, Lock, Thread
from typing import TypeVar

from fastapi import Request
from fastapi.concurrency import run_in_threadpool

from klora.errors import Cancelled, KLoraError
from klora.hosts.base import Lock as HostLock
from klora.hosts.base import Machine
from klora.hosts.webui import HOST

MOST_AT_ONCE = 4
SECONDS_BETWEEN_LOOKS = 0.2

places = BoundedSemaphore(MOST_AT_ONCE)

Answer = TypeVar("Answer")


class Busy(KLoraError):
    """As many analyses as may wait are waiting."""


@contextmanager
def place() -> Iterator[None]:
    """One of the places for analyses, be they under way or waiting.

    Raises:
        Busy: all are taken.
    """
    if not places.acquire(blocking=False):
        raise Busy(f"{MOST_AT_ONCE} analyses are under way or waiting already: try again when one is done.")
    try:
        yield
    finally:
        places.release()


@contextmanager
def turn(cancelled: Callable[[], bool], host: Machine = HOST) -> Iterator[None]:
    """Within it the machine is this thread's: in the host's own queue, as a generation is, first come, first served.

    Raises:
        Cancelled: `cancelled` said so while it was waiting.
    """
    lock = host.queue_lock()
    if not lock.acquire(blocking=False):
        _wait_for(lock, cancelled)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def spare_turn(host: Machine = HOST) -> Iterator[None]:
    """The same for what is worth doing only while nobody else needs the machine; it should stop once the machine `is_awaited`.

    Raises:
        Cancelled: somebody has it.
    """
    lock = host.queue_lock()
    if not lock.acquire(blocking=False):
        raise Cancelled
    try:
        yield
    finally:
        lock.release()


def _wait_for(lock: HostLock, cancelled: Callable[[], bool]) -> None:
    """Acquire the host's lock. It has no time-out, so a thread stands in line, and lets the next one pass if it was in vain."""
    handing_over, ours, given_up = Lock(), Event(), Event()

    def stand_in_line() -> None:
        lock.acquire()
        with handing_over:
            if given_up.is_set():
                lock.release()
            else:
                ours.set()

    Thread(target=stand_in_line, daemon=True).start()
    while not ours.wait(SECONDS_BETWEEN_LOOKS):
        if cancelled():
            with handing_over:
                if not ours.is_set():
                    given_up.set()
                    raise Cancelled


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
