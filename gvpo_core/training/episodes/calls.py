"""Finds tool calls in a model's message, in the formats of Hermes (Qwen, SmolLM2) and Llama 3.

Hermes: one or more `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`; other text may stand around them.
Llama 3: the whole message is `{"name": ..., "parameters": {...}}`, optionally after `<|python_tag|>`.
"""

import json
import re
from typing import Any, NamedTuple

from gvpo_core.training.rewards.worker.encoding import encode

MOST_CALLS = 16  # per message; further calls are errors
_LONGEST = 65_536  # characters of one call
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


class Parsed(NamedTuple):
    """The calls of a message, and an error for each call that cannot be read."""

    calls: list[dict[str, Any]]  # {"name": str, "arguments": dict}
    errors: list[str]


def parse_calls(text: str) -> Parsed:
    """Returns the tool calls in a message; none if no part of it looks like a call."""
    calls: list[dict[str, Any]] = []
    errors: list[str] = []
    parts = text.split(_OPEN)[1:]
    for part in parts[:MOST_CALLS]:
        inside, closed, _ = part.partition(_CLOSE)
        if not closed:
            errors.append(f"a tool call has no {_CLOSE}")
        else:
            _read(inside, calls, errors)
    if len(parts) > MOST_CALLS:
        errors.append(f"{len(parts)} tool calls in a message; expected at most {MOST_CALLS}")
    tagged = text.strip().removeprefix("<|python_tag|>").strip()
    if not parts and (tagged != text.strip() or re.match(r'\{\s*"(name|type|function|parameters|arguments)"', tagged)):
        _read(tagged, calls, errors)
    return Parsed(calls, errors)


def _read(text: str, calls: list[dict[str, Any]], errors: list[str]) -> None:
    try:
        if len(text) > _LONGEST:
            raise ValueError(f"it has {len(text):,} characters; expected at most {_LONGEST:,}")
        call = json.loads(text)
        if isinstance(call, dict) and isinstance(call.get("function"), dict):
            call = call["function"]
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise ValueError('expected an object {"name": ..., "arguments": {...}}')
        arguments = call.get("arguments", call.get("parameters", {}))
        if not isinstance(arguments, dict):
            raise ValueError(f"its arguments are {arguments!r:.40}; expected an object")
        encode(arguments)
        calls.append({"name": call["name"], "arguments": arguments})
    except (ValueError, RecursionError) as e:
        errors.append(f"a tool call cannot be read: {e}"[:300])
