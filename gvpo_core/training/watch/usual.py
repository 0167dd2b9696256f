"""The usual values in a run: the last values without outliers, and the statistics that alerts compare with."""

import math
from collections import deque

WINDOW = 5  # steps that are judged together
USUAL = 20  # earlier steps that define what is usual
NEW_NORMAL = 10  # outliers in a row after which they count as usual


class Usual:
    """The last values of a key without outliers. Many outliers in a row become the usual values."""

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=USUAL)
        self._outlier_values: list[float] = []
        self._flags: deque[bool] = deque(maxlen=WINDOW)
        self.outlier = math.nan  # the latest outlier

    def __len__(self) -> int:
        return len(self._values)

    def add(self, value: float, *, outlier: bool) -> None:
        """Adds a value. Values that are not finite are ignored."""
        self._flags.append(outlier and math.isfinite(value))
        if not math.isfinite(value):
            return
        if not outlier:
            self._outlier_values.clear()
            self._values.append(value)
            return
        self.outlier = value
        self._outlier_values.append(value)
        if len(self._outlier_values) >= NEW_NORMAL:
            self._values.clear()
            self._values.extend(self._outlier_values)
            self._outlier_values.clear()
            self._flags.clear()

    def pass_over(self) -> None:
        """Adds a step without a value."""
        self._flags.append(False)

    @property
    def ready(self) -> bool:
        """Whether there are enough values to compare with."""
        return len(self._values) >= WINDOW

    @property
    def outliers(self) -> int:
        """Number of outliers in a row, up to the latest value."""
        return len(self._outlier_values)

    @property
    def recent_outliers(self) -> int:
        """Number of outliers in the last WINDOW steps."""
        return sum(self._flags)

    @property
    def median(self) -> float:
        """Median of the usual values; 0 without any."""
        return median(list(self._values))

    @property
    def largest(self) -> float:
        """Largest of the usual values; 0 without any."""
        return max(self._values, default=0.0)

    @property
    def sigma(self) -> float:
        """Standard deviation estimated from the median absolute deviation, which a few outliers do not change."""
        middle = self.median
        return 1.4826 * median([abs(v - middle) for v in self._values])


def mean(values: list[float]) -> float:
    """The mean; NaN without values."""
    return math.fsum(values) / len(values) if values else math.nan


def median(values: list[float]) -> float:
    """The median; 0 without values."""
    if not values:
        return 0.0
    ordered, middle = sorted(values), len(values) // 2
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
