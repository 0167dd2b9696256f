"""Built-in rewards that compare a response with one column of the data: 1 for a right response, 0 for a wrong one.

A row with a missing answer (None or NaN) is not scored: its reward is None.
"""

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from .math_answers import judge, library

_NUMBER = re.compile(
    r"[+\-\u2212\u2013]?(?:(?:[1-9]\d{0,2}(?:,\d{3})+|0|[1-9]\d*)(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,3})?"
)
_AS_ASCII = str.maketrans({"\u2212": "-", "\u2013": "-", ",": None})
_SIGN = r"(?:(?<!\d)[-\u2212\u2013])?"  # not after a digit, where it is a difference or a range: 3-5
_LAST_NUMBER = rf"{_SIGN}(?:(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?"


def text_of(completion: Any) -> str:
    """The text of a completion, which may be a string or a list of chat messages."""
    return completion if isinstance(completion, str) else "".join(m.get("content") or "" for m in completion)


def number_in(text: str) -> Decimal | None:
    """The number that the whole text is, such as 5, 5.0, -1,234.5, 1e-3; None for other texts and digits like 007."""
    text = text.strip()
    return Decimal(text.translate(_AS_ASCII)) if _NUMBER.fullmatch(text) else None


def compiled(pattern: Any) -> re.Pattern[str]:
    """Compiles options.pattern. Raises: LookupError: it is not a regular expression."""
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as e:
        raise LookupError(f"options.pattern = {pattern!r} is not a regular expression: {e}") from e


def _same(text: str, answer: str) -> bool:
    """Whether two texts are equal without white space at their ends, or equal as numbers if both are numbers."""
    if text.strip() == answer.strip():
        return True
    number, expected = number_in(text), number_in(answer)
    return number is not None and number == expected


def _texts(columns: dict[str, Any], column: str, n: int) -> list[str | None]:
    """The answers as text; None for a missing answer.

    Raises: KeyError: the data has no such column. ValueError: the column has another number of answers.
    """
    if column not in columns:
        available = ", ".join(sorted(set(columns) - {"prompts", "completion_ids"})) or "none"
        raise KeyError(f"the data has no column {column!r} (it has: {available}); set options.column")
    answers: Sequence[Any] = columns[column]
    if len(answers) != n:
        raise ValueError(f"column {column!r} has {len(answers)} answers for {n} responses")
    return [_text(answer) for answer in answers]


def _text(answer: Any) -> str | None:
    if answer is None or (isinstance(answer, float | Decimal) and answer != answer):
        return None
    return str(answer)


def exact_match(completions: Sequence[Any], *, column: str = "answer", **columns: Any) -> list[float | None]:
    """1 if the response is the answer, apart from white space at its ends. Numbers are compared as numbers."""
    answers = _texts(columns, column, len(completions))
    return [
        None if answer is None else float(_same(text_of(c), answer))
        for c, answer in zip(completions, answers, strict=True)
    ]


def regex_match(
    completions: Sequence[Any], *, pattern: str = _LAST_NUMBER, column: str = "answer", **columns: Any
) -> list[float | None]:
    """1 if the last match of `pattern` in the response (its first group, if it has one) is the answer.

    Numbers are compared as numbers. Default pattern: a number.
    """
    expression = compiled(pattern)
    answers = _texts(columns, column, len(completions))
    scores: list[float | None] = []
    for completion, answer in zip(completions, answers, strict=True):
        matches = [m.group(1) if expression.groups else m.group() for m in expression.finditer(text_of(completion))]
        scores.append(None if answer is None else float(bool(matches) and _same(matches[-1] or "", answer)))
    return scores


def math_verify(completions: Sequence[Any], *, column: str = "answer", **columns: Any) -> list[float | None]:
    """1 if the response's final answer equals the answer by math-verify. The answer may be LaTeX without delimiters.

    None if the answer cannot be read: the row is not scored.
    """
    answers = _texts(columns, column, len(completions))
    for answer in columns[column]:
        if isinstance(answer, list | tuple | dict | set | bytes):
            kind = type(answer).__name__
            raise TypeError(f"column {column!r} holds a {kind} ({answer!r:.60}); expected text or a number")
    return [
        None if answer is None else judge(text_of(completion), answer)
        for completion, answer in zip(completions, answers, strict=True)
    ]


# The option that names the column to compare with. Only this column is passed to the function.
exact_match.answer_option = "column"  # type: ignore[attr-defined]
regex_match.answer_option = "column"  # type: ignore[attr-defined]
math_verify.answer_option = "column"  # type: ignore[attr-defined]
math_verify.warm_up = library  # type: ignore[attr-defined]  # seconds of imports, before any time limit runs
regex_match.warm_up = lambda options: compiled(options.get("pattern", _LAST_NUMBER))  # type: ignore[attr-defined]
