"""What every backend's optimizer step shares: the learning rate, and coefficients that are checked before use."""

import math

import numpy as np

from gvpo_core.training.config import OptimizerConfig
from gvpo_core.training.policy import Coefficients


def learning_rate(config: OptimizerConfig, step: int, updates: int) -> float:
    """Of update number `step` (from 0) out of `updates`: linear warm-up, then the schedule, 0 after the last."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.learning_rate
    progress = min(1.0, (step - config.warmup) / max(1, updates - config.warmup))
    if config.schedule == "linear":
        return config.learning_rate * (1.0 - progress)
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


def factors_of(coefficients: Coefficients, logprobs: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The coefficients of rows, checked.

    Raises: FloatingPointError: log-probs or coefficients that are not finite, with their rows.
      ValueError: a result of the wrong shape.
    """
    factors = np.asarray(coefficients(logprobs, rows), dtype=np.float64)  # before any check: here ranks meet
    if factors.shape != logprobs.shape:
        raise ValueError(f"coefficients returned shape {factors.shape}; expected {logprobs.shape}")
    check_finite("log-probabilities", logprobs, rows)
    check_finite("coefficients", factors, rows)
    return factors


def check_finite(name: str, values: np.ndarray, rows: np.ndarray) -> None:
    """Raises: FloatingPointError: how many values are not finite, and the row of the first."""
    bad = rows[~np.isfinite(values)]
    if len(bad):
        raise FloatingPointError(
            f"{name} of {len(bad)} of {len(rows)} responses are not finite, the first at batch row {bad[0]}: "
            "no step was taken"
        )
