"""The verdict on a run after a step: a level, and the alerts that cause it."""

from collections.abc import Iterable
from typing import NamedTuple

OK, WATCH, BAD = LEVELS = ("OK", "WATCH", "BAD")


class Alert(NamedTuple):
    """One problem, in words."""

    key: str
    level: str  # WATCH or BAD
    seen: str  # what is wrong, with numbers
    advice: str


class Verdict(NamedTuple):
    """The verdict on a run after a step."""

    level: str  # the worst level of the reasons; OK without reasons
    reasons: tuple[Alert, ...]


def verdict_of(reasons: Iterable[Alert]) -> Verdict:
    """The verdict of these reasons, sorted with the worst first."""
    ordered = tuple(sorted(reasons, key=lambda a: -LEVELS.index(a.level)))
    return Verdict(ordered[0].level if ordered else OK, ordered)
