"""The learning rate of every step, by hand, and coefficients that are checked before use."""

import numpy as np
import pytest

from gvpo_core.training.config import OptimizerConfig
from gvpo_core.training.policy.step import factors_of, learning_rate

pytestmark = pytest.mark.core


def test_schedules() -> None:
    def rates(**settings) -> list[float]:
        config = OptimizerConfig(learning_rate=8.0, **settings)
        return [learning_rate(config, step, 6) for step in range(6)]

    assert rates() == [8.0] * 6
    assert rates(warmup=4) == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0]
    assert rates(warmup=2, schedule="linear") == [4.0, 8.0, 8.0, 6.0, 4.0, 2.0]
    assert rates(schedule="cosine")[3] == pytest.approx(4.0)
    assert learning_rate(OptimizerConfig(schedule="cosine"), 6, 6) == 0.0


def test_factors_are_checked() -> None:
    rows = np.asarray([4, 2, 7])
    found = factors_of(lambda logprobs, chosen: logprobs * chosen, np.asarray([1.0, 2.0, 3.0]), rows)
    assert found.dtype == np.float64 and found.tolist() == [4.0, 4.0, 21.0]
    with pytest.raises(FloatingPointError, match=r"log-probabilities of 1 of 3 responses .* batch row 2: no step"):
        factors_of(lambda logprobs, chosen: logprobs, np.asarray([1.0, np.nan, 3.0]), rows)
    with pytest.raises(FloatingPointError, match=r"coefficients of 2 of 3 responses .* batch row 2: no step"):
        factors_of(lambda logprobs, chosen: np.asarray([1.0, np.inf, np.nan]), np.zeros(3), rows)
    with pytest.raises(ValueError, match=r"coefficients returned shape \(3, 1\); expected \(3,\)"):
        factors_of(lambda logprobs, chosen: np.zeros((3, 1)), np.zeros(3), rows)
