"""Threads that take tasks in order. A task that hangs does not keep the process from ending."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class Workers(Generic[T]):
    """Up to `count` daemon threads, started as tasks come."""

    def __init__(self, count: int) -> None:
        self._count, self._threads = count, 0
        self._tasks: queue.SimpleQueue[tuple[Future[T], Callable[[], T]] | None] = queue.SimpleQueue()

    def submit(self, task: Callable[[], T]) -> "Future[T]":
        """The result to come."""
        future: Future[T] = Future()
        self._tasks.put((future, task))
        if self._threads < self._count:
            self._threads += 1
            threading.Thread(target=self._work, daemon=True).start()
        return future

    def close(self) -> None:
        """Drops the tasks that no thread has begun."""
        while not self._tasks.empty():
            task = self._tasks.get()
            if task is not None:
                task[0].cancel()
        for _ in range(self._threads):
            self._tasks.put(None)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, work = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
