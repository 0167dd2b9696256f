"""The run's side of a worker process: starts it, sends numbered requests, reads answers of bounded size, ends it."""

import contextlib
import fcntl
import json
import os
import select
import signal
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gvpo_core.training.rewards.clock import POLL, now
from gvpo_core.training.rewards.log import Output
from gvpo_core.training.rewards.worker import __file__ as _worker
from gvpo_core.training.rewards.worker.functions import Signature
from gvpo_core.training.rewards.worker.guard import MARK
from gvpo_core.training.rewards.worker.messages import message_bytes

START_LIMIT = 120.0  # seconds for a worker to import the user's module
_MAIN = str(Path(_worker).with_name("__main__.py"))
_GONE = 10.0  # seconds to wait for the guard to end all processes
_ANSWER = 256 * 1024  # largest size of an answer in bytes, plus _ANSWER_EACH for each response
_ANSWER_EACH = 4096


def working_folder() -> str | None:
    """The working directory; None if it was removed.

    Processes that start later need it: a reward in a thread may have changed it by then.
    """
    try:
        return os.getcwd()
    except OSError:
        return None


class CallFailed(Exception):
    """A call gave no result: the reward raised an error, or its process died."""

    def __init__(self, message: str, traceback: str = "", *, by_signal: bool = False) -> None:
        super().__init__(message)
        self.traceback, self.by_signal = traceback, by_signal


class Worker:
    """One worker process."""

    def __init__(
        self,
        setup: Mapping[str, Any],
        sink: Callable[[Iterable[str]], None],
        *,
        program: Sequence[str] = (_MAIN,),
        environment: Mapping[str, str] = os.environ,
        folder: str | None = None,
    ) -> None:
        """
        Args:
          setup: the first message to the process.
          sink: receives lines that the process writes to its standard output or error.
          program: the program for Python with its arguments; the descriptors of requests and answers are appended.
          folder: working directory of the process. Default: this process's.
        Raises: OSError: the process cannot be started.
        """
        ends: list[int] = []
        try:
            for _ in range(4):
                ends += _pipe()
            requests, self._to, self._from, answers, out, out_end, err, err_end = ends
            self._process = subprocess.Popen(
                [sys.executable, "-P", *program, str(requests), str(answers)],
                stdin=subprocess.PIPE,  # when closed or written to, the guard ends everything
                stdout=out_end,
                stderr=err_end,
                pass_fds=(requests, answers),
                start_new_session=True,  # a separate process group, which does not get the run's Ctrl-C
                cwd=folder,
                env={**environment, MARK: f"{os.getpid()}-{uuid.uuid4().hex}"},
            )
        except BaseException:
            for descriptor in ends:
                os.close(descriptor)
            raise
        for descriptor in (requests, answers, out_end, err_end):
            os.close(descriptor)
        os.set_blocking(self._to, False)
        self._output = Output(out, err, sink)
        self._begun, self._unsent = now(), memoryview(message_bytes(setup))
        self._number = 0
        self._signature: Signature | None = None
        self._head, self._body = bytearray(), bytearray()  # the answer that is being received
        with contextlib.suppress(TimeoutError, CallFailed):  # `ready` sends the rest or reports the error
            self._send(0.0)

    def ready(self, until: float) -> Signature:
        """Waits until the function is imported; returns its signature.

        Raises: TimeoutError: it is not imported by `until`. CallFailed: the process died, or did not answer within
          START_LIMIT. LookupError: the function cannot be found or imported.
        """
        if self._signature is None:
            start_deadline = self._begun + START_LIMIT
            try:
                self._send(min(until, start_deadline))
                answer = self._answer(min(until, start_deadline), _ANSWER)
            except TimeoutError:
                if now() < start_deadline:
                    raise
                raise CallFailed(f"its process did not answer for {START_LIMIT:g} s") from None
            if "missing" in answer:
                raise LookupError(answer["missing"])
            self._signature = Signature(**answer["signature"])
        return self._signature

    @property
    def heard_of(self) -> bool:
        """Whether the process is ready, or has sent an answer that is not read yet."""
        return self._signature is not None or bool(select.select([self._from], [], [], 0)[0])

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def ask(self, message: Mapping[str, Any], limit: float, largest: int | None = None) -> Any:
        """Sends a request and returns the answer, within `limit` seconds.

        Args:
          largest: largest size of an answer, bytes. Default: by the number of completions.
        Raises: TimeoutError: no answer in time. CallFailed: the process died, or its answer cannot be read.
        """
        deadline = now() + limit
        self._number += 1
        self._unsent = memoryview(message_bytes({"id": self._number, **message}))
        self._send(deadline)
        size = largest or _ANSWER + _ANSWER_EACH * len(message["completions"])
        while True:
            answer = self._answer(deadline, size)
            number = answer.get("id") if isinstance(answer, dict) else None
            if number == self._number:
                return answer
            # A smaller number is a second answer to an earlier request: skip it.
            if not isinstance(number, int) or not 0 < number < self._number:
                raise CallFailed("its process wrote to the pipe of its answers, so they cannot be read")

    def _send(self, deadline: float) -> None:
        """Sends the rest of the message. May wait: a worker whose reward holds the interpreter lock does not read."""
        while self._unsent:
            if select.select([], [self._to], [], _wait(deadline))[1]:
                try:
                    self._unsent = self._unsent[os.write(self._to, self._unsent) :]
                except BlockingIOError:  # the pipe has less room than a page
                    time.sleep(0.001)
                except BrokenPipeError as e:
                    raise self.died() from e
            elif not self.alive:
                raise self.died()
            elif now() >= deadline:
                raise TimeoutError

    def _answer(self, deadline: float, largest: int) -> Any:
        if len(self._head) < 8:
            self._receive(self._head, 8, deadline)
        (size,) = struct.unpack("<Q", self._head)
        if size > largest:
            raise CallFailed(f"its process sent an answer of {size:,} bytes; expected at most {largest:,}")
        self._receive(self._body, size, deadline)
        try:
            answer = json.loads(self._body)
        except (ValueError, RecursionError) as e:
            raise CallFailed("its process wrote to the pipe of its answers: the message cannot be read") from e
        self._head, self._body = bytearray(), bytearray()
        return answer

    def _receive(self, into: bytearray, size: int, deadline: float) -> None:
        """Reads until `into` has `size` bytes. After a timeout, a later call continues."""
        while len(into) < size:
            if select.select([self._from], [], [], _wait(deadline))[0]:
                part = os.read(self._from, min(size - len(into), 1 << 20))
                if not part:
                    raise self.died()
                into += part
            elif not self.alive and not select.select([self._from], [], [], 0)[0]:
                raise self.died()  # its children may hold the pipe open, so no end of file arrives
            elif now() >= deadline:
                raise TimeoutError

    def died(self) -> CallFailed:
        """The error for a process that has ended, with its last output."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        status = self._process.returncode
        lines = self._output.last_lines(0.5)
        last_output = f"; its last output: {' | '.join(lines[-3:])[:500]}" if lines else ""
        if status is not None and status < 0:
            message = f"its process was killed by {signal.Signals(-status).name}{last_output}"
            return CallFailed(message, "\n".join(lines), by_signal=True)
        return CallFailed(f"its process exited with status {status}{last_output}", "\n".join(lines))

    def end(self) -> None:
        """Ends the process and all that it started, without waiting for it."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            os.write(self._process.stdin.fileno(), b"x")  # tells the guard to end everything
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def kill(self) -> None:
        """Ends the process and all that it started, waits for them, and closes the pipes."""
        self.end()
        self._process.wait()
        self._output.last_lines(_GONE)
        self._output.stop()
        assert self._process.stdin is not None
        self._process.stdin.close()
        for descriptor in (self._to, self._from):
            with contextlib.suppress(OSError):
                os.close(descriptor)


def _wait(deadline: float) -> float:
    return max(0.0, min(POLL, deadline - now()))


def _pipe() -> tuple[int, int]:
    """Creates a pipe with descriptors above 2: a run may have closed standard descriptors."""
    ends = list(os.pipe())
    for i, end in enumerate(ends):
        if end < 3:
            ends[i] = fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 3)
            os.close(end)
    return ends[0], ends[1]
