"""What a run was trained on, small enough to keep: a later start can tell whether it is given the same rows."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from typing import Any


def fingerprint(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many rows, and the SHA-256 of their values in order: the same for a file and for its rows given in Python.

    Columns may come in any order. Of a value that is neither JSON, an array, bytes, a date nor a decimal number only
    the type counts.
    """
    digest = hashlib.sha256()
    for row in rows:
        columns = dict(sorted(row.items(), key=lambda item: str(item[0])))
        digest.update(json.dumps(columns, skipkeys=True, default=_plain).encode() + b"\n")
    return {"rows": len(rows), "sha256": digest.hexdigest()}


def _plain(value: Any) -> Any:
    """Nothing that differs between two processes, as an object's address does."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, bytes | date | time | Decimal):
        return str(value)
    return type(value).__qualname__
