"""Reads times of day and dates in answers: 3 p.m., 15:00, noon; May 5, 2020, 2020-05-05. Imports nothing of gvpo."""

import re

_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_SPACE = re.compile(r"(?:\\[,;:! ]|~|\s)+")
_TIME = re.compile(
    r"(?<![\d:.])(?:(1[0-2]|0?[1-9])(?::([0-5]\d))?\s?([ap])\.?\s?m\b\.?|(2[0-3]|1\d|0?\d):([0-5]\d)(?![\d:])"
    r"(?!\s?[ap]\.?\s?m\b))|\b(noon|midnight)\b",
    re.IGNORECASE,
)

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTH = (
    r"(jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
    r"|nov(?:ember)?|dec(?:ember)?)\.?"
)
_DAY = r"(\d{1,2})(?:st|nd|rd|th)?"
_DATE = re.compile(
    r"(?<![\d\-/])(\d{4})([\-/])(\d{1,2})\2(\d{1,2})(?![\d\-/])"
    rf"|\b{_MONTH} {_DAY},? (\d{{4}})\b|\b{_DAY}(?: of)? {_MONTH},? (\d{{4}})\b",
    re.IGNORECASE,
)


def gold_date(answer: str) -> tuple[int, int, int] | None:
    """Year, month and day of an answer that is a date; None for any other answer."""
    match = _DATE.fullmatch(_plain(answer).rstrip("."))
    return _day(match) if match else None


def last_date(text: str) -> tuple[int, int, int] | None:
    """Year, month and day of the last date in a text; None without one."""
    matches = list(_DATE.finditer(_plain(text)))
    return _day(matches[-1]) if matches else None


def _day(match: re.Match[str]) -> tuple[int, int, int]:
    year, _, month, day, month_name, day_after, year_after, day_before, month_after, last_year = match.groups()
    if year:
        return int(year), int(month), int(day)
    number = _MONTHS.index((month_name or month_after)[:3].casefold()) + 1
    return int(year_after or last_year), number, int(day_after or day_before)


def gold_time(answer: str) -> int | None:
    """Minutes after midnight of an answer that is a time with a.m. or p.m., noon or midnight; None for other answers.

    3:30 alone gives None: it may be a ratio, a duration, or either half of the day.
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
