"""Times of day as answers: 3 p.m., 3:00 PM, 15:00, noon. Imports nothing of gvpo."""

import re

_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_SPACE = re.compile(r"(?:\\[,;:! ]|~|\s)+")
_TIME = re.compile(
    r"(?<![\d:.])(?:(1[0-2]|0?[1-9])(?::([0-5]\d))?\s?([ap])\.?\s?m\b\.?|(2[0-3]|1\d|0?\d):([0-5]\d)(?![\d:])"
    r"(?!\s?[ap]\.?\s?m\b))|\b(noon|midnight)\b",
    re.IGNORECASE,
)


def gold_time(answer: str) -> int | None:
    """Minutes after midnight of an answer that is a time with its half of the day; None for any other answer.

    3:30 alone is none: it may be a ratio, a duration, or either half of the day.
    """
    text = _plain(answer)
    match = _TIME.fullmatch(text) or _TIME.fullmatch(text.rstrip("."))
    return _minutes(match) if match and not match[4] else None


def last_time(text: str) -> int | None:
    """Minutes after midnight of the last time of day in a text; None without one."""
    matches = list(_TIME.finditer(_plain(text)))
    return _minutes(matches[-1]) if matches else None


def _plain(text: str) -> str:
    text = _COMMAND.sub(r" \1 ", text).replace("{:}", ":").replace("$", "")
    return _SPACE.sub(" ", text).strip()


def _minutes(match: re.Match[str]) -> int:
    hour, minute, half, hour_of_day, minute_of_day, name = match.groups()
    if name:
        return 12 * 60 if name.casefold() == "noon" else 0
    if hour_of_day:
        return int(hour_of_day) * 60 + int(minute_of_day)
    return (int(hour) % 12 + (12 if half.casefold() == "p" else 0)) * 60 + int(minute or 0)
