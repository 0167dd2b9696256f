"""Calls of one reward function with a time limit: in processes that can be killed, or in threads of this one."""

import contextlib
import json
import os
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

from gvpo_core.training.rewards import worker as worker_script
from gvpo_core.training.rewards.worker import message_bytes, plain

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
    start: float  # seconds that it takes to be ready again after a call past its limit

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], columns: Columns, limit: float, until: float
    ) -> Any:
        """The result as `plain` has it.

        Args:
          limit: seconds for the function itself.
          until: when to give up by `time.monotonic`, also where the call has yet to begin.
        Raises: TimeoutError, CallFailed.
        """

    def close(self) -> None:
        """Lets go of what calls need."""


class Threads:
    """A function of this process, each call in a thread that is given up past its limit.

    What such a call may still do is its own business: it is not killed, and one that never releases the interpreter
    blocks. For functions that exist as Python objects only.
    """

    width = 64
    start = 0.0

    def __init__(self, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
        self._function, self._options = function, options
        self._closed = False
        self.runs_code = bool(getattr(function, "runs_code", False))

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], columns: Columns, limit: float, until: float
    ) -> Any:
        """See Caller."""
        outcome: list[Any] = []
        done = threading.Event()

        def work() -> None:
            try:
                value = worker_script.call(self._function, prompts, completions, columns, self._options)
                outcome.append((plain(value), None))
            except BaseException as e:  # SystemExit too: a reward must not end the run
                outcome.append((None, e))
            done.set()

        threading.Thread(target=work, daemon=True, name="gvpo-reward").start()
        deadline = min(time.monotonic() + limit, until)
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

    A process past its limit is killed with its whole process group; another starts in its place at once, beside
    whatever else is done. It runs with the user's rights: it is kept from hanging or crashing the run, not from reading
    files or the network.
    """

    def __init__(self, function: str, options: Mapping[str, Any], *, width: int, memory: int) -> None:
        """
        Args:
          function: as worker.find_function takes it.
          memory: bytes of address space a process may take; 0: no limit.
        Raises: LookupError: the function cannot be found or imported.
        """
        self.width = width
        self._setup = {"function": function, "options": dict(options), "memory": memory, "path": list(sys.path)}
        self._busy: set[_Worker] = set()
        self._closed = False
        begin = time.monotonic()
        try:
            first = _Worker(self._setup)
        except OSError as e:
            raise LookupError(f"its process cannot be started: {e}") from e
        try:
            self.runs_code, self._takes = first.ready(begin + 2 * _START_LIMIT)
        except BaseException as e:  # Ctrl-C too: no process stays behind
            first.kill()
            if isinstance(e, CallFailed):
                raise LookupError(f"importing {function} failed: {e}") from e
            raise
        self.start = time.monotonic() - begin
        self._idle: list[_Worker | None] = [*[None] * (width - 1), first]  # None: to be started
        self._changed = threading.Condition()

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], columns: Columns, limit: float, until: float
    ) -> Any:
        """See Caller."""
        sent = {name: list(values) for name, values in columns.items() if self._takes is None or name in self._takes}
        _check_columns(sent)
        worker = self._take(until)
        try:
            if self._closed:
                raise CallFailed("the run is leaving")
            worker.ready(until)
            limit = min(limit, until - time.monotonic())
            if limit <= 0:
                raise TimeoutError
        except TimeoutError:  # it goes on starting, for the next call
            self._give(worker)
            raise
        except BaseException as e:
            self._end(worker, again=False)
            if isinstance(e, LookupError):
                raise CallFailed(str(e)) from e
            raise
        request = {"prompts": list(prompts), "completions": list(completions), "columns": sent, "limit": limit}
        try:
            answer = worker.ask(request, limit)
        except BaseException:  # Ctrl-C too: a worker that was interrupted is of no more use
            self._end(worker, again=True)
            raise
        self._give(worker)
        if "error" in answer:
            raise CallFailed(answer["error"], answer["traceback"])
        return answer["values"]

    def close(self) -> None:
        """Ends the processes; a call that is under way fails."""
        with self._changed:
            self._closed = True
            for worker in self._busy:
                worker.end()  # its call lets go of the rest
            for idle in self._idle:
                if idle is not None:
                    idle.kill()
            self._idle = [None] * len(self._idle)

    def _take(self, until: float) -> "_Worker":
        """One that waits for work: rather one that is ready than one that is starting, or is to be started."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._idle, max(0.0, until - time.monotonic())):
                raise TimeoutError
            worker = self._idle.pop(max(range(len(self._idle)), key=lambda i: _readiness(self._idle[i])))
            try:
                if worker is None or not worker.alive:
                    if worker is not None:
                        worker.kill()
                    worker = _Worker(self._setup)
            except OSError as e:
                self._idle.append(None)
                raise CallFailed(f"its process cannot be started: {e}") from e
            self._busy.add(worker)
            return worker

    def _give(self, worker: "_Worker") -> None:
        with self._changed:
            self._busy.discard(worker)
            if self._closed:
                worker.kill()
            self._idle.append(None if self._closed else worker)
            self._changed.notify()

    def _end(self, worker: "_Worker", *, again: bool) -> None:
        """Ends a worker; where `again`, another begins to start in its place."""
        worker.kill()
        with self._changed:
            self._busy.discard(worker)
            another = None
            with contextlib.suppress(OSError):  # the next call tells
                another = _Worker(self._setup) if again and not self._closed else None
            self._idle.append(another)
            self._changed.notify()


def _readiness(worker: "_Worker | None") -> int:
    return 0 if worker is None else 2 if worker.heard_of else 1


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
        command = [sys.executable, "-P", worker_script.__file__, str(requests), str(answers)]
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
        os.set_blocking(self._to, False)
        self._begun, self._unsent = time.monotonic(), memoryview(message_bytes(setup))
        self._ready: tuple[bool, list[str] | None] | None = None
        self._head, self._body = bytearray(), bytearray()  # of an answer that is being received
        with contextlib.suppress(TimeoutError, CallFailed):  # what is sent later, or told, when it is asked
            self._send(0.0)

    def ready(self, until: float) -> tuple[bool, list[str] | None]:
        """Waits until the function is imported: whether it runs code, and the columns that it takes (None: all).

        Raises: TimeoutError: it is not yet. CallFailed: the process died, or is not heard of for too long. LookupError:
          the function cannot be found or imported.
        """
        if self._ready is None:
            late = self._begun + _START_LIMIT
            try:
                self._send(min(until, late))
                answer = self._answer(min(until, late))
            except TimeoutError:
                if time.monotonic() < late:
                    raise
                raise CallFailed(f"nothing was heard of its process for {_START_LIMIT:g} s") from None
            if "missing" in answer:
                raise LookupError(answer["missing"])
            self._ready = answer["runs_code"], answer["takes"]
        return self._ready

    @property
    def heard_of(self) -> bool:
        """Whether it is ready, or has said something by now."""
        return self._ready is not None or bool(select.select([self._from], [], [], 0)[0])

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, message: Mapping[str, Any], limit: float) -> Any:
        """The answer, within `limit` seconds. Raises: TimeoutError, CallFailed: the process died."""
        deadline = time.monotonic() + limit
        self._unsent = memoryview(message_bytes(message))
        self._send(deadline)
        return self._answer(deadline)

    def _send(self, deadline: float) -> None:
        """Writes what is unsent. A reward of which a thread holds the interpreter does not read, so this may wait."""
        while self._unsent:
            if select.select([], [self._to], [], max(0.0, min(_POLL, deadline - time.monotonic())))[1]:
                try:
                    self._unsent = self._unsent[os.write(self._to, self._unsent) :]
                except BlockingIOError:  # less room than a page
                    time.sleep(0.001)
                except BrokenPipeError as e:
                    raise CallFailed(self._end()) from e
            elif not self.alive:
                raise CallFailed(self._end())
            elif time.monotonic() >= deadline:
                raise TimeoutError

    def _answer(self, deadline: float) -> Any:
        if len(self._head) < 8:
            self._receive(self._head, 8, deadline)
        (size,) = struct.unpack("<Q", self._head)
        self._receive(self._body, size, deadline)
        answer = json.loads(self._body)
        self._head, self._body = bytearray(), bytearray()
        return answer

    def _receive(self, into: bytearray, size: int, deadline: float) -> None:
        """Fills `into` to its size; a later call goes on where one ran out of time."""
        while len(into) < size:
            if select.select([self._from], [], [], max(0.0, min(_POLL, deadline - time.monotonic())))[0]:
                part = os.read(self._from, min(size - len(into), 1 << 20))
                if not part:
                    raise CallFailed(self._end())
                into += part
            elif not self.alive and not select.select([self._from], [], [], 0)[0]:
                raise CallFailed(self._end())  # its children may hold the pipe open, so there is no end to read
            elif time.monotonic() >= deadline:
                raise TimeoutError

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
