"""Long work for requests: a few at a time, taking turns with everything else that uses the machine.

It stops when the client disconnects.
"""

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
SECONDS_BETWEEN_CHECKS = 0.2

slots = BoundedSemaphore(MOST_AT_ONCE)

Answer = TypeVar("Answer")


class Busy(KLoraError):
    """All slots for analyses are taken."""


@contextmanager
def slot() -> Iterator[None]:
    """Within it, one of the slots is taken that every analysis needs, whether it runs or waits.

    Raises:
        Busy: all are taken.
    """
    if not slots.acquire(blocking=False):
        raise Busy(f"{MOST_AT_ONCE} analyses are running or waiting already: try again when one is done.")
    try:
        yield
    finally:
        slots.release()


@contextmanager
def turn(cancelled: Callable[[], bool], host: Machine = HOST) -> Iterator[None]:
    """Within it, the machine is this thread's alone.

    It waits in the host's own queue like a generation: first come, first served.

    Raises:
        Cancelled: `cancelled` returned true while it was waiting.
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
    """As `turn`, for work that is only worth doing while nobody else needs the machine.

    Such work should stop once the machine `is_awaited`.

    Raises:
        Cancelled: somebody else is using the machine.
    """
    lock = host.queue_lock()
    if not lock.acquire(blocking=False):
        raise Cancelled
    try:
        yield
    finally:
        lock.release()


def _wait_for(lock: HostLock, cancelled: Callable[[], bool]) -> None:
    """Acquire the host's lock.

    It has no timeout, so a thread waits for it, and releases it at once if the work has been cancelled.
    """
    handing_over, ours, given_up = Lock(), Event(), Event()

    def wait_in_queue() -> None:
        lock.acquire()
        with handing_over:
            if given_up.is_set():
                lock.release()
            else:
                ours.set()

    Thread(target=wait_in_queue, daemon=True).start()
    while not ours.wait(SECONDS_BETWEEN_CHECKS):
        if cancelled():
            with handing_over:
                if not ours.is_set():
                    given_up.set()
                    raise Cancelled


async def while_connected(request: Request, work: Callable[[Callable[[], bool]], Answer]) -> Answer:
    """Do `work` in a thread.

    Args:
        request: its body must have been read.
        work: called with a function that returns whether the client has disconnected.
    """
    gone = Event()
    watch = asyncio.ensure_future(_wait_for_disconnect(request, gone))
    try:
        return await run_in_threadpool(work, gone.is_set)
    finally:
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch


async def _wait_for_disconnect(request: Request, gone: Event) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    gone.set()
