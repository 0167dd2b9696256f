"""The process that one reward function runs in. Started as a script by `calls.py`; imports nothing of gvpo.

Requests and answers are JSON, each after its length in 8 bytes, on two pipes of their own, so that what a reward prints
stays out of them. The parent reads numbers and text alone: nothing that a reward returns is ever executed.
"""

import asyncio
import faulthandler
import importlib
import importlib.util
import inspect
import json
import os
import struct
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

BUILTIN_FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "builtin.py")
BUILTIN = ("exact_match", "regex_match", "math_verify")
GRACE = 5.0  # seconds that a worker outlives its time limit when nobody is left to kill it


def find_function(spec: str) -> Callable[..., Any]:
    """A built-in by name, or `package.module:function`, or `path/to/file.py:function`.

    Raises: LookupError: no such file, module or function, or its import failed, with the reason.
    """
    if spec in BUILTIN:
        spec = f"{BUILTIN_FILE}:{spec}"
    where, colon, attribute = spec.rpartition(":")
    if not colon or not where or not attribute:
        raise LookupError(f"expected one of {', '.join(BUILTIN)}, package.module:function or file.py:function")
    try:
        module = _from_file(where) if where.endswith(".py") else _from_name(where)
    except LookupError as e:
        if type(e) is LookupError:
            raise
        raise LookupError(f"importing {where} failed: {type(e).__name__}: {e}") from e
    except Exception as e:  # whatever the user's module raises on import
        raise LookupError(f"importing {where} failed: {type(e).__name__}: {e}") from e
    function = getattr(module, attribute, None)
    if not callable(function):
        raise LookupError(f"{where} has no function {attribute}")
    return function  # type: ignore[no-any-return]


def _from_file(path: str) -> Any:
    if not os.path.isfile(path):
        raise LookupError(f"there is no file {path}")
    found = importlib.util.spec_from_file_location(os.path.splitext(os.path.basename(path))[0], path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def _from_name(name: str) -> Any:
    if os.getcwd() not in sys.path:  # a console script does not have it, and users keep rewards beside the config
        sys.path.insert(0, os.getcwd())
    return importlib.import_module(name)


def accepted(function: Callable[..., Any], columns: Mapping[str, Any], options: Mapping[str, Any]) -> list[str]:
    """The columns that the function's signature names (all, with **kwargs), less those that options set."""
    parameters = inspect.signature(function).parameters
    return [c for c in columns if (_takes_all(function) or c in parameters) and c not in options]


def _takes_all(function: Callable[..., Any]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())


def call(function: Callable[..., Any], prompts: Any, completions: Any, columns: Mapping[str, Any], options: Any) -> Any:
    """The function's result for one batch, awaited where it is async."""
    chosen = {name: list(columns[name]) for name in accepted(function, columns, options)}
    value = function(prompts=list(prompts), completions=list(completions), **chosen, **options)
    return asyncio.run(_await(value)) if inspect.isawaitable(value) else value


async def _await(value: Any) -> Any:
    return await value


def plain(values: Any) -> Any:
    """A result as JSON: numbers and None as they are, anything else as {"text", "type"} for the error message."""
    if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__len__"):
        return _described(values)
    return [_number(v) for v in values]


def _number(value: Any) -> Any:
    if value is None:
        return None
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        return _described(value)


def _described(value: Any) -> dict[str, str]:
    return {"text": str(value)[:200], "type": type(value).__name__}


def read_message(descriptor: int) -> Any:
    """The next message. Raises: EOFError: the other end is gone."""
    (size,) = struct.unpack("<Q", _read(descriptor, 8))
    return json.loads(_read(descriptor, size))


def message_bytes(message: Any) -> bytes:
    """A message as it stands in a pipe."""
    body = json.dumps(message).encode()
    return struct.pack("<Q", len(body)) + body


def write_message(descriptor: int, message: Any) -> None:
    rest = memoryview(message_bytes(message))
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _read(descriptor: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(descriptor, min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _serve(requests: int, answers: int) -> None:
    setup = read_message(requests)
    sys.path[:] = setup["path"]
    if setup["memory"]:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (setup["memory"], setup["memory"]))
    try:
        function = find_function(setup["function"])
        getattr(function, "warm_up", lambda: None)()
        takes = None if _takes_all(function) else list(inspect.signature(function).parameters)
        write_message(answers, {"runs_code": bool(getattr(function, "runs_code", False)), "takes": takes})
    except (LookupError, ImportError) as e:
        write_message(answers, {"missing": str(e)})
        return
    silent = open(os.devnull, "w")  # noqa: SIM115 - stays open for the watchdog
    while True:
        try:
            request = read_message(requests)
        except EOFError:
            return
        # A thread in C: it ends this process past its limit even while the function holds the interpreter.
        faulthandler.dump_traceback_later(request["limit"] + GRACE, exit=True, file=silent)
        try:
            values = call(function, request["prompts"], request["completions"], request["columns"], setup["options"])
            answer = {"values": plain(values)}
        except BaseException as e:  # SystemExit too: a reward must not end the run
            last = traceback.format_exception(e)[-3:]
            answer = {"error": f"{type(e).__name__}: {e}"[:2000], "traceback": "".join(last)[-4000:]}
        faulthandler.cancel_dump_traceback_later()
        write_message(answers, answer)


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
