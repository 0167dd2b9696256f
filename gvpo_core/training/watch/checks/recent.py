"""The first and the last steps of a run, and the statistics that the checks compare."""

import math
from collections import deque
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from gvpo_core.training.watch.usual import USUAL, WINDOW, mean

Record = Mapping[str, Any]

START = 10  # first steps, which define the start of the run
_TOTALS = ("reward/mean", "reward/half_width", "reward/spread", "reward/min", "reward/max", "reward/trend")
_MAY_BE_NULL = ("reward/", "policy/", "reward_seconds/")  # a reward without scores has no mean


class Recent:
    """The data about the run that the checks use after each step."""

    def __init__(self) -> None:
        self.last: deque[Record] = deque(maxlen=WINDOW)
        self.bad: deque[list[str]] = deque(maxlen=WINDOW)  # keys without a finite number
        self.failing: deque[list[str]] = deque(maxlen=WINDOW)  # keys of rewards that failed
        self.count = 0
        self.rewards: deque[float] = deque(maxlen=100)  # mean rewards
        self.start: dict[str, list[float]] = {}  # key -> values of the first START steps
        self.best = -math.inf  # highest mean reward over USUAL steps
        self.range = (math.inf, -math.inf)  # of all rewards

    def add(self, record: Record) -> None:
        """Adds the next step."""
        self.last.append(record)
        self.bad.append([k for k, v in record.items() if not _finite(v) and _is_number_key(k)])
        self.failing.append([k for k, v in record.items() if v and k.startswith("reward_errors/")])
        self.count += 1
        reward = number(record, "reward/mean")
        if math.isfinite(reward):
            self.rewards.append(reward)
            if len(self.rewards) >= USUAL:
                self.best = max(self.best, mean(list(self.rewards)[-USUAL:]))
            low, high = number(record, "reward/min"), number(record, "reward/max")
            self.range = min(self.range[0], low, reward), max(self.range[1], high, reward)
        for key in ("reward/mean", "entropy", "kl", "length/mean", "truncated", "episodes/tokens", "sampler/gap"):
            values = self.start.setdefault(key, [])
            if len(values) < START and math.isfinite(number(record, key)):
                values.append(number(record, key))

    def now(self, key: str) -> float:
        """The value in the last step; NaN if it has none."""
        return number(self.last[-1], key)

    def sum(self, key: str) -> float:
        """The sum over the last WINDOW steps."""
        return sum(v for r in self.last if math.isfinite(v := number(r, key)))

    def noise(self) -> float:
        """Standard deviation of a step's mean reward, from changes between adjacent steps; a trend has no effect."""
        values = list(self.rewards)
        changes = [b - a for a, b in pairwise(values)]
        return math.sqrt(sum(c * c for c in changes) / (2 * len(changes))) if changes else math.inf

    def rising(self) -> bool:
        """Whether the reward of the last steps is above that of the steps before by more than noise."""
        values = list(self.rewards)
        before = values[-USUAL - WINDOW : -WINDOW]
        return bool(before) and mean(values[-WINDOW:]) - mean(before) > self.noise()

    def above_start(self) -> bool:
        """Whether the reward has risen since the first steps. The error of their mean is a third of the noise."""
        values = list(self.rewards)[-50:]
        return bool(values) and mean(values) - mean(self.start["reward/mean"]) > 0.4 * self.noise()


def number(record: Record, key: str) -> float:
    """A value of a record; NaN if it is null or missing."""
    value = record.get(key)
    return math.nan if value is None else float(value)


def _is_number_key(key: str) -> bool:
    return key in _TOTALS or not key.startswith(_MAY_BE_NULL)


def _finite(value: Any) -> bool:
    return value is not None and (not isinstance(value, float) or math.isfinite(value))
