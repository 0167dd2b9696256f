"""How a response ended, in the words of the console and the report."""

from collections.abc import Mapping
from typing import Any

ENDS = {
    "done": "ended",
    "turns": "cut at the turn limit",
    "tokens": "cut at the token limit",
    "failed": "environment failed",
}
"""The ends of an episode, by their names in completions.jsonl."""


def ending(row: Mapping[str, Any]) -> str:
    """How a row of completions.jsonl ended, in words; empty for a response outside an episode that was not cut."""
    end = row.get("end")
    if end is None:
        return "" if row.get("finished", True) else "cut"
    turns = row.get("turns")
    after = f" after {turns} turn{'s' * (turns != 1)}" if isinstance(turns, int) else ""
    return f"{ENDS.get(str(end), str(end))}{after}"
