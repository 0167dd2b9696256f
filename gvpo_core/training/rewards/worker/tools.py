"""Makes the tool schema of a Python function, in OpenAI's format, from its signature and docstring."""

import inspect
import re
import types
import typing
from collections.abc import Callable
from typing import Any

_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}


def schema_of(function: Callable[..., Any], *, method: bool = False) -> dict[str, Any]:
    """The function's schema.

    Args:
      method: whether the first parameter is the object, which is left out.
    Raises: ValueError: no docstring, a parameter without a type, or a type that JSON does not have.
    """
    name = getattr(function, "__name__", type(function).__name__)
    text = inspect.getdoc(function)
    if not text:
        raise ValueError(f"the tool {name} has no docstring, from which the model learns what it does")
    try:
        hints = typing.get_type_hints(function)
    except Exception as e:
        raise ValueError(f"the types of the tool {name} cannot be read: {e}") from e
    parameters = list(inspect.signature(function).parameters.values())[1 if method else 0 :]
    described, properties, required = _described(text), {}, []
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise ValueError(f"the tool {name} has the parameter {parameter}; expected parameters with names")
        if parameter.name not in hints:
            raise ValueError(f"the parameter {parameter.name} of the tool {name} has no type; add one, as in x: int")
        kind = _json_type(hints[parameter.name], f"the parameter {parameter.name} of the tool {name}")
        description = {"description": described[parameter.name]} if parameter.name in described else {}
        properties[parameter.name] = kind | description
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": text.split("\n\n")[0].replace("\n", " ").strip(),
            "parameters": {"type": "object", "properties": properties, "required": required},
        },
    }


def _json_type(hint: Any, subject: str) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}
    if origin is typing.Literal:
        return {"enum": list(arguments)} | ({"type": "string"} if all(isinstance(a, str) for a in arguments) else {})
    if origin in (typing.Union, types.UnionType):
        chosen = [a for a in arguments if a is not type(None)]
        kinds = [_json_type(a, subject) for a in chosen]
        return kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
    kind = _TYPES.get(origin or hint)
    if kind is None:
        raise ValueError(
            f"{subject} has the type {hint}; expected one that JSON has: str, int, float, bool, list, dict"
        )
    items = {"items": _json_type(arguments[0], subject)} if kind == "array" and arguments else {}
    return {"type": kind} | items


def _described(text: str) -> dict[str, str]:
    """Parameter -> its description in the section "Args:"."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", text, re.MULTILINE)
    descriptions = {}
    for line in section.group(1).splitlines() if section else ():
        if match := re.match(r"\s+(\w+)(?:\s*\([^)]*\))?:\s*(.+)", line):
            descriptions[match.group(1)] = match.group(2).strip()
    return descriptions
