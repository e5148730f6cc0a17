"""The queue in which everything that needs the machine stands."""

from collections import deque
from threading import Event, Lock


class QueueLock:
    """A lock that threads get in the order of asking; `_pending_threads` has those that wait, as in the host.

    `acquire` knows no timeout.
    """

    def __init__(self):
        self._changing, self._taken = Lock(), False
        self._pending_threads = deque()

    def acquire(self, blocking=True):
        with self._changing:
            if not self._taken:
                self._taken = True
                return True
            if not blocking:
                return False
            handed_over = Event()
            self._pending_threads.append(handed_over)
        return handed_over.wait()

    def release(self):
        with self._changing:
            if self._pending_threads:
                self._pending_threads.popleft().set()
            else:
                self._taken = False

    def __enter__(self):
        return self.acquire()

    def __exit__(self, *_):
        self.release()


queue_lock = QueueLock()
