"""Threads that run tasks in order. A task that hangs does not keep the process from ending."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class Workers(Generic[T]):
    """Up to `count` daemon threads, started when tasks arrive."""

    def __init__(self, count: int) -> None:
        self._count, self._threads, self._closed = count, 0, False
        self._tasks: deque[tuple[Future[T], Callable[[], T]]] = deque()
        self._changed = threading.Condition()

    def submit(self, task: Callable[[], T], *, first: bool = False) -> "Future[T]":
        """Queues a task. Returns: the future of its result.

        Args:
          first: put it before all tasks that have not begun.
        """
        future: Future[T] = Future()
        with self._changed:
            (self._tasks.appendleft if first else self._tasks.append)((future, task))
            self._changed.notify()
            start = self._threads < self._count
            self._threads += start
        if start:
            threading.Thread(target=self._work, daemon=True).start()
        return future

    def close(self) -> None:
        """Drops tasks that have not begun, and ends the threads."""
        with self._changed:
            self._closed = True
            dropped, self._tasks = self._tasks, deque()
            self._changed.notify_all()
        for future, _ in dropped:
            future.cancel()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._tasks or self._closed)
                if not self._tasks:
                    return
                future, task = self._tasks.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(task())
            except BaseException as error:
                future.set_exception(error)
