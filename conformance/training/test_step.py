"""The learning rate of every step, by hand, and coefficients that are checked before use."""

import itertools

import numpy as np
import pytest

from gvpo_core.training.config import OptimizerConfig
from gvpo_core.training.policy import Batch
from gvpo_core.training.policy.layout import Splitting
from gvpo_core.training.policy.step import ByGroup, factors_of, learning_rate, plan_step

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


def test_in_lockstep_all_groups_go_in_rounds_and_those_scored_first_are_not_asked_for_again() -> None:
    """Groups of one, three and nine rows of 10 tokens; a micro-batch takes 20 tokens, a round 40."""
    sizes = (1, 3, 9, 1)
    groups = [label for label, size in enumerate(sizes) for _ in range(size)]
    batch = Batch([(label,) * 3 for label in groups], [(i,) * 8 for i in range(len(groups))], groups)
    asked: list[list[int]] = []
    coefficients = ByGroup(lambda logprobs, rows: asked.append(rows.tolist()) or rows + 1.0, lambda error: None)
    given = {"together": True, "scored": None, "score": lambda of: (np.zeros(len(of)), 10 * len(of)), "held": 40}
    plan = plan_step(batch, Splitting(False, 20, 0, 0), coefficients, **given, meets=True, lockstep=True)
    large = [4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert asked == [large] and list(plan.known) == large and not plan.rest and not plan.grouped
    rounds = [[sum(row.length for row in rows) for rows in micro] for micro in plan.deferred]
    assert rounds == [[20, 20], [20, 20], [20, 20], [20]]  # as full as they can be, the fullest passes first
    of_rounds = [sorted(i for rows in micro for row in rows for i in row.responses) for micro in plan.deferred]
    assert sorted(itertools.chain(*of_rounds)) == list(range(len(groups)))
    assert sum({1, 2, 3} <= set(of_round) for of_round in of_rounds) == 1, "a group lies in two rounds"

    coefficients.known = {i: float(plan.factors[i]) for i in plan.known}
    for of_round in of_rounds:
        rows = np.asarray(of_round)
        assert factors_of(coefficients, np.zeros(len(rows)), rows).tolist() == (rows + 1.0).tolist()
    assert sorted(itertools.chain(*asked)) == list(range(len(groups)))


def test_of_a_group_beyond_what_is_held_a_part_is_scored_first() -> None:
    """A group of nine rows of 10 tokens, two a micro-batch, of which two are held; then one that is held as a whole."""
    groups = [0] * 9 + [1] * 3
    batch = Batch([(label,) * 3 for label in groups], [(i,) * 8 for i in range(len(groups))], groups)
    asked: list[list[int]] = []
    scored: list[int] = []

    def coefficients(logprobs: np.ndarray, rows: np.ndarray) -> np.ndarray:
        asked.append(sorted(rows.tolist()))
        np.testing.assert_array_equal(logprobs[np.isfinite(logprobs)], (-1.0 - rows)[np.isfinite(logprobs)])
        return rows + 1.0

    def score(of: Batch) -> tuple[np.ndarray, int]:
        scored.extend(response[0] for response in of.responses)
        return -1.0 - np.asarray(scored), 10 * len(of)

    splitting = Splitting(False, 20, 0, 0)
    plan = plan_step(batch, splitting, coefficients, together=True, scored=None, score=score, held=40)
    rounds = [[i for rows in micro for row in rows for i in row.responses] for micro in plan.deferred]
    held = next(of_round for of_round in rounds if len(of_round) == 4)
    assert len(rounds) == 2 and plan.tokens == 50
    assert scored == plan.rest == sorted(set(range(9)) - set(held)) and not asked and plan.partly
    for of_round in rounds:
        rows = np.asarray(of_round)
        np.testing.assert_array_equal(factors_of(plan.partly, -1.0 - rows, rows), rows + 1.0)
    assert sorted(asked) == [list(range(9)), [9, 10, 11]]
    np.testing.assert_array_equal(plan.factors[plan.rest], np.asarray(plan.rest) + 1.0)
    with pytest.raises(FloatingPointError, match=f"log-probabilities of 1 of 9 responses .* batch row {held[0]}"):
        factors_of(
            plan.partly, np.where(np.asarray(held) == held[0], np.nan, -1.0 - np.asarray(held)), np.asarray(held)
        )
