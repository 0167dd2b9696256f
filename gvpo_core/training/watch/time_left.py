"""Estimates the time until the end of a run from its last steps and its last evaluation."""

import time
from collections import deque
from collections.abc import Sequence

_RECENT = 20  # steps whose mean time is the estimate for the next ones


class TimeLeft:
    """Estimates the remaining time of a run from the durations of finished steps and evaluations."""

    def __init__(self, steps: int, evaluations: Sequence[int] = ()) -> None:
        """
        Args:
          steps: steps in the whole run.
          evaluations: steps after which the run evaluates.
        """
        self._steps, self._evaluations = steps, evaluations
        self._last, self._step_seconds = time.monotonic(), deque[float](maxlen=_RECENT)
        self._count = 0
        self._evaluation_seconds = self._last_evaluation_seconds = 0.0

    def evaluated(self, seconds: float) -> None:
        """Records the duration of an evaluation that has ended."""
        self._evaluation_seconds += seconds
        self._last_evaluation_seconds = seconds

    def stepped(self, step: int) -> float:
        """Records that step `step` has ended; returns the estimated seconds to the end of the run.

        The first step of a process includes compilation: it counts only until the second step has ended.
        """
        now = time.monotonic()
        if self._count == 1:
            self._step_seconds.clear()
        self._step_seconds.append(now - self._last - self._evaluation_seconds)
        self._last, self._evaluation_seconds, self._count = now, 0.0, self._count + 1
        evaluations = sum(at >= step for at in self._evaluations)
        return (self._steps - step) * sum(self._step_seconds) / len(
            self._step_seconds
        ) + evaluations * self._last_evaluation_seconds
