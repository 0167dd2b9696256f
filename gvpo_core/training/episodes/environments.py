"""The environments of a run: objects in worker processes, one for each episode, called with time limits.

A process that exceeds its limit is killed with all its children. Its other episodes are replayed in a new process,
message by message. If an environment does not give the same results again, its episodes are lost.
"""

import functools
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from gvpo_core.training.config import ConfigError, EnvironmentConfig
from gvpo_core.training.config.secrets import resolved
from gvpo_core.training.rewards import RewardLog
from gvpo_core.training.rewards.clock import now
from gvpo_core.training.rewards.process import START_LIMIT, CallFailed, Worker, working_folder
from gvpo_core.training.rewards.worker.encoding import UnsendableError, encode

_ANSWER = 4 * 2**20  # largest answer to an operation, bytes
_GRACE = 5.0  # further seconds for async operations: the process enforces their limit itself


@dataclass(frozen=True)
class Operation:
    """A call to an episode's environment."""

    name: str  # reset, step, tools, at_limit, close
    episode: int
    arguments: tuple[Any, ...] = ()  # row, message or calls

    def message(self) -> list[Any]:
        """Returns the message for the process. Raises: UnsendableError."""
        return [self.name, self.episode, *map(encode, self.arguments)]


Result = dict[str, Any]  # values, or "error" and "traceback"


class Environments:
    """A pool of processes. The number of an episode determines its process."""

    def __init__(self, config: EnvironmentConfig, log: RewardLog | None = None) -> None:
        """Starts the first process. Raises: ConfigError: a class or tool does not exist or cannot be used."""
        self.config = config
        options = resolved(config.options, "environment.options")
        try:
            setup = {
                "function": config.path,
                "tools": list(config.tools),
                "options": encode(dict(options)),
                "limit": config.timeout,
                "memory": int(config.memory * 2**30),
                "path": list(sys.path),
            }
        except UnsendableError as e:
            raise ConfigError(f"environment.options cannot be sent to a process as JSON: {e}") from e
        sink = functools.partial((log or RewardLog()).output, "environment")
        start = functools.partial(Worker, setup, sink, folder=working_folder())
        self._seats = [_Seat(start, config.timeout) for _ in range(config.workers)]
        try:
            described = self._seats[0].describe()
        except BaseException as e:  # also on Ctrl-C: no process may stay behind
            self.close()
            if isinstance(e, LookupError | CallFailed | OSError | TimeoutError):
                name = f"environment.path = {config.path!r}" if config.path else f"environment.tools = {config.tools}"
                raise ConfigError(f"{name}: {e}") from e
            raise
        self.tools: list[dict[str, Any]] = described["tools"]
        self.answers: bool = described["answers"]  # whether step answers tool calls
        self.scores_cut: bool = described["at_limit"]  # whether the environment scores episodes that a limit cuts
        for seat in self._seats:
            seat.concurrent = described["concurrent"]

    def ask(self, operations: Sequence[Operation]) -> list[Result]:
        """Returns the results in the order of the operations. An episode may have at most one operation."""
        places: list[list[int]] = [[] for _ in self._seats]
        for place, operation in enumerate(operations):
            places[operation.episode % len(self._seats)].append(place)
        busy = [(seat, indices) for seat, indices in zip(self._seats, places, strict=True) if indices]
        results: list[Result] = [{}] * len(operations)
        if not busy:
            return results
        with ThreadPoolExecutor(len(busy)) as pool:
            calls = [(indices, pool.submit(seat.ask, [operations[i] for i in indices])) for seat, indices in busy]
            for indices, future in calls:
                for place, result in zip(indices, future.result(), strict=True):
                    results[place] = result
        return results

    def close(self) -> None:
        """Ends the processes."""
        for seat in self._seats:
            seat.close()


def _failed(error: str, traceback: str = "") -> Result:
    return {"error": error, "traceback": traceback}


class _Seat:
    """One process and the episodes that live in it."""

    def __init__(self, start: functools.partial[Worker], limit: float) -> None:
        self._start, self._limit, self.concurrent = start, limit, False
        self._worker: Worker | None = None
        self._past: dict[int, list[tuple[Operation, Result]]] = {}  # by open episode
        self._lost: set[int] = set()  # open episodes that the process does not have

    def describe(self) -> dict[str, Any]:
        """Returns the tools' schemas, and what the environment supports: see `Environments.__init__`.

        Raises: LookupError, CallFailed, TimeoutError, OSError.
        """
        described: dict[str, Any] = self._answer({"describe": True}, self._limit)
        return described

    def ask(self, operations: Sequence[Operation]) -> list[Result]:
        """Returns the results. If a process fails on several operations at once, they are retried one by one."""
        results: list[Result] | None = None
        if self.concurrent and not any(operation.episode in self._lost for operation in operations):
            results = self._send(operations)
        if results is None or (len(results) > 1 and self._worker is None):
            return [self._alone(operation) for operation in operations]
        for operation, result in zip(operations, results, strict=True):
            self._keep(operation, result)
        return results

    def _alone(self, operation: Operation) -> Result:
        if operation.episode in self._lost and operation.name != "close":
            self._replay(operation.episode)
        if operation.episode in self._lost:
            text = "its process was restarted, and the environment did not repeat itself"
            result: Result = {} if operation.name == "close" else _failed(text)
        else:
            [result] = self._send([operation])
        self._keep(operation, result)
        return result

    def _keep(self, operation: Operation, result: Result) -> None:
        if operation.name == "close" or "error" in result:
            self._past.pop(operation.episode, None)
            self._lost.discard(operation.episode)
        else:
            self._past.setdefault(operation.episode, []).append((operation, result))

    def _send(self, operations: Sequence[Operation]) -> list[Result]:
        """Returns the results. If the process fails, it is ended, and all results are errors."""
        results: list[Result] = [{}] * len(operations)
        sent, messages = [], []
        for place, operation in enumerate(operations):
            try:
                messages.append(operation.message())
                sent.append(place)
            except UnsendableError as e:
                results[place] = _failed(f"it cannot be sent to the environment's process: {e}")
        if not sent:
            return results
        try:
            limit = self._limit + (_GRACE if self.concurrent else 0.0)
            answers = self._answer({"operations": messages}, limit, _ANSWER * len(messages))
        except (TimeoutError, CallFailed, LookupError, OSError) as e:
            self._end()
            text = f"no result within {self._limit:g} s" if isinstance(e, TimeoutError) else str(e)
            answers = [_failed(text, getattr(e, "traceback", ""))] * len(sent)
        for place, answer in zip(sent, answers, strict=True):
            results[place] = answer
        return results

    def _answer(self, message: dict[str, Any], limit: float, largest: int = _ANSWER) -> Any:
        if self._worker is None:
            self._worker = self._start()
        self._worker.ready(now() + START_LIMIT)
        answer = self._worker.ask(message, limit, largest)
        if "error" in answer:
            raise CallFailed(answer["error"], answer["traceback"])
        return answer["values"]

    def _replay(self, episode: int) -> None:
        """Replays an episode in the new process. It stays lost if a result differs."""
        past = self._past.get(episode, [])
        self._lost.discard(episode)
        for operation, before in past:
            if self._send([operation]) != [before]:
                self._lost.add(episode)
                return

    def _end(self) -> None:
        if self._worker is not None:
            self._worker.kill()
        self._worker = None
        self._lost |= self._past.keys()

    def close(self) -> None:
        """Ends the process."""
        self._past.clear()
        self._end()
        self._lost.clear()
