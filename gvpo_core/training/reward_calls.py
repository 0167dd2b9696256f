"""Calls of one reward function with a time limit: in processes that can be killed, or in threads of this one."""

import contextlib
import json
import os
import queue
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from traceback import format_exception
from typing import Any, Protocol

from gvpo_core.training import reward_worker
from gvpo_core.training.reward_worker import plain, write_message

Columns = Mapping[str, Sequence[Any]]
_START_LIMIT = 120.0  # seconds for a worker to import the user's module
_POLL = 0.05


class CallFailed(Exception):
    """A call that gave no result: the reward raised, or its process died."""

    def __init__(self, message: str, traceback: str = "") -> None:
        super().__init__(message)
        self.traceback = traceback


class UnsendableError(ValueError):
    """Data that cannot be sent to a process."""


class Caller(Protocol):
    """How a reward is called; `width` calls may run at once."""

    width: int
    runs_code: bool

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], columns: Columns, limit: float) -> Any:
        """The result as `plain` has it, within `limit` seconds. Raises: TimeoutError, CallFailed."""

    def close(self) -> None:
        """Lets go of what calls need."""


class Threads:
    """A function of this process, each call in a thread that is given up past its limit.

    What such a call may still do is its own business: it is not killed, and one that never releases the interpreter
    blocks. For functions that exist as Python objects only.
    """

    width = 64

    def __init__(self, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
        self._function, self._options = function, options
        self._closed = False
        self.runs_code = bool(getattr(function, "runs_code", False))

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], columns: Columns, limit: float) -> Any:
        """See Caller."""
        outcome: list[Any] = []
        done = threading.Event()

        def work() -> None:
            try:
                value = reward_worker.call(self._function, prompts, completions, columns, self._options)
                outcome.append((plain(value), None))
            except BaseException as e:  # SystemExit too: a reward must not end the run
                outcome.append((None, e))
            done.set()

        threading.Thread(target=work, daemon=True, name="gvpo-reward").start()
        deadline = time.monotonic() + limit
        while not done.wait(max(0.0, min(_POLL, deadline - time.monotonic()))):
            if self._closed:
                raise CallFailed("the run is leaving")
            if time.monotonic() >= deadline:
                raise TimeoutError
        value, error = outcome[0]
        if error is not None:
            raise CallFailed(f"{type(error).__name__}: {error}", "".join(format_exception(error)[-3:])) from error
        return value

    def close(self) -> None:
        """Gives up the calls that are under way."""
        self._closed = True


class Processes:
    """A function found by its import path, in `width` processes of their own, started when first needed.

    A process past its limit is killed with its whole process group, and replaced at the next call. It runs with the
    user's rights: it is kept from hanging or crashing the run, not from reading files or the network.
    """

    def __init__(self, function: str, options: Mapping[str, Any], *, width: int, memory: int) -> None:
        """
        Args:
          function: as reward_worker.find_function takes it.
          memory: bytes of address space a process may take; 0: no limit.
        Raises: LookupError: the function cannot be found or imported.
        """
        self.width = width
        self._setup = {"function": function, "options": dict(options), "memory": memory, "path": list(sys.path)}
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        self._busy: set[_Worker] = set()
        self._closed = False
        try:
            first = _Worker(self._setup)
        except (CallFailed, TimeoutError) as e:
            reason = str(e) or f"nothing was heard of it for {_START_LIMIT:g} s"
            raise LookupError(f"importing {function} failed: {reason}") from e
        self.runs_code, self._takes = first.runs_code, first.takes
        for _ in range(width - 1):
            self._idle.put(None)
        self._idle.put(first)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], columns: Columns, limit: float) -> Any:
        """See Caller."""
        sent = {name: list(values) for name, values in columns.items() if self._takes is None or name in self._takes}
        _check_columns(sent)
        request = {"prompts": list(prompts), "completions": list(completions), "columns": sent, "limit": limit}
        worker = self._idle.get()
        try:
            if worker is None or not worker.alive:
                worker = _Worker(self._setup)
            self._busy.add(worker)
            if self._closed:
                raise CallFailed("the run is leaving")
            answer = worker.ask(request, limit)
        except BaseException as e:  # Ctrl-C too: a worker that was interrupted is of no more use
            if worker is not None:
                self._busy.discard(worker)
                worker.kill()
            worker = None
            if isinstance(e, LookupError):
                raise CallFailed(str(e)) from e
            raise
        finally:
            if worker is not None:
                self._busy.discard(worker)
            self._idle.put(worker)
        if "error" in answer:
            raise CallFailed(answer["error"], answer["traceback"])
        return answer["values"]

    def close(self) -> None:
        """Ends the processes; a call that is under way fails."""
        self._closed = True
        for busy in list(self._busy):
            busy.end()  # its call lets go of the rest
        for _ in range(self.width):
            with contextlib.suppress(queue.Empty):
                worker = self._idle.get_nowait()
                if worker is not None:
                    worker.kill()


def _check_columns(columns: Columns) -> None:
    for name, values in columns.items():
        try:
            json.dumps(values)
        except (TypeError, ValueError) as e:
            raise UnsendableError(
                f"column {name!r} cannot be sent to a reward's process as JSON ({e}); give the data plain values,"
                " or set isolation = 'thread'"
            ) from e


class _Worker:
    """One process."""

    def __init__(self, setup: Mapping[str, Any]) -> None:
        requests, self._to = os.pipe()
        self._from, answers = os.pipe()
        command = [sys.executable, "-P", reward_worker.__file__, str(requests), str(answers)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(requests, answers),
                start_new_session=True,  # a process group of its own, and no Ctrl-C meant for the run
            )
        finally:
            os.close(requests)
            os.close(answers)
        try:
            ready = self.ask(setup, _START_LIMIT)
        except BaseException:  # Ctrl-C too: no process stays behind
            self.kill()
            raise
        if "missing" in ready:
            self.kill()
            raise LookupError(ready["missing"])
        self.runs_code: bool = ready["runs_code"]
        self.takes: list[str] | None = ready["takes"]  # columns; None: all

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, message: Mapping[str, Any], limit: float) -> Any:
        """The answer. Raises: TimeoutError, CallFailed: the process died."""
        deadline = time.monotonic() + limit
        try:
            write_message(self._to, message)  # the worker reads before it computes, so this does not wait for long
        except BrokenPipeError as e:
            raise CallFailed(self._end()) from e
        (size,) = struct.unpack("<Q", self._receive(8, deadline))
        return json.loads(self._receive(size, deadline))

    def _receive(self, size: int, deadline: float) -> bytes:
        parts: list[bytes] = []
        while size:
            if select.select([self._from], [], [], max(0.0, min(_POLL, deadline - time.monotonic())))[0]:
                part = os.read(self._from, min(size, 1 << 20))
                if not part:
                    raise CallFailed(self._end())
                parts.append(part)
                size -= len(part)
            elif not self.alive and not select.select([self._from], [], [], 0)[0]:
                raise CallFailed(self._end())  # its children may hold the pipe open, so there is no end to read
            elif time.monotonic() >= deadline:
                raise TimeoutError
        return b"".join(parts)

    def _end(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        status = self._process.returncode
        if status is not None and status < 0:
            return f"the reward's process died of {signal.Signals(-status).name}"
        return f"the reward's process left with status {status}"

    def end(self) -> None:
        """Ends the process and whatever it started in its group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def kill(self) -> None:
        """Ends the process, its group, and the pipes; leaves no zombie."""
        self.end()
        self._process.wait()
        for descriptor in (self._to, self._from):
            with contextlib.suppress(OSError):
                os.close(descriptor)
