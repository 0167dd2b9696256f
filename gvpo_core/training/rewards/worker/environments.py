"""Environments and tools in a worker process: one object for each episode, and operations on it by name.

An operation is a list: ["reset", episode, row], ["step", episode, message], ["tools", episode, calls] or
["close", episode]. Its result is an object with its values, or with "error" and "traceback".
"""

import asyncio
import inspect
import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .encoding import decode
from .functions import find_function
from .tools import schema_of

LONGEST_RESULT = 16_384  # characters of a tool's result that go to the model


class Environments:
    """The environments of one process, by the number of their episode."""

    def __init__(self, path: str, tools: Sequence[str], options: Mapping[str, Any], limit: float) -> None:
        """
        Args:
          path: class of the environment; empty: tools alone.
          tools: import paths of functions.
          limit: seconds for an async operation; others are limited from outside.
        Raises: LookupError: a class or function that is not there, or a tool whose schema cannot be made.
        """
        self._make: Any = find_function(path) if path else ToolsAlone
        self._options, self._limit = dict(options), limit
        self._functions = [find_function(tool) for tool in tools]
        self._methods = [tool for tool in getattr(self._make, "tools", ()) if isinstance(tool, str)]
        self._functions += [tool for tool in getattr(self._make, "tools", ()) if not isinstance(tool, str)]
        for name in ("reset", "step"):
            if not callable(getattr(self._make, name, None)):
                raise LookupError(f"{path} has no method {name}; expected reset(row) and step(message)")
        try:
            schemas = [schema_of(function) for function in self._functions]
            schemas += [schema_of(getattr(self._make, name), method=True) for name in self._methods]
        except (AttributeError, ValueError) as e:
            raise LookupError(str(e)) from e
        names = [schema["function"]["name"] for schema in schemas]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise LookupError(f"two tools are named {twice[0]}; rename one, since the model calls tools by name")
        self.described = {
            "tools": schemas,
            "concurrent": inspect.iscoroutinefunction(getattr(self._make, "step", None)),
        }
        self._living: dict[int, Any] = {}

    def answer(self, request: Mapping[str, Any], run: Callable[[Any], Any]) -> dict[str, Any]:
        """The results of the operations; async ones wait side by side."""
        if "describe" in request:
            return {"values": self.described}

        async def every() -> list[dict[str, Any]]:
            return await asyncio.gather(*(self._one(operation) for operation in request["operations"]))

        return {"values": run(every())}

    async def _one(self, operation: Sequence[Any]) -> dict[str, Any]:
        name, episode, *given = operation
        try:
            return await asyncio.wait_for(getattr(self, f"_{name}")(episode, *map(decode, given)), self._limit)
        except TimeoutError:
            return {"error": f"no result within {self._limit:g} s", "traceback": ""}
        except BaseException as e:  # SystemExit too: an environment must not end the run
            return {"error": _text(e), "traceback": "".join(traceback.format_exception(e)[-3:])[-4000:]}

    async def _reset(self, episode: int, row: dict[str, Any]) -> dict[str, Any]:
        environment = self._living[episode] = self._make(**self._options)
        messages = await _awaited(environment.reset(row))
        return {"messages": None if messages is None else _messages(messages, "reset")}

    async def _step(self, episode: int, message: dict[str, Any]) -> dict[str, Any]:
        result = await _awaited(self._living[episode].step(message))
        if not isinstance(result, tuple | list) or len(result) != 3:
            raise TypeError(f"step returned {_start(result)}; expected (messages, reward, done)")
        messages, reward, done = result
        if reward is not None:
            reward = float(reward)
        if not isinstance(done, bool | int):
            raise TypeError(f"step returned done = {_start(done)}; expected true or false")
        return {"messages": _messages(messages or [], "step"), "reward": reward, "done": bool(done)}

    async def _tools(self, episode: int, calls: list[dict[str, Any]]) -> dict[str, Any]:
        environment = self._living[episode]
        known = {function.__name__: function for function in self._functions}
        known |= {name: getattr(environment, name) for name in self._methods}
        messages, failures = [], 0
        for call in calls:
            text, failed = await _called(known, call)
            failures += failed
            messages.append({"role": "tool", "name": call["name"], "content": text[:LONGEST_RESULT]})
        return {"messages": messages, "failures": failures}

    async def _close(self, episode: int) -> dict[str, Any]:
        environment = self._living.pop(episode, None)
        close = getattr(environment, "close", None)
        if callable(close):
            await _awaited(close())
        return {}


class ToolsAlone:
    """The environment of tools without another one: it ends with the first message that calls no tool."""

    def reset(self, row: Mapping[str, Any]) -> None:
        """The prompt is the row's."""

    def step(self, message: Mapping[str, Any]) -> tuple[list[Any], None, bool]:
        """Ends the episode; the rewards score it."""
        return [], None, True


async def _called(known: Mapping[str, Callable[..., Any]], call: Mapping[str, Any]) -> tuple[str, bool]:
    """A tool's result as text, and whether it failed. Its errors are for the model."""
    name, arguments = str(call.get("name")), call.get("arguments")
    if name not in known:
        return f"error: there is no tool {name!r}; there are: {', '.join(known)}", True
    if not isinstance(arguments, dict):
        return f"error: the arguments of {name} are {_start(arguments)}; expected an object", True
    try:
        inspect.signature(known[name]).bind(**arguments)
    except TypeError as e:
        return f"error: {name}: {e}", True
    try:
        result = await _awaited(known[name](**arguments))
        return result if isinstance(result, str) else json.dumps(result), False
    except Exception as e:
        return f"error: {_text(e)}"[:500], True


async def _awaited(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


def _messages(messages: Any, of: str) -> list[dict[str, Any]]:
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise TypeError(f"{of} returned messages = {_start(messages)}; expected a list of messages")
    for message in messages:
        good = isinstance(message, Mapping) and all(isinstance(message.get(k), str) for k in ("role", "content"))
        if not good:
            raise TypeError(f"{of} returned the message {_start(message)}; expected a text role and a text content")
    return [dict(message) for message in messages]


def _text(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:2000]
    except Exception:
        return f"{type(error).__name__}: (its text cannot be read)"


def _start(value: Any) -> str:
    return f"{value!r:.80} ({type(value).__name__})"
