"""The objectives of other papers in the trainer: what they share with GVPO, where they end, what they reject."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from table_problem import BETA, PROMPTS, REFERENCE, REWARDS, reward, settings, table

from gvpo_core import gvpo_coefficients
from gvpo_core.objectives import OBJECTIVES, OTHER_NAMES, objective_coefficients
from gvpo_core.training.config import Config, ConfigError, ObjectiveConfig
from gvpo_core.training.config.check import check_config
from gvpo_core.training.improve import NoSignalError
from gvpo_core.training.loop import train
from gvpo_core.training.objective import ObjectiveError, find_objective
from gvpo_core.training.policy.table import TablePolicy

pytestmark = pytest.mark.core

OPTIMUM = REFERENCE * np.exp(REWARDS / BETA)
OPTIMUM /= OPTIMUM.sum(axis=1, keepdims=True)


def trained(folder: Path, name: str, *, steps: int, rate: float = 12.0, score=reward, **changes) -> TablePolicy:
    """The table after `steps` steps of 3 x 16 responses."""
    config = settings(folder, objective=ObjectiveConfig(name=name, **{"beta": BETA} | changes))
    optimizer = replace(config.optimizer, learning_rate=rate)
    config = replace(config, run=replace(config.run, steps=steps), optimizer=optimizer)
    policy = TablePolicy(table(REFERENCE), config.optimizer, updates=config.updates)
    train(config, policy, train_rows=[{"prompt": p} for p in PROMPTS], rewards={"value": score})
    return policy


def distance(policy: TablePolicy) -> float:
    """KL(pi || pi*), mean over the prompts."""
    log_pi = policy.log_table()
    return float((np.exp(log_pi) * (log_pi - np.log(OPTIMUM))).sum(axis=1).mean())


def test_rebel_on_all_pairs_of_a_group_is_gvpo(tmp_path, capsys) -> None:
    gvpo, rebel = (trained(tmp_path / n, n, steps=20, epochs=2, minibatches=3) for n in ("gvpo", "rebel"))
    assert np.array_equal(gvpo.logits, rebel.logits)


def test_trajectory_balance_is_gvpo_at_another_learning_rate(tmp_path, capsys) -> None:
    """In groups of k the step is (k - 1)/k of GVPO's."""
    gvpo = trained(tmp_path / "gvpo", "gvpo", steps=20, rate=12.0 * 15 / 16)
    balance = trained(tmp_path / "balance", "trajectory_balance", steps=20)
    np.testing.assert_allclose(balance.logits, gvpo.logits, rtol=1e-12, atol=1e-13)


@pytest.mark.slow_on("rebel", "trajectory_balance", "mirror_descent", "a_star_po", "rloo")
@pytest.mark.parametrize("name", ["gvpo", "trajectory_balance", "rebel", "mirror_descent", "a_star_po", "rloo"])
def test_on_policy_the_regularised_objectives_end_near_the_same_optimum(name, tmp_path, capsys) -> None:
    start = distance(TablePolicy(table(REFERENCE)))
    assert distance(trained(tmp_path, name, steps=200)) < start / 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "maxrl", "gspo"])
def test_without_beta_the_ratio_objectives_leave_the_regularised_optimum_behind(name, tmp_path, capsys) -> None:
    policy = trained(tmp_path, name, steps=200, beta=0.0)
    value = (np.exp(policy.log_table()) * REWARDS).sum(axis=1)
    assert (value > (OPTIMUM * REWARDS).sum(axis=1) + 0.02).all()


@pytest.mark.slow
def test_mirror_descent_with_a_moving_reference_continues_to_the_best_response(tmp_path, capsys) -> None:
    policy = trained(tmp_path, "mirror_descent", steps=200, reference="rollout", epochs=2)
    assert (np.exp(policy.log_table()).argmax(axis=1) == REWARDS.argmax(axis=1)).all()
    assert (np.exp(policy.log_table()).max(axis=1) > 0.8).all()


def test_gspo_divides_the_log_ratio_by_the_length() -> None:
    """Two responses of 2 and 4 tokens: ratios exp(0.2 / 2), exp(-0.2 / 4); A = +-1/sqrt(2) over 1 + eps."""
    now, old = np.array([-1.0, -3.0]), np.array([-1.2, -2.8])
    ids, lengths = np.zeros(2, int), np.array([2, 4])
    objective = find_objective(ObjectiveConfig(name="gspo", beta=0.0))
    got = objective.coefficients(now, old, old, np.array([1.0, 0.0]), ids, 1, lengths)
    advantage = 0.5 / (np.sqrt(0.5) + 1e-4)
    np.testing.assert_allclose(got, advantage * np.exp([0.1, -0.05]) / lengths / 2 * [1, -1], rtol=1e-12)
    tight = find_objective(ObjectiveConfig(name="gspo", beta=0.0, clip=3e-4))
    assert not tight.coefficients(now, old, old, np.array([1.0, 0.0]), ids, 1, lengths).any()


def test_maxrl_weighs_a_prompt_by_one_over_its_success_rate() -> None:
    """1 of 4 and 3 of 4 right: the successes' mean weight is (1 - p)/p, so hard prompts count more."""
    rewards, ids = np.array([1.0, 0, 0, 0, 1, 1, 1, 0]), np.repeat([0, 1], 4)
    zeros = np.zeros(8)
    c = objective_coefficients("maxrl", zeros, zeros, zeros, rewards, ids, beta=0.0) * 8
    np.testing.assert_allclose(c, [3, -1, -1, -1, 1 / 3, 1 / 3, 1 / 3, -1], rtol=1e-12)
    nothing = objective_coefficients("maxrl", zeros, zeros, zeros, 0 * rewards, ids, beta=0.0)
    assert not nothing.any()


def test_maxrl_rejects_negative_rewards(tmp_path, capsys) -> None:
    shifted = lambda prompts, completions, **columns: [r - 0.5 for r in reward(prompts, completions)]
    with pytest.raises(ObjectiveError, match=r"objective.name = 'maxrl' divides .* the lowest is -0.5: shift or clip"):
        trained(tmp_path, "maxrl", steps=2, score=shifted)


def test_a_star_po_at_the_reference_is_the_papers_regression() -> None:
    """Responses of pi_ref: V = beta log mean exp(R / beta), and the residual is R - V - beta s."""
    rng = np.random.default_rng(0)
    ref, rewards, ids = rng.normal(-5, 1, 8), rng.normal(0, 1, 8), np.zeros(8, int)
    now = ref + rng.normal(0, 0.3, 8)
    value = BETA * np.log(np.exp(rewards / BETA).mean())
    got = objective_coefficients("a_star_po", now, ref, ref, rewards, ids, beta=BETA)
    np.testing.assert_allclose(got * 8, rewards - value - BETA * (now - ref), rtol=1e-10)
    assert not np.allclose(got, gvpo_coefficients(now, ref, rewards, ids, beta=BETA))


@pytest.mark.parametrize("name", sorted(OTHER_NAMES))
def test_names_that_users_bring_are_answered(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"objective\.name = .*; did you mean '{OTHER_NAMES[name]}'"):
        check_config(Config(objective=ObjectiveConfig(name=name)))
    assert OTHER_NAMES[name] in OBJECTIVES


def test_a_star_po_needs_beta() -> None:
    with pytest.raises(ConfigError, match=r"objective\.beta = 0\.0; expected > 0 for a_star_po"):
        check_config(Config(objective=ObjectiveConfig(name="a_star_po", beta=0.0)))


def test_one_scored_response_a_prompt_is_not_a_group(tmp_path, capsys) -> None:
    def first(prompts, completions, **columns):
        return [1.0 if i == 0 else None for i in range(len(prompts))]

    for name in ("trajectory_balance", "rebel", "mirror_descent", "a_star_po", "gspo", "maxrl"):
        with pytest.raises(NoSignalError, match="no group has 2 scored responses"):
            trained(tmp_path / name, name, steps=1, score=first)
