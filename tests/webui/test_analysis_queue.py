"""The host's own queue: turns come in the order of asking, and clients that have gone do not block it."""

import threading
import time

import pytest

from klora.errors import Cancelled
from klora.hosts.webui import HOST
from klora.webui.analysis_queue import spare_turn, turn


@pytest.fixture
def in_thread():
    """Starts a function in a thread, which is over before the test is."""
    threads = []

    def start(function):
        thread = threading.Thread(target=function)
        threads.append(thread)
        thread.start()
        return thread

    yield start
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def wait_for(condition):
    patience = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < patience
        time.sleep(0.01)


def test_turns_come_in_the_order_of_asking(queue_lock, in_thread):
    order = []

    def ask(name):
        with turn(lambda: False):
            order.append(name)

    def generate():
        with queue_lock:
            order.append("generation")

    with queue_lock:
        for number, waiter in enumerate((lambda: ask("first"), generate, lambda: ask("last")), start=1):
            in_thread(waiter)
            wait_for(lambda number=number: len(queue_lock._pending_threads) == number)
    wait_for(lambda: len(order) == 3)
    assert order == ["first", "generation", "last"]


def test_a_client_that_goes_away_while_waiting_delays_nobody(queue_lock):
    with queue_lock:
        start = time.monotonic()
        with pytest.raises(Cancelled), turn(lambda: True):
            pytest.fail("it is not its turn")
        assert time.monotonic() - start < 5
    with turn(lambda: False):
        assert not queue_lock.acquire(blocking=False)
    assert queue_lock.acquire(blocking=False)


def test_a_turn_ends_with_whatever_is_raised_in_it(queue_lock):
    with pytest.raises(ValueError, match="within"), turn(lambda: False):
        raise ValueError("within")
    with pytest.raises(ValueError, match="within"), spare_turn():
        raise ValueError("within")
    assert queue_lock.acquire(blocking=False)


def test_a_spare_turn_is_had_only_while_nobody_else_has_one(queue_lock, in_thread):
    with queue_lock, pytest.raises(Cancelled), spare_turn():
        pytest.fail("a generation has it")
    with spare_turn():
        assert not HOST.is_awaited()
        in_thread(lambda: (queue_lock.acquire(), queue_lock.release()))
        wait_for(HOST.is_awaited)
