"""Logs of the rewards in the run folder: their output in rewards.log, their errors with tracebacks in run.log."""

import collections
import contextlib
import datetime
import logging
import os
import select
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

from gvpo_core.training.config import RewardConfig
from gvpo_core.training.config.secrets import hide, secrets_of
from gvpo_core.training.files.disk import is_at
from gvpo_core.training.terminal.text import printable

LARGEST_LOG = 64 * 2**20  # bytes of rewards.log; a run may last for weeks
_RATE = 4 * 2**20  # bytes a second read from one worker's output; faster output makes the worker wait
_WAITING = 2**20  # bytes of output that are kept until the folder exists
_LONGEST_LINE = 8192
_LAST_LINES = 20

_log = logging.getLogger("gvpo.rewards")


class RewardLog:
    """Writes rewards.log and run.log with known secrets hidden. A log that cannot be written does not stop the run."""

    def __init__(self, config: Mapping[str, RewardConfig] | None = None) -> None:
        """
        Args:
          config: settings of the rewards; secrets in their options are hidden.
        """
        self.secrets = secrets_of({name: {"options": c.options} for name, c in (config or {}).items()})
        self._lock = threading.Lock()
        self._folder: Path | None = None
        self._opened: int | None = None  # the folder's descriptor
        self._waiting: list[bytes] = []  # output written before the folder exists
        self._output: IO[bytes] | None = None
        self._room = LARGEST_LOG
        self._failed = False

    def open(self, folder: Path) -> None:
        """Starts writing into this folder."""
        with self._lock, self._written("rewards.log"):
            self._close_folder()
            self._folder, self._opened = folder, os.open(folder, os.O_RDONLY)
            waiting, self._waiting = b"".join(self._waiting), []
            self._write(waiting)

    def output(self, name: str, lines: Iterable[str]) -> None:
        """Appends lines that the reward `name` wrote to its standard output or error."""
        if self._room <= 0 or self._failed:
            return
        data = "".join(f"{name}: {self._safe(line)}\n" for line in lines).encode("utf-8", "backslashreplace")
        with self._lock, self._written("rewards.log"):
            if self._folder is not None:
                self._write(data)
            elif sum(map(len, self._waiting)) < _WAITING:
                self._waiting.append(data)

    def _write(self, data: bytes) -> None:
        if not data or self._folder is None:
            return
        if self._output is None:
            self._confirm()
            self._output = (self._folder / "rewards.log").open("ab", buffering=0)
            self._room = LARGEST_LOG - self._output.tell()
        if len(data) > self._room:
            data, self._room = f"(output beyond {LARGEST_LOG >> 20} MiB is left out)\n".encode(), 0
        else:
            self._room -= len(data)
        self._output.write(data)

    def error(self, text: str) -> None:
        """Appends an error, with the time, to run.log."""
        if self._folder is None or self._failed:
            return
        at = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        with self._lock, self._written("run.log"):
            self._confirm()
            with (self._folder / "run.log").open("ab") as file:
                file.write(f"{at} {self._safe(text).strip()}\n".encode("utf-8", "backslashreplace"))

    def _confirm(self) -> None:
        """Raises OSError: the path no longer leads to the run's folder; it may be another run's now."""
        if self._folder is not None and self._opened is not None and not is_at(self._opened, self._folder):
            raise OSError("the run folder was moved or replaced during the run")

    def _safe(self, text: str) -> str:
        """The text with secrets hidden and control characters escaped: people print log files."""
        return printable(hide(text, self.secrets), keep="\n\t")

    @contextlib.contextmanager
    def _written(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            self._failed = True
            _log.warning("%s cannot be written: %s", name, e.strerror or e)

    def close(self) -> None:
        """Closes rewards.log and the folder."""
        with self._lock:
            if self._output is not None:
                self._output.close()
                self._output = None
            self._close_folder()

    def _close_folder(self) -> None:
        if self._opened is not None:
            os.close(self._opened)
            self._opened = None


class Output:
    """Reads a worker's standard output and error in a thread until both are closed."""

    def __init__(self, out: int, err: int, sink: Callable[[Iterable[str]], None]) -> None:
        self._sink = sink
        self._last: collections.deque[str] = collections.deque(maxlen=_LAST_LINES)
        self._stop = False
        self._thread = threading.Thread(target=self._read, args=(out, err), daemon=True, name="gvpo-reward-output")
        self._thread.start()

    def last_lines(self, wait: float) -> list[str]:
        """Waits at most `wait` seconds for the end of the output; returns the last lines of standard error."""
        self._thread.join(wait)
        return list(self._last)

    def stop(self) -> None:
        """Closes the descriptors, even if an escaped process holds their other ends open."""
        self._stop = True

    def _read(self, out: int, err: int) -> None:
        partial_lines = {out: b"", err: b""}
        begin, bytes_read = time.monotonic(), 0
        while partial_lines:
            ready = select.select(list(partial_lines), [], [], 0.1)[0]
            if self._stop and not ready:
                break
            for descriptor in ready:
                data = b""  # as at its end, if it cannot be read
                with contextlib.suppress(OSError):
                    data = os.read(descriptor, 1 << 16)
                lines = (partial_lines[descriptor] + data).split(b"\n")
                partial_lines[descriptor] = lines.pop()
                if len(partial_lines[descriptor]) > _LONGEST_LINE or not data:
                    lines += [partial_lines[descriptor]] if partial_lines[descriptor] else []
                    partial_lines[descriptor] = b""
                texts = [line.decode("utf-8", "backslashreplace")[:_LONGEST_LINE] for line in lines]
                if descriptor == err:
                    self._last.extend(text for text in texts if text.strip())
                if texts:
                    self._sink(texts)
                bytes_read += len(data)
                if not data:
                    os.close(descriptor)
                    del partial_lines[descriptor]
            elapsed = time.monotonic() - begin
            if elapsed >= 1.0:
                begin, bytes_read = time.monotonic(), 0
            elif bytes_read > _RATE and not self._stop:
                time.sleep(1.0 - elapsed)
        for descriptor in partial_lines:
            os.close(descriptor)
