"""What is usual in a run: the last numbers that were no outliers, and the few statistics that alerts compare with."""

import math
from collections import deque

WINDOW = 5  # steps that are judged together
USUAL = 20  # steps before them that say what is usual
NEW_NORMAL = 10  # outliers in a row after which they are the usual


class Usual:
    """The last values of a key that were no outliers. Many outliers in a row become the usual."""

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=USUAL)
        self._strange: list[float] = []
        self._flags: deque[bool] = deque(maxlen=WINDOW)
        self.outlier = math.nan  # the latest

    def __len__(self) -> int:
        return len(self._values)

    def add(self, value: float, *, outlier: bool) -> None:
        """Takes in a value; one that is no finite number says nothing about what is usual."""
        self._flags.append(outlier and math.isfinite(value))
        if not math.isfinite(value):
            return
        if not outlier:
            self._strange.clear()
            self._values.append(value)
            return
        self.outlier = value
        self._strange.append(value)
        if len(self._strange) >= NEW_NORMAL:
            self._values.clear()
            self._values.extend(self._strange)
            self._strange.clear()
            self._flags.clear()

    def pass_over(self) -> None:
        """A step that says nothing."""
        self._flags.append(False)

    @property
    def ready(self) -> bool:
        """Whether there is enough to compare with."""
        return len(self._values) >= WINDOW

    @property
    def outliers(self) -> int:
        """Outliers in a row, up to now."""
        return len(self._strange)

    @property
    def recent_outliers(self) -> int:
        """Outliers in the last WINDOW steps."""
        return sum(self._flags)

    @property
    def median(self) -> float:
        """Of what is usual."""
        return median(list(self._values))

    @property
    def largest(self) -> float:
        """Of what is usual; 0 of none."""
        return max(self._values, default=0.0)

    @property
    def sigma(self) -> float:
        """Standard deviation by the median of the deviations, which a few strange values do not move."""
        middle = self.median
        return 1.4826 * median([abs(v - middle) for v in self._values])


def mean(values: list[float]) -> float:
    """NaN of none."""
    return math.fsum(values) / len(values) if values else math.nan


def median(values: list[float]) -> float:
    """0 of none."""
    if not values:
        return 0.0
    ordered, middle = sorted(values), len(values) // 2
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
