"""How long a run still takes, from what its last steps and its last evaluation took."""

import time
from collections import deque
from collections.abc import Sequence

_RECENT = 20  # steps whose mean is the next ones'


class TimeLeft:
    """Estimates the rest of a run from the durations of finished steps and evaluations."""

    def __init__(self, steps: int, evaluations: Sequence[int] = ()) -> None:
        """
        Args:
          steps: steps in the whole run.
          evaluations: steps after which the run evaluates.
        """
        self._steps, self._evaluations = steps, evaluations
        self._last, self._took = time.monotonic(), deque[float](maxlen=_RECENT)
        self._count = 0
        self._aside = self._evaluation = 0.0

    def evaluated(self, seconds: float) -> None:
        """An evaluation has ended, which took this long."""
        self._aside += seconds
        self._evaluation = seconds

    def stepped(self, step: int) -> float:
        """Step number `step` has ended: the seconds from here to the end of the run.

        The first step of a process compiles: it counts while it is alone.
        """
        now = time.monotonic()
        if self._count == 1:
            self._took.clear()
        self._took.append(now - self._last - self._aside)
        self._last, self._aside, self._count = now, 0.0, self._count + 1
        evaluations = sum(at >= step for at in self._evaluations)
        return (self._steps - step) * sum(self._took) / len(self._took) + evaluations * self._evaluation
