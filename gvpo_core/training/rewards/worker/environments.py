"""Environments and tools in a worker process: one object for each episode, and named operations on it.

An operation is a list: ["reset", episode, row], ["step", episode, message], ["tools", episode, calls],
["at_limit", episode, message or null] or ["close", episode]. Its result is an object with its values, or with
"error" and "traceback".
"""

import asyncio
import inspect
import json
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .encoding import LARGEST_REWARD, decode
from .functions import find_function, own_copy
from .tools import schema_of

LONGEST_RESULT = 16_384  # characters of a tool's result that go to the model
LARGEST_MESSAGES = 3 * 2**20  # bytes of an operation's messages as JSON; the run accepts slightly more


class Environments:
    """The environments of one process, by the number of their episode."""

    def __init__(self, path: str, tools: Sequence[str], options: Mapping[str, Any], limit: float) -> None:
        """
        Args:
          path: import path of the environment's class; empty: only tools.
          tools: import paths of functions.
          limit: time limit of an async operation, seconds; the run limits the others.
        Raises: LookupError: a class or function does not exist, or a tool's schema cannot be made.
        """
        self._make: Any = find_function(path, "class", {}) if path else ToolsAlone
        self._options, self._limit = dict(options), limit
        class_tools = getattr(self._make, "tools", ())
        if not isinstance(class_tools, tuple | list):
            raise LookupError(
                f"the attribute tools of {path} is {_start(class_tools)}; expected a list of functions and names"
            )
        functions = [find_function(tool, built_in={}) for tool in tools] + [
            tool for tool in class_tools if not isinstance(tool, str)
        ]
        self._methods = [tool for tool in class_tools if isinstance(tool, str)]
        for name in ("reset", "step"):
            if not callable(getattr(self._make, name, None)):
                raise LookupError(f"{path} has no method {name}; expected reset(row) and step(message)")
        try:
            inspect.signature(self._make).bind(**self._options)
        except TypeError as e:
            raise LookupError(f"environment.options are not the arguments of the class: {e}") from e
        except ValueError:  # no signature that Python can read
            pass
        try:
            schemas = [schema_of(function) for function in functions]
            schemas += [schema_of(getattr(self._make, name), method=self._bound(name)) for name in self._methods]
        except (AttributeError, ValueError) as e:
            raise LookupError(str(e)) from e
        self._functions = dict(zip((schema["function"]["name"] for schema in schemas), functions, strict=False))
        names = [schema["function"]["name"] for schema in schemas]
        if duplicates := sorted({name for name in names if names.count(name) > 1}):
            raise LookupError(f"two tools are named {duplicates[0]}; rename one, since the model calls tools by name")
        is_async = inspect.iscoroutinefunction
        concurrent = is_async(getattr(self._make, "step", None)) if path else all(map(is_async, functions))
        self._schemas = getattr(self._make, "tool_schemas", None)
        if self._schemas is not None and schemas:
            raise LookupError(
                f"{path} has tool_schemas, whose calls step answers, beside the tools {', '.join(names)}, whose calls"
                " it does not see; give all of them in one way"
            )
        self.described = {"tools": schemas, "concurrent": concurrent, "answers": self._schemas is not None}
        self.described["at_limit"] = callable(getattr(self._make, "at_limit", None))
        self._living: dict[int, Any] = {}

    def _bound(self, name: str) -> bool:
        """Whether a method's signature shows the object as first parameter: not for static and class methods."""
        return not isinstance(inspect.getattr_static(self._make, name), staticmethod | classmethod)

    def answer(self, request: Mapping[str, Any], run: Callable[[Any], Any]) -> dict[str, Any]:
        """The results of the operations. Async operations run concurrently."""
        if "describe" in request:
            return {"values": run(self._describe())}

        async def every() -> list[dict[str, Any]]:
            return await asyncio.gather(*(self._one(operation) for operation in request["operations"]))

        return {"values": run(every())}

    async def _describe(self) -> dict[str, Any]:
        if self._schemas is None:
            return self.described
        schemas = await _awaited(self._schemas(**own_copy(self._options)))
        return self.described | {"tools": [_schema(schema) for schema in schemas]}

    async def _one(self, operation: Sequence[Any]) -> dict[str, Any]:
        name, episode, *arguments = operation
        try:
            return await asyncio.wait_for(getattr(self, f"_{name}")(episode, *map(decode, arguments)), self._limit)
        except TimeoutError:
            return {"error": f"no result within {self._limit:g} s", "traceback": ""}
        except BaseException as e:  # also SystemExit: an environment must not end the run
            return {"error": _text(e), "traceback": _of_the_user(e)}

    async def _reset(self, episode: int, row: dict[str, Any]) -> dict[str, Any]:
        environment = self._living[episode] = self._make(**own_copy(self._options))
        messages = await _awaited(environment.reset(row))
        return {"messages": None if messages is None else _messages(messages, "reset")}

    async def _step(self, episode: int, message: dict[str, Any]) -> dict[str, Any]:
        result = await _awaited(self._living[episode].step(message))
        if not isinstance(result, tuple | list) or len(result) != 3:
            raise TypeError(f"step returned {_start(result)}; expected (messages, reward, done)")
        messages, reward, done = result
        done = done.item() if hasattr(done, "item") else done  # a NumPy scalar
        if not isinstance(done, bool | int):
            raise TypeError(f"step returned done = {_start(done)}; expected true or false")
        return {"messages": _messages(messages or [], "step"), "reward": _reward(reward, "step"), "done": bool(done)}

    async def _at_limit(self, episode: int, message: dict[str, Any] | None) -> dict[str, Any]:
        return {"reward": _reward(await _awaited(self._living[episode].at_limit(message)), "at_limit")}

    async def _tools(self, episode: int, calls: list[dict[str, Any]]) -> dict[str, Any]:
        environment = self._living[episode]
        tools = self._functions | {name: getattr(environment, name) for name in self._methods}
        messages, failures = [], 0
        for call in calls:
            text, failed = await _called(tools, call)
            failures += failed
            called = {"name": call["name"]} if call["name"] in tools else {}
            messages.append({"role": "tool", **called, "content": _writable(text[:LONGEST_RESULT])})
        return {"messages": messages, "failures": failures}

    async def _close(self, episode: int) -> dict[str, Any]:
        environment = self._living.pop(episode, None)
        close = getattr(environment, "close", None)
        if callable(close):
            await _awaited(close())
        return {}


class ToolsAlone:
    """The environment for tools without a user's environment. It ends with the first message that calls no tool."""

    def reset(self, row: Mapping[str, Any]) -> None:
        """Returns no messages: the prompt is the row's."""

    def step(self, message: Mapping[str, Any]) -> tuple[list[Any], None, bool]:
        """Ends the episode without a reward; the configured rewards score it."""
        return [], None, True


async def _called(tools: Mapping[str, Callable[..., Any]], call: Mapping[str, Any]) -> tuple[str, bool]:
    """Calls a tool. Returns its result as text and whether it failed; the model reads the error."""
    name, arguments = str(call.get("name")), call.get("arguments")
    if name not in tools:
        return f"error: there is no tool {name!r:.80}; there are: {', '.join(tools)}", True
    if not isinstance(arguments, dict):
        return f"error: the arguments of {name} are {_start(arguments)}; expected an object", True
    try:
        inspect.signature(tools[name]).bind(**arguments)
    except TypeError as e:
        return f"error: {name}: {e}", True
    try:
        result = await _awaited(tools[name](**arguments))
        return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str), False
    except (Exception, SystemExit) as e:
        return f"error: {_text(e)}"[:500], True


def _reward(value: Any, of: str) -> float | None:
    reward = None if value is None else float(value)
    if reward is not None and not math.isfinite(reward):
        raise ValueError(f"{of} returned reward = {reward}; expected a finite number or None")
    if reward is not None and abs(reward) > LARGEST_REWARD:
        raise ValueError(f"{of} returned reward = {reward:g}; expected a number within {LARGEST_REWARD:g} or None")
    return reward


def _schema(schema: Any) -> dict[str, Any]:
    function = schema.get("function") if isinstance(schema, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise TypeError(
            f'tool_schemas returned {_start(schema)}; expected {{"type": "function", "function": {{"name": ...}}}}'
        )
    return dict(schema)


async def _awaited(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


def _messages(messages: Any, of: str) -> list[dict[str, Any]]:
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise TypeError(f"{of} returned messages = {_start(messages)}; expected a list of messages")
    size = 0
    for message in messages:
        good = isinstance(message, Mapping) and all(isinstance(message.get(k), str) for k in ("role", "content"))
        if not good:
            raise TypeError(f"{of} returned the message {_start(message)}; expected a text role and a text content")
        try:
            json.dumps(dict(message), ensure_ascii=False).encode()
            size += len(json.dumps(dict(message)))
        except (TypeError, ValueError, RecursionError) as e:  # not JSON, or lone surrogates
            raise TypeError(f"{of} returned a message that cannot be sent as JSON: {_text(e)}") from e
    if size > LARGEST_MESSAGES:
        raise ValueError(f"{of} returned messages of {size:,} bytes; expected at most {LARGEST_MESSAGES:,}")
    return [dict(message) for message in messages]


def _of_the_user(error: BaseException) -> str:
    """The last lines of the traceback; empty if no line of it is from the user's code."""
    ours = {__file__, asyncio.tasks.__file__, asyncio.futures.__file__}
    if all(frame.filename in ours for frame in traceback.extract_tb(error.__traceback__)):
        return ""
    return "".join(traceback.format_exception(error)[-3:])[-4000:]


def _text(error: BaseException) -> str:
    try:
        return _writable(f"{type(error).__name__}: {error}"[:2000])
    except Exception:
        return f"{type(error).__name__}: (its text cannot be read)"


def _writable(text: str) -> str:
    """The text with lone surrogates escaped: files and tokenizers do not accept them."""
    return text.encode(errors="backslashreplace").decode()


def _start(value: Any) -> str:
    return f"{value!r:.80} ({type(value).__name__})"
