"""Rewards that score some responses only: tasks beside each other, and rewards that only measure."""

import asyncio

import numpy as np
import pytest

from gvpo_core.training.config import RewardConfig
from gvpo_core.training.rewards import RewardError, load_rewards, score
from gvpo_core.training.rewards.total import total_rewards

pytestmark = pytest.mark.core

NAN = float("nan")
PROMPTS, TEXTS = ["p", "p", "q", "q"], ["a", "bb", "a", "bb"]
COLUMNS = {"task": ["a", "a", "b", "b"]}


def scores(weights=(1.0, 1.0), **functions):
    config = {n: RewardConfig(n, weight=w, max_failures=1.0) for n, w in zip(functions, weights, strict=True)}
    return score(load_rewards(config, functions), PROMPTS, TEXTS, COLUMNS)


@pytest.mark.parametrize(
    ("parts", "failed", "total"),
    [
        ([[1, 2, 5, 6], [NAN, 1, NAN, NAN]], [], [2, 4, 10, 12]),  # a gap in what only measures
        ([[1, 2, 5, 6], [NAN, 1, 3, 4]], [(1, 0)], [2, 4, 10, 12]),  # and a failure
        ([[1, 2, NAN, NAN], [7, 1, 3, 4]], [], [2, 4, NAN, NAN]),  # nobody but it scored the second group
        ([[1, NAN, NAN, NAN], [7, 1, 3, 4]], [], [2, NAN, NAN, NAN]),
    ],
)
def test_a_reward_of_weight_0_is_part_of_no_total(parts, failed, total):
    mask = np.zeros((2, 4), bool)
    for place in failed:
        mask[place] = True
    groups = np.array([7, 7, 3, 3])
    np.testing.assert_array_equal(total_rewards(np.array(parts, float), mask, [2.0, 0.0], groups), total)
    np.testing.assert_array_equal(total_rewards(np.array(parts, float), mask, [0.0, -0.0], groups), np.zeros(4))


def test_failures_of_a_reward_of_weight_0_are_counted_and_cost_no_response():
    def measures(completions):
        if "bb" in completions:
            raise ValueError("no")
        return [0.5] * len(completions)

    got = scores((2.0, 0.0), length=lambda completions: [float(len(c)) for c in completions], measures=measures)
    assert got.total.tolist() == [2.0, 4.0, 2.0, 4.0]
    assert got.errors["measures"]["error"] == 2


def test_one_bad_response_of_a_task_does_not_end_the_run():
    """The other responses are of another task: nobody else is left for this function."""

    def lengths(completions, task):
        return [float(len(c)) if t == "a" else None for c, t in zip(completions, task, strict=True)]

    def fails(completions, task):
        if "b" in task:
            raise ValueError("no")
        return [None] * len(completions)

    got = scores(lengths=lengths, fails=fails)
    np.testing.assert_array_equal(got.total, [1.0, 2.0, NAN, NAN])
    assert got.errors["fails"] == {"error": 2, "timeout": 0, "none": 0}
    with pytest.raises(RewardError, match="reward fails gave no score to any of 4"):
        scores((1.0,), fails=fails)


@pytest.mark.parametrize("form", ["list", "array", "tuple", "async"])
def test_a_missing_score_in_any_form_is_no_score(form):
    def task(completions, task):
        values = [float(len(c)) if t == "a" else None for c, t in zip(completions, task, strict=True)]
        if form == "array":
            return np.array(values, dtype=float)  # None becomes NaN
        return tuple(values) if form == "tuple" else values

    async def awaited(completions, **columns):
        await asyncio.sleep(0)
        return task(completions, columns["task"])

    def other(completions, task):
        return [9.0 if t == "b" else None for t in task]

    got = scores(x=awaited if form == "async" else task, y=other)
    assert got.total.tolist() == [1.0, 2.0, 9.0, 9.0]
    assert got.errors == {n: {"error": 0, "timeout": 0, "none": 0} for n in "xy"}
