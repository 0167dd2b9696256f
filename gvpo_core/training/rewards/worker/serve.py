"""Answers requests to one reward function, or to the environments of some episodes, in one process and event loop.

Prints of a reward go to the run's log; requests and answers have pipes of their own. The run reads only numbers and
text from the answers: it never executes anything that a reward returns.
"""

import asyncio
import contextlib
import dataclasses
import faulthandler
import functools
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from .encoding import decode
from .environments import Environments
from .functions import (
    Signature,
    call,
    described_error,
    end_of_traceback,
    find_function,
    plain,
    signature_of,
    warm_up,
)
from .guard import start_guard
from .job_signals import TERMINATING
from .messages import messages, read_message, write_message


def main(requests: int, answers: int) -> None:
    """Runs a worker, from the set-up to the end of the requests."""
    outlive_signals_of_the_job()
    start_guard((requests, answers))
    os.register_at_fork(after_in_child=_restore_signals)  # signals end the reward's own children as usual
    for stream in (sys.stdout, sys.stderr):  # for any locale; written lines survive a crash
        stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable()
    setup = read_message(requests)
    sys.path[:] = setup["path"]
    try:
        _limit_memory(setup["memory"])
        options = decode(setup["options"])
        if "tools" in setup:
            environments = Environments(setup["function"], setup["tools"], options, setup["limit"])
            answer, signature = environments.answer, Signature([], [], True, [])
        else:
            function = find_function(setup["function"])
            warm_up(function, options)
            answer, signature = functools.partial(_rewards, function, options), signature_of(function, options)
        write_message(answers, {"signature": dataclasses.asdict(signature)})
    except (LookupError, ImportError) as e:
        write_message(answers, {"missing": str(e)})
        return
    _serve(requests, answers, answer)


def outlive_signals_of_the_job() -> None:
    """Ignores signals that a scheduler sends to all processes of a job: the run needs its workers to finish its step.

    Uses handlers instead of SIG_IGN, which child programs would inherit.
    """
    for number in TERMINATING:
        signal.signal(number, _outlived)


def _outlived(number: int, frame: FrameType | None) -> None:
    """Does nothing: the run finishes its step."""


def _restore_signals() -> None:
    """Restores the default signals in a process that the reward forks. Keeps handlers that the reward has set."""
    for number in TERMINATING:
        if signal.getsignal(number) is _outlived:
            signal.signal(number, signal.SIG_DFL)


def _limit_memory(size: int) -> None:
    """Limits the address space, within the system's hard limit. Raises: LookupError: it cannot be limited."""
    if not size:
        return
    import resource

    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard != resource.RLIM_INFINITY:
        size = min(size, hard)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    except (OSError, ValueError) as e:
        raise LookupError(f"its memory cannot be limited on this system ({e}); set memory = 0") from e


def _rewards(function: Any, options: Any, request: Any, run: Callable[[Any], Any]) -> dict[str, Any]:
    prompts, completions, columns = (decode(request[k]) for k in ("prompts", "completions", "columns"))
    return {"values": plain(call(function, prompts, completions, columns, options, run), len(completions))}


def _serve(requests: int, answers: int, work: Callable[[Any, Callable[[Any], Any]], dict[str, Any]]) -> None:
    worker_pid = os.getpid()
    with asyncio.Runner() as runner:

        async def awaited(value: Any) -> Any:
            return await value

        def run(value: Any) -> Any:
            return runner.run(awaited(value))

        for request in messages(requests):
            answer: dict[str, Any]
            try:
                answer = work(request, run)
            except BaseException as e:  # also SystemExit: a reward must not end the run
                answer = _error(e)
            if os.getpid() != worker_pid:  # a child that the function forked has returned here
                os._exit(0)
            _flush()
            write_message(answers, {"id": request["id"]} | answer)


def _error(error: BaseException) -> dict[str, str]:
    return {"error": described_error(error), "traceback": end_of_traceback(error)}


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # the function has closed or replaced the stream
            stream.flush()
