"""Numbers and text for a terminal: short, within a number of columns, and without control characters."""

import math
import re
import unicodedata
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

LEFT = 5  # columns of the time left, a duration


class Command(str):
    """A command for the user to copy. It is printed on one line, however long it is."""


def fit(value: float | None, width: int) -> str:
    """A number in at most `width` characters; "-" for None, NaN and infinities.

    Has three significant digits if they fit, and from 0.01 up at most three decimals, so that columns align. Integers
    are written in full if they fit. Only if needed, 0.5 becomes .5 and 12345 becomes 12k. "0" means exactly 0. A
    number too small for any form is ~0, with its sign; one too large is written as asterisks.
    """
    if value is None or not math.isfinite(value):
        return "-"
    if isinstance(value, int) and len(str(value)) <= width:
        return str(value)
    if value == 0:
        return "0"
    for digits in (3, 2, 1):
        places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        if abs(value) >= 0.01:
            places = min(places, 3)
        text = f"{value:.{places}f}"
        for form in (text, text.replace("0.", ".", 1)) if abs(value) < 1 else (text,):
            if len(form) <= width:
                return form
    for unit, name in ((1e3, "k"), (1e6, "M")):
        for places in (1, 0):
            text = f"{value / unit:.{places}f}{name}"
            if len(text) <= width and abs(value) >= unit:
                return text
    for digits in (2, 1, 0):
        text = re.sub(r"e([+-])0*(\d)", lambda m: "e" + m[1].strip("+") + m[2], f"{value:.{digits}e}")
        if len(text) <= width:
            return text
    text = f"{value:.{max(0, width - 1 - (value < 0))}f}".replace("0.", ".", 1)  # one significant digit
    if len(text) <= width and re.search("[1-9]", text):
        return text
    return "*" * width if abs(value) >= 1 else "-~0" if value < 0 and width > 2 else "~0"


def interval(value: float | None, half: float | None) -> str:
    """A number and the half-width of its interval, both rounded to the third digit of the larger one.

    Without a half-width, only the number. From 0.01 up at most three decimals, like `fit`.
    """
    if value is None or half is None or not (math.isfinite(value) and math.isfinite(half)):
        return fit(value, 8)
    largest = max(abs(value), abs(half))
    if largest and not 1e-4 <= largest < 1e6:
        return f"{fit(value, 8)} +- {fit(half, 8)}"
    places = max(0, 2 - math.floor(math.log10(largest))) if largest else 0
    places = min(places, 3) if largest >= 0.01 else places
    return f"{value:.{places}f} +- {half:.{places}f}"


def duration(seconds: float) -> str:
    """Seconds in at most five characters: 42s, 9m40s, 3h05m, 2d04h."""
    rounded = round(seconds)
    for big, big_name, small, small_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if rounded >= big:
            text = f"{rounded // big}{big_name}{rounded % big // small:02d}{small_name}"
            return text if len(text) <= LEFT else f"{rounded // big}{big_name}"
    return f"{rounded}s"


_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\u3164\ufeff\uffa0\ufff9-\ufffb\ud800-\udfff\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e007f]"
)


def printable(text: str, *, keep: str = "") -> str:
    r"""Text with every control, direction-changing and invisible character written as an escape like \x1b.

    Args:
      keep: characters left unchanged, such as a newline.
    """

    def escape(match: re.Match[str]) -> str:
        char = match[0]
        if char in keep:
            return char
        short = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
        return short.get(char) or (f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}")

    return _HIDDEN.sub(escape, text)


_EMOJI = "\ufe0f"  # the character before it is drawn as an emoji: two columns
_MARKS = 4  # combining marks on one character that take no column; further ones do, so that line length is bounded


def columns(text: str) -> int:
    """Terminal columns that printable text takes: two for a wide character, none for a combining one."""
    return sum(_widths(text)) if not text.isascii() else len(text)


def _widths(text: str) -> Iterator[int]:
    marks = 0
    for char, after in pairwise(text + " "):
        width = _columns(char)
        marks = 0 if width else marks + 1
        yield 2 if width and after == _EMOJI else width or int(marks > _MARKS)


def _columns(char: str) -> int:
    if unicodedata.category(char) in ("Mn", "Me"):
        return 0
    if "\u1160" <= char <= "\u11ff" or "\ud7b0" <= char <= "\ud7ff":
        return 0  # later parts of decomposed Korean syllables, as in file names of macOS
    if "\U0001f1e6" <= char <= "\U0001f1ff":
        return 1  # two of them make a flag; wide since Unicode 16
    return 2 if unicodedata.east_asian_width(char) in ("W", "F") else 1


def pieces(line: str, room: int) -> list[str]:
    """A line of printable text cut into at least one piece; each has at most `room` columns."""
    lines, start, used = [], 0, 0
    for i, width in enumerate(_widths(line)):
        if used + width > room:
            lines.append(line[start:i])
            start, used = i, 0
        used += width
    return [*lines, line[start:]]


def wrapped(text: str, width: int, indent: str = "") -> list[str]:
    """Printable text as lines of at most `width` columns, cut at spaces; all but the first begin with `indent`.

    A longer word, such as a path, is not cut.
    """
    lines, line = [], ""
    for spaces, word in re.findall("( *)([^ ]+)", text):
        if line.strip() and columns(line + spaces + word) > width:
            lines.append(line)
            line = indent + word
        else:
            line += spaces + word
    return [*lines, line]


def percent(share: float | None, unit: str = "") -> str:
    """A share in percent. 0 and 100 mean exactly none and all; other values never round to them."""
    if share is None or not math.isfinite(share):
        return "-"
    percent = round(100 * share)
    nearly = {0: "~0", 100: "99"}.get(percent, "") if 0 < share < 1 else ""
    return f"{nearly or percent}{unit}"


def fact(value: Any, name: str = "") -> str:
    """A value as text for people.

    Args:
      name: name of the fact; a number whose name contains "memory" is a size in bytes.
    """
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int | float) and "memory" in name:
        return size(value)
    if isinstance(value, float):
        return fit(value, 8)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{printable(str(key))} {fact(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(fact(item) for item in value)
    return printable(str(value))


def size(count: float) -> str:
    """Bytes in MiB or GiB."""
    unit, name = (2**30, "GiB") if count >= 2**30 else (2**20, "MiB")
    return f"{fit(count / unit, 5)} {name}"
