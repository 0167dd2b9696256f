"""One worker process, as the run sees it: start, requests with a number each, answers of bounded size, end."""

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
_GONE = 10.0  # seconds to wait for the guard; what it cannot end, only the kernel can
_ANSWER = 256 * 1024  # largest size of an answer, bytes, plus for each response:
_ANSWER_EACH = 4096


def working_folder() -> str | None:
    """The working directory, for processes that start later, when a reward in a thread may have changed it.

    None: it was removed.
    """
    try:
        return os.getcwd()
    except OSError:
        return None


class CallFailed(Exception):
    """A call that gave no result: the reward raised, or its process died."""

    def __init__(self, message: str, traceback: str = "", *, by_signal: bool = False) -> None:
        super().__init__(message)
        self.traceback, self.by_signal = traceback, by_signal


class Worker:
    """One process."""

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
          setup: what the process reads first.
          sink: takes lines that the process writes to its standard output or error.
          program: what Python runs, with its arguments; the descriptors of requests and answers follow.
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
                stdin=subprocess.PIPE,  # closed or written to: the guard ends everything
                stdout=out_end,
                stderr=err_end,
                pass_fds=(requests, answers),
                start_new_session=True,  # a separate process group, and no Ctrl-C meant for the run
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
        self._head, self._body = bytearray(), bytearray()  # of an answer that is being received
        with contextlib.suppress(TimeoutError, CallFailed):  # sent, or reported, when it is asked
            self._send(0.0)

    def ready(self, until: float) -> Signature:
        """Waits until the function is imported, and gives its signature.

        Raises: TimeoutError: it is not yet. CallFailed: the process died, or is not heard of for too long. LookupError:
          the function cannot be found or imported.
        """
        if self._signature is None:
            late = self._begun + START_LIMIT
            try:
                self._send(min(until, late))
                answer = self._answer(min(until, late), _ANSWER)
            except TimeoutError:
                if now() < late:
                    raise
                raise CallFailed(f"its process did not answer for {START_LIMIT:g} s") from None
            if "missing" in answer:
                raise LookupError(answer["missing"])
            self._signature = Signature(**answer["signature"])
        return self._signature

    @property
    def heard_of(self) -> bool:
        """Whether it is ready, or has said something by now."""
        return self._signature is not None or bool(select.select([self._from], [], [], 0)[0])

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def ask(self, message: Mapping[str, Any], limit: float, largest: int | None = None) -> Any:
        """The answer, within `limit` seconds.

        Args:
          largest: bytes of an answer. Default: by the number of completions.
        Raises: TimeoutError; CallFailed: the process died, or sent no answer.
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
            if not isinstance(number, int) or not 0 < number < self._number:  # older: a second answer to a request
                raise CallFailed("its process wrote to the pipe of its answers, so they cannot be read")

    def _send(self, deadline: float) -> None:
        """Writes what is unsent. A reward of which a thread holds the interpreter does not read, so this may wait."""
        while self._unsent:
            if select.select([], [self._to], [], _wait(deadline))[1]:
                try:
                    self._unsent = self._unsent[os.write(self._to, self._unsent) :]
                except BlockingIOError:  # less room than a page
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
        """Fills `into` to its size; a later call continues where one ran out of time."""
        while len(into) < size:
            if select.select([self._from], [], [], _wait(deadline))[0]:
                part = os.read(self._from, min(size - len(into), 1 << 20))
                if not part:
                    raise self.died()
                into += part
            elif not self.alive and not select.select([self._from], [], [], 0)[0]:
                raise self.died()  # its children may hold the pipe open, so there is no end to read
            elif now() >= deadline:
                raise TimeoutError

    def died(self) -> CallFailed:
        """What to say of a process that does not run any more."""
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
            os.write(self._process.stdin.fileno(), b"x")  # to the guard
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def kill(self) -> None:
        """Ends the process and all that it started; leaves no zombie and no pipe."""
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
    """A pipe whose ends are above the standard descriptors, which a run may have closed."""
    ends = list(os.pipe())
    for i, end in enumerate(ends):
        if end < 3:
            ends[i] = fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 3)
            os.close(end)
    return ends[0], ends[1]
