"""What a step's record says of the run: a level, and the alerts that it comes from."""

from collections.abc import Iterable
from typing import NamedTuple

OK, WATCH, BAD = LEVELS = ("OK", "WATCH", "BAD")


class Alert(NamedTuple):
    """One thing wrong, in words."""

    key: str
    level: str  # WATCH or BAD
    seen: str  # with the numbers
    advice: str


class Verdict(NamedTuple):
    """What a step's record says of the run."""

    level: str  # the worst of the reasons'; OK without one
    reasons: tuple[Alert, ...]


def verdict_of(reasons: Iterable[Alert]) -> Verdict:
    """The verdict that these reasons make, worst first."""
    ordered = tuple(sorted(reasons, key=lambda a: -LEVELS.index(a.level)))
    return Verdict(ordered[0].level if ordered else OK, ordered)
