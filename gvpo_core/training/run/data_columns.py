"""The data columns of a prompt in completions.jsonl: short values for people, JSON-safe and without secrets.

They show what a reward compared a response with. Text and numbers are unchanged, lists and tables become JSON text, and
images, arrays and bytes are described in a few words.
"""

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from typing import Any

from gvpo_core.training.config.secrets import HIDDEN, hide, is_secret

TEXT = 400  # characters of a value
TOTAL = 2000  # characters of all values of a prompt
_NAME = 60  # characters of a column's name
_ITEMS, _DEPTH = 20, 4  # limits of lists and tables
_LARGEST = 2**63  # a longer integer is described by its size


def with_columns(
    completions: Iterable[Mapping[str, Any]],
    columns: Sequence[Mapping[str, Any]],
    secrets: Collection[str],
    first: Collection[str] = (),
) -> Iterator[dict[str, Any]]:
    """Yields rows of completions.jsonl. The first row of each group has the prompt's data columns under "columns".

    Args:
      columns: the row of each group's prompt, by group.
      secrets: secrets to hide.
      first: columns to put first, such as those that the rewards take by name.
    """
    seen = set()
    for completion in completions:
        group = completion["group"]
        short = {} if group in seen else _shortened(columns[group], secrets, first)
        seen.add(group)
        yield dict(completion) | ({"columns": short} if short else {})


def _shortened(columns: Mapping[str, Any], secrets: Collection[str], first: Collection[str]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    used = 0
    for name in sorted(columns, key=lambda name: name not in first):  # otherwise in the order of the data
        value = shown(columns[name], str(name), secrets)
        used += len(str(name)) + (len(value) if isinstance(value, str) else 20)
        if used > TOTAL:
            omitted = len(columns) - len(result)
            return result | {"...": f"{omitted} more column{'s' * (omitted > 1)}"}
        result[hide(str(name), secrets)[:_NAME]] = value
    return result


def shown(value: Any, name: str, secrets: Collection[str]) -> Any:
    """A value as text of at most TEXT characters, a number, a bool or None."""
    plain = _plain(value, name, secrets, 0)
    return _cut(json.dumps(plain, ensure_ascii=False)) if isinstance(plain, list | dict) else plain


def _text(text: str, secrets: Collection[str]) -> str:
    """Hides secrets, then cuts the text. Only the first 20 * TEXT characters are searched; the rest is dropped."""
    return _cut(hide(text[: 20 * TEXT], secrets), len(text) - 20 * TEXT)


def _cut(text: str, more: int = 0) -> str:
    """At most TEXT characters, and the number of characters left out.

    Args:
      more: characters that were left out before.
    """
    left_out = max(0, len(text) - TEXT) + max(0, more)
    return f"{text[:TEXT]} ... ({left_out:,} more characters)" if left_out else text


def _plain(value: Any, name: str, secrets: Collection[str], depth: int) -> Any:
    """A JSON value of bounded size."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return HIDDEN if is_secret(name) and value else _text(value, secrets)
    if isinstance(value, int):
        value = int(value)
        return value if abs(value) < _LARGEST else f"integer of {value.bit_length()} bits"
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if isinstance(value, date | time | Decimal):
        return str(value)[:TEXT]
    if isinstance(value, bytes | bytearray | memoryview):
        return f"{len(value):,} bytes"
    if isinstance(value, Mapping):
        return _table(value, name, secrets, depth)
    if isinstance(value, list | tuple | set | frozenset):
        if depth == _DEPTH:
            return f"list of {len(value):,}"
        items = [_plain(v, name, secrets, depth + 1) for v, _ in zip(value, range(_ITEMS), strict=False)]
        return items + ([f"... {len(value) - _ITEMS:,} more"] if len(value) > _ITEMS else [])
    return _object(value, name, secrets, depth)


def _table(value: Mapping[Any, Any], name: str, secrets: Collection[str], depth: int) -> Any:
    if depth == _DEPTH:
        return f"table of {len(value):,}"
    if isinstance(value.get("bytes"), bytes) and set(value) <= {"bytes", "path"}:  # datasets' undecoded image or sound
        return f"file of {len(value['bytes']):,} bytes"
    items = zip(value.items(), range(_ITEMS), strict=False)
    result = {hide(str(k), secrets)[:_NAME]: _plain(v, str(k), secrets, depth + 1) for (k, v), _ in items}
    return result | ({"...": f"{len(value) - _ITEMS:,} more"} if len(value) > _ITEMS else {})


def _object(value: Any, name: str, secrets: Collection[str], depth: int) -> Any:
    """Describes a value that is not of a JSON type. Does not call repr, which may be slow or long."""
    shape, size = getattr(value, "shape", None), getattr(value, "size", None)
    if shape == () and callable(getattr(value, "item", None)):
        item = value.item()
        return _plain(item, name, secrets, depth) if isinstance(item, bool | int | float | str) else type(item).__name__
    if isinstance(shape, tuple):
        dtype = str(getattr(value, "dtype", "")).rpartition(".")[2]
        if len(shape) == 1 and 0 < shape[0] <= _ITEMS and hasattr(value, "tolist"):
            return _plain(value.tolist(), name, secrets, depth)
        return f"array of {dtype or type(value).__name__}, {' x '.join(map(str, shape))}"
    if isinstance(size, tuple) and len(size) == 2 and hasattr(value, "mode"):  # PIL
        return f"image, {size[0]} x {size[1]}"
    return f"<{type(value).__name__}>"
