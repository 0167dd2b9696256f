"""Separates the prints of a reward function in a thread of this process from the run's output."""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

Sink = Callable[[Iterable[str]], None]


class _Lines:
    """Collects printed text and passes on whole lines."""

    def __init__(self, sink: Sink) -> None:
        self._sink, self._rest, self._lock = sink, "", threading.Lock()

    def write(self, text: str) -> None:
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
        if lines:
            self._sink(lines)

    def end(self) -> None:
        """Passes on the last line if it has no line break."""
        if self._rest:
            self.write("\n")


_LINES: ContextVar[_Lines | None] = ContextVar("gvpo_reward_lines", default=None)


class _Divided:
    """Replaces a standard stream: text written inside `printing_to` goes to its sink, other text to the stream."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        lines = _LINES.get()
        if lines is not None:
            lines.write(text)
        elif self.stream is not None:
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        if _LINES.get() is None and self.stream is not None:
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


_lock = threading.Lock()
_active = 0


@contextlib.contextmanager
def printing_to(sink: Sink) -> Iterator[None]:
    """Inside `with`, sends to `sink` what this thread and its coroutines write to sys.stdout and sys.stderr.

    The standard streams are replaced while any such block is active, and restored after the last one.
    """
    global _active
    lines = _Lines(sink)
    with _lock:
        _active += 1
        for name in ("stdout", "stderr"):
            if not isinstance(getattr(sys, name), _Divided):
                setattr(sys, name, _Divided(getattr(sys, name)))
    before = _LINES.set(lines)
    try:
        yield
    finally:
        _LINES.reset(before)
        lines.end()
        with _lock:
            _active -= 1
            for name in ("stdout", "stderr"):
                stream = getattr(sys, name)
                if not _active and isinstance(stream, _Divided):
                    setattr(sys, name, stream.stream)
