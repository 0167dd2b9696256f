"""A clock for time limits that stops while this process is paused."""

import threading
import time

POLL = 0.05  # seconds; a thread that waits for a deadline reads the clock at least this often
_PAUSE = 1.0  # seconds between two readings that count as a pause


class Clock:
    """Counts the seconds in which this process ran.

    A paused machine, container or process group (SIGSTOP, a snapshot) pauses the rewards too, but the system's clock
    may continue. Without this clock, every call in progress would exceed its limit after a pause.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = time.monotonic()
        self._paused = 0.0

    def __call__(self) -> float:
        with self._lock:
            now = time.monotonic()
            if now - self._last > _PAUSE:
                self._paused += now - self._last
            self._last = now
            return now - self._paused


now = Clock()
