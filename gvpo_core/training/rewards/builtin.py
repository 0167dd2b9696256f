"""Rewards that come with gvpo: 1 for a right response, 0 for a wrong one, against a column of the data."""

import re
from collections.abc import Callable, Sequence
from typing import Any


def text_of(completion: Any) -> str:
    """The text of a completion, which is a string or a list of chat messages."""
    return completion if isinstance(completion, str) else "".join(m.get("content") or "" for m in completion)


def _answers(columns: dict[str, Any], column: str, n: int) -> Sequence[Any]:
    if column not in columns:
        known = ", ".join(sorted(set(columns) - {"prompts", "completion_ids"})) or "none"
        raise KeyError(f"the data has no column {column!r} (it has: {known}); set options.column")
    answers: Sequence[Any] = columns[column]
    return answers


def exact_match(completions: Sequence[Any], *, column: str = "answer", **columns: Any) -> list[float]:
    """1 where the response, white space at its ends aside, is the answer."""
    answers = _answers(columns, column, len(completions))
    return [float(text_of(c).strip() == str(a).strip()) for c, a in zip(completions, answers, strict=True)]


def regex_match(
    completions: Sequence[Any], *, pattern: str = r"-?\d+(?:\.\d+)?", column: str = "answer", **columns: Any
) -> list[float]:
    """1 where the last match of `pattern` in the response (its first group, where it has one) is the answer."""
    compiled = re.compile(pattern)
    answers = _answers(columns, column, len(completions))
    scores = []
    for completion, answer in zip(completions, answers, strict=True):
        found = [m.group(1) if compiled.groups else m.group() for m in compiled.finditer(text_of(completion))]
        scores.append(float(bool(found) and (found[-1] or "").strip() == str(answer).strip()))
    return scores


def math_verify(completions: Sequence[Any], *, column: str = "answer", **columns: Any) -> list[float]:
    """1 where math-verify finds the response's last expression equal to the answer."""
    parse, verify = _math_verify()
    answers = _answers(columns, column, len(completions))
    # Its own time limits use SIGALRM, which works in the main thread only; the caller's limit holds here.
    return [
        float(
            verify(
                parse(str(answer), parsing_timeout=None),
                parse(text_of(completion), parsing_timeout=None),
                timeout_seconds=None,
            )
        )
        for completion, answer in zip(completions, answers, strict=True)
    ]


def _math_verify() -> tuple[Any, Any]:
    try:
        from math_verify import parse, verify
    except ImportError as e:
        raise ImportError('the math_verify reward needs math-verify: pip install "gvpo[rewards]"') from e
    return parse, verify


math_verify.warm_up = _math_verify  # type: ignore[attr-defined]  # seconds of imports, before any time limit runs


BUILTIN: dict[str, Callable[..., Any]] = {
    "exact_match": exact_match,
    "regex_match": regex_match,
    "math_verify": math_verify,
}
