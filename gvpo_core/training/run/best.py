"""The best evaluation of a run so far. It decides which checkpoint is kept and when a run stops early."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gvpo_core.training.files.records import records
from gvpo_core.training.policy import Policy


class Best:
    """The evaluation with the highest held-out reward, or without rewards the lowest loss or KL. The first if equal."""

    def __init__(self) -> None:
        self.step = -1  # -1: no evaluation yet
        self.reward = -math.inf
        self.since = 0  # evaluations after the best one
        self._lowest: str | None = None  # metric by which the newest evaluation was compared, if not its reward

    def see(self, step: int, metrics: Mapping[str, Any]) -> bool:
        """Adds the evaluation after `step`; returns whether it is the best so far."""
        reward, self._lowest = _reward(metrics), _lowest(metrics)
        if reward > self.reward:
            self.step, self.reward, self.since = step, reward, 0
            return True
        self.since += 1
        return False

    def describe(self) -> str:
        """Describes, in words, what would have been a better evaluation."""
        if self._lowest:
            name = {"eval/loss": "loss", "eval/teacher_kl": "KL to the teacher"}[self._lowest]
            return f"a held-out {name} below the {-self.reward:.4g} of step {self.step}"
        return f"a held-out reward above the {self.reward:.4g} of step {self.step}"

    def share(self, policy: Policy) -> None:
        """Copies the main rank's state to all ranks. Every rank must call this method."""
        state = np.asarray([self.step, self.reward, self.since], np.float64) if policy.rank == 0 else np.zeros(0)
        shared = policy.gather(np.frombuffer(state.tobytes(), np.uint8)).tobytes()  # bytes: no rank rounds them
        step, self.reward, since = np.frombuffer(shared, np.float64).tolist()
        self.step, self.since = int(step), int(since)


def best_saved(metrics: Path, steps: Collection[int]) -> int | None:
    """The step among `steps` with the best evaluation; None if none of them has an evaluation."""
    best = Best()
    for record in records(metrics, metrics=True):
        if record["kind"] == "eval" and record["step"] in steps and math.isfinite(_reward(record)):
            best.see(record["step"], record)
    return best.step if best.step >= 0 else None


def _lowest(metrics: Mapping[str, Any]) -> str | None:
    """The metric to minimize if the evaluation has no reward; else None."""
    if "eval/reward" in metrics:
        return None
    return next((key for key in ("eval/loss", "eval/teacher_kl") if key in metrics), None)


def _reward(metrics: Mapping[str, Any]) -> float:
    """The held-out reward; without a reward, minus the held-out loss or KL."""
    lowest = _lowest(metrics)
    value, sign = metrics.get(lowest or "eval/reward"), -1.0 if lowest else 1.0
    return sign * float(value) if isinstance(value, int | float) and not math.isnan(value) else -math.inf
