"""Calls one reward function with a time limit: in processes that can be killed, or in threads of this process."""

import asyncio
import contextlib
import functools
import sys
import threading
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from gvpo_core.training.rewards.clock import POLL, now
from gvpo_core.training.rewards.log import RewardLog
from gvpo_core.training.rewards.prints import printing_to
from gvpo_core.training.rewards.process import START_LIMIT, CallFailed, Worker, working_folder
from gvpo_core.training.rewards.worker import functions
from gvpo_core.training.rewards.worker.encoding import UnsendableError, encode
from gvpo_core.training.rewards.worker.functions import Signature, plain, signature_of, wanted_columns, wrong_arguments

Columns = Mapping[str, Sequence[Any]]
_REACTION = 1.0  # seconds that a shared event loop may take to notice a cancelled call


class Caller(Protocol):
    """Calls a reward function."""

    width: int  # calls that may run at once
    signature: Signature
    start: float  # seconds to be ready again after a call that exceeded its limit

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], columns: Columns, limit: float, until: float
    ) -> Any:
        """Calls the function and returns its result in the form of `plain`.

        Args:
          limit: seconds for the function itself.
          until: time of `clock.now` at which to give up, even if the call has not begun.
        Raises: TimeoutError, CallFailed, UnsendableError.
        """

    def wrong_columns(self, columns: Collection[str] | None) -> str | None:
        """Why the function cannot be called with these data columns; None if it can.

        Args:
          columns: names of the columns; None: unknown.
        """

    def close(self) -> None:
        """Releases the resources of the calls."""


class EventLoop:
    """One event loop for all async rewards in this process: their clients and locks are bound to a loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def submit(self, value: Awaitable[Any]) -> "Future[Any]":
        """Awaits a value on the loop; returns the future of its result."""

        async def awaited() -> Any:
            try:
                return await value
            except (SystemExit, KeyboardInterrupt) as e:  # they would end the loop
                raise CallFailed(f"{type(e).__name__}: {e}") from e

        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=_run_forever, args=(self._loop,), daemon=True, name="gvpo-reward-loop").start()
            return asyncio.run_coroutine_threadsafe(awaited(), self._loop)

    def cancel(self, future: "Future[Any]") -> None:
        """Cancels a future of `submit`. If a reward blocks the loop, the next call starts a new loop."""
        with self._lock:
            loop = self._loop
        if loop is None:
            return
        reacted = threading.Event()
        future.cancel()
        loop.call_soon_threadsafe(reacted.set)
        if not reacted.wait(_REACTION):
            with self._lock:
                if self._loop is loop:
                    self._loop = None
            loop.call_soon_threadsafe(loop.stop)


def _run_forever(loop: asyncio.AbstractEventLoop) -> None:
    stopped = False
    while not stopped:
        try:
            loop.run_forever()
            stopped = True
        except (SystemExit, KeyboardInterrupt):  # raised by another task that a reward started
            pass
    loop.close()


_LOOP = EventLoop()


class Threads:
    """Calls a function of this process, each call in a thread. Used for functions given as Python objects.

    An async function runs on an event loop that all calls share, and is cancelled when its time is up. Other calls are
    abandoned but keep running, and one that never releases the interpreter lock blocks the run. Each call gets its own
    copy of lists, mappings, sets and arrays, as in a process: changes in them do not affect other calls.
    """

    width = 64
    start = 0.0

    def __init__(self, name: str, function: Callable[..., Any], options: Mapping[str, Any], *, log: RewardLog) -> None:
        """
        Args:
          log: receives what the function prints.
        Raises: LookupError, ImportError: the function cannot work, or its signature cannot be read.
        """
        self._function, self._options = function, options
        self._sink = functools.partial(log.output, name)
        self._closed = False
        functions.warm_up(function, options)
        self.signature = signature_of(function, options)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], columns: Columns, limit: float, until: float
    ) -> Any:
        """See Caller."""
        call_columns = {
            name: _copied(name, columns[name]) for name in wanted_columns(self.signature, columns, self._options)
        }
        outcome: list[Any] = []
        futures: list[Future[Any]] = []
        done, given_up = threading.Event(), threading.Event()

        def run(value: Awaitable[Any]) -> Any:
            if given_up.is_set():
                raise TimeoutError
            futures.append(_LOOP.submit(value))
            return futures[0].result()

        def work() -> None:
            try:
                with printing_to(self._sink):
                    copies = functions.own_copy(prompts), functions.own_copy(completions)
                    value = functions.call(self._function, *copies, call_columns, self._options, run)
                    outcome.append((plain(value, len(completions)), None))
            except BaseException as e:  # also SystemExit: a reward must not end the run
                outcome.append((None, e))
            done.set()

        threading.Thread(target=work, daemon=True, name="gvpo-reward").start()
        deadline = min(now() + limit, until)
        try:
            while not done.wait(max(0.0, min(POLL, deadline - now()))):
                if self._closed:
                    raise CallFailed("the run is stopping")
                if now() >= deadline:
                    raise TimeoutError
        except BaseException:
            given_up.set()
            for future in futures:
                _LOOP.cancel(future)
            raise
        value, error = outcome[0]
        if isinstance(error, CallFailed):
            raise error
        if error is not None:
            raise CallFailed(functions.described_error(error), functions.end_of_traceback(error)) from error
        return value

    def wrong_columns(self, columns: Collection[str] | None) -> str | None:
        """See Caller."""
        return wrong_arguments(self.signature, columns, self._options)

    def close(self) -> None:
        """Abandons the running calls."""
        self._closed = True


class Processes:
    """Calls a function, found by its import path, in up to `width` processes, which are started when needed.

    A process that exceeds its limit is killed with all its children, and another one starts in the background. The
    processes have the user's permissions: they cannot hang or crash the run, but they can read files and use the
    network.
    """

    def __init__(
        self, name: str, function: str, options: Mapping[str, Any], *, width: int, memory: int, log: RewardLog
    ) -> None:
        """
        Args:
          name: name of the reward, for its lines in `log`.
          function: the import path, as for functions.find_function.
          memory: limit of a process's address space, bytes; 0: no limit.
        Raises: LookupError: the function cannot be found or imported.
        """
        self.width = width
        self._options, self._sink = options, functools.partial(log.output, name)
        setup = {"function": function, "options": encode(dict(options)), "memory": memory, "path": list(sys.path)}
        self._start = functools.partial(Worker, setup, self._sink, folder=working_folder())
        self._busy: set[Worker] = set()
        self._closed = False
        begin = now()
        try:
            first = self._start()
        except OSError as e:
            raise LookupError(f"its process cannot be started: {e}") from e
        try:
            self.signature = first.ready(begin + 2 * START_LIMIT)
        except BaseException as e:  # also Ctrl-C: leave no process behind
            first.kill()
            if isinstance(e, CallFailed):
                raise LookupError(f"importing {function} failed: {e}") from e
            raise
        self.start = now() - begin
        self._idle: list[Worker | None] = [*[None] * (width - 1), first]  # None: not started
        self._changed = threading.Condition()

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], columns: Columns, limit: float, until: float
    ) -> Any:
        """See Caller. Tries once more if a signal killed the process, for example when memory was short."""
        sent_columns = {name: columns[name] for name in wanted_columns(self.signature, columns, self._options)}
        request = {"prompts": _encoded("the prompt", prompts), "completions": encode(list(completions))}
        request["columns"] = {
            "dict": [[name, _encoded(f"column {name!r}", values)] for name, values in sent_columns.items()]
        }
        begin = now()
        try:
            return self._call(request, limit, until)
        except CallFailed as e:
            left = limit - (now() - begin)
            if not e.by_signal or left <= 0 or self._closed:
                raise
            return self._call(request, left, until)

    def _call(self, request: Mapping[str, Any], limit: float, until: float) -> Any:
        worker = self._acquire(until)
        try:
            if self._closed:
                raise CallFailed("the run is stopping")
            worker.ready(until)
            limit = min(limit, until - now())
            if limit <= 0:
                raise TimeoutError
        except TimeoutError:  # the worker continues to start, for the next call
            self._release(worker)
            raise
        except BaseException as e:
            self._end(worker, again=False)
            if isinstance(e, LookupError):
                raise CallFailed(str(e)) from e
            raise
        try:
            answer = worker.ask(request, limit)
        except BaseException:  # also Ctrl-C: an interrupted worker cannot be used again
            self._end(worker, again=True)
            raise
        self._release(worker)
        if "error" in answer:
            raise CallFailed(answer["error"], answer["traceback"])
        return answer["values"]

    def wrong_columns(self, columns: Collection[str] | None) -> str | None:
        """See Caller."""
        return wrong_arguments(self.signature, columns, self._options)

    def close(self) -> None:
        """Ends the processes. Running calls fail."""
        with self._changed:
            self._closed = True
            for worker in self._busy:
                worker.end()  # the worker's call cleans up
            for idle in self._idle:
                if idle is not None:
                    idle.kill()
            self._idle = [None] * len(self._idle)

    def _acquire(self, until: float) -> Worker:
        """Waits for an idle worker. Prefers one that is ready to one that is starting, and that to a new one."""
        with self._changed:
            while not self._idle:
                if now() >= until:
                    raise TimeoutError
                self._changed.wait(POLL)
            worker = self._idle.pop(max(range(len(self._idle)), key=lambda i: _readiness(self._idle[i])))
            try:
                if worker is None or not worker.alive:
                    if worker is not None:
                        worker.kill()
                    worker = self._start()
            except OSError as e:
                self._idle.append(None)
                raise CallFailed(f"its process cannot be started: {e}") from e
            self._busy.add(worker)
            return worker

    def _release(self, worker: Worker) -> None:
        with self._changed:
            self._busy.discard(worker)
            if self._closed:
                worker.kill()
            self._idle.append(None if self._closed else worker)
            self._changed.notify()

    def _end(self, worker: Worker, *, again: bool) -> None:
        """Kills a worker. If `again`, starts another in its place."""
        worker.kill()
        with self._changed:
            self._busy.discard(worker)
            replacement = None
            with contextlib.suppress(OSError):  # the next call reports the error
                replacement = self._start() if again and not self._closed else None
            self._idle.append(replacement)
            self._changed.notify()


def _readiness(worker: Worker | None) -> int:
    return 0 if worker is None else 2 if worker.heard_of else 1


def _copied(name: str, values: Sequence[Any]) -> Any:
    """Copies values for a call in a thread. Raises: UnsendableError: they contain themselves, or nest too deep."""
    try:
        return functions.own_copy(values)
    except RecursionError as e:
        raise UnsendableError(
            f"column {name!r} nests too deep to be copied for each call; use plain values, or remove it from the"
            " function's arguments"
        ) from e


def _encoded(what: str, values: Sequence[Any]) -> Any:
    """Encodes values for a process. Raises: UnsendableError: a value would not arrive equal; the message names it."""
    encoded = encode(list(values)) if all(type(v) in (str, int, float, bool) for v in values) else []
    for row, value in enumerate(values[len(encoded) :]):
        try:
            encoded.append(encode(value))
        except (UnsendableError, RecursionError) as e:
            raise UnsendableError(
                f"{what} of response {row} cannot be sent to a reward's process as JSON and arrive equal: {e}; use"
                " plain values, remove it from the function's arguments, or set isolation = 'thread'"
            ) from e
    return encoded
