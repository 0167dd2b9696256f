"""The columns of a prompt's row as completions.jsonl shows them: short, JSON-safe, without secrets.

They are for people, who see what a reward compared a response with. Text stays text, numbers stay numbers,
lists and tables become their JSON, and images, arrays and bytes are described in a few words.
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
_ITEMS, _DEPTH = 20, 4  # of lists and tables
_LARGEST = 2**63  # a longer integer is described by its size


def with_columns(
    completions: Iterable[Mapping[str, Any]],
    columns: Sequence[Mapping[str, Any]],
    known: Collection[str],
    first: Collection[str] = (),
) -> Iterator[dict[str, Any]]:
    """Rows of completions.jsonl, each group's first one with the prompt's columns as "columns".

    Args:
      columns: by group, of its prompt's row.
      known: secrets to hide.
      first: columns that come before the others, as those that the rewards take by name.
    """
    seen = set()
    for completion in completions:
        group = completion["group"]
        short = {} if group in seen else _shortened(columns[group], known, first)
        seen.add(group)
        yield dict(completion) | ({"columns": short} if short else {})


def _shortened(columns: Mapping[str, Any], known: Collection[str], first: Collection[str]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    used = 0
    for name in sorted(columns, key=lambda name: name not in first):  # else in the data's order
        value = shown(columns[name], str(name), known)
        used += len(str(name)) + (len(value) if isinstance(value, str) else 20)
        if used > TOTAL:
            left = len(columns) - len(result)
            return result | {"...": f"{left} more column{'s' * (left > 1)}"}
        result[hide(str(name), known)[:_NAME]] = value
    return result


def shown(value: Any, name: str, known: Collection[str]) -> Any:
    """A value as text of at most TEXT characters, a number, a bool or None."""
    plain = _plain(value, name, known, 0)
    return _cut(json.dumps(plain, ensure_ascii=False)) if isinstance(plain, list | dict) else plain


def _text(text: str, known: Collection[str]) -> str:
    """Secrets are looked for before the text is cut; of a book only in its beginning, which is all that is kept."""
    return _cut(hide(text[: 20 * TEXT], known), len(text) - 20 * TEXT)


def _cut(text: str, more: int = 0) -> str:
    """At most TEXT characters, and how many are left out; `more` were left out before."""
    left_out = max(0, len(text) - TEXT) + max(0, more)
    return f"{text[:TEXT]} ... ({left_out:,} more characters)" if left_out else text


def _plain(value: Any, name: str, known: Collection[str], depth: int) -> Any:
    """A JSON value of bounded size."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return HIDDEN if is_secret(name) and value else _text(value, known)
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
        return _table(value, name, known, depth)
    if isinstance(value, list | tuple | set | frozenset):
        if depth == _DEPTH:
            return f"list of {len(value):,}"
        items = [_plain(v, name, known, depth + 1) for v, _ in zip(value, range(_ITEMS), strict=False)]
        return items + ([f"... {len(value) - _ITEMS:,} more"] if len(value) > _ITEMS else [])
    return _object(value, name, known, depth)


def _table(value: Mapping[Any, Any], name: str, known: Collection[str], depth: int) -> Any:
    if depth == _DEPTH:
        return f"table of {len(value):,}"
    if isinstance(value.get("bytes"), bytes) and set(value) <= {"bytes", "path"}:  # datasets' undecoded image or sound
        return f"file of {len(value['bytes']):,} bytes"
    items = zip(value.items(), range(_ITEMS), strict=False)
    result = {hide(str(k), known)[:_NAME]: _plain(v, str(k), known, depth + 1) for (k, v), _ in items}
    return result | ({"...": f"{len(value) - _ITEMS:,} more"} if len(value) > _ITEMS else {})


def _object(value: Any, name: str, known: Collection[str], depth: int) -> Any:
    """What is none of JSON's types. Nothing of it is called that could be long: no repr."""
    shape, size = getattr(value, "shape", None), getattr(value, "size", None)
    if shape == () and callable(getattr(value, "item", None)):
        item = value.item()
        return _plain(item, name, known, depth) if isinstance(item, bool | int | float | str) else type(item).__name__
    if isinstance(shape, tuple):
        dtype = str(getattr(value, "dtype", "")).rpartition(".")[2]
        if len(shape) == 1 and 0 < shape[0] <= _ITEMS and hasattr(value, "tolist"):
            return _plain(value.tolist(), name, known, depth)
        return f"array of {dtype or type(value).__name__}, {' x '.join(map(str, shape))}"
    if isinstance(size, tuple) and len(size) == 2 and hasattr(value, "mode"):  # PIL
        return f"image, {size[0]} x {size[1]}"
    return f"<{type(value).__name__}>"
