"""objective.reference_every: the reference is renewed at the right steps, and a resumed run repeats them."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from table_problem import REFERENCE, reward, settings, table

from gvpo_core.training.config import ConfigError, EvaluationConfig, ObjectiveConfig
from gvpo_core.training.config.check import check_config
from gvpo_core.training.loop import train
from gvpo_core.training.policy.table import TablePolicy

pytestmark = pytest.mark.core


class Watched(TablePolicy):
    """Keeps the log-probabilities of policy and reference at the start of each step."""

    def __init__(self, config) -> None:
        super().__init__(table(REFERENCE), config.optimizer, updates=config.run.steps)
        self.seen: list[tuple[np.ndarray, np.ndarray]] = []

    def update(self, batch, coefficients, *, scored=None):
        self.seen.append((self.log_table(), self.reference))
        return super().update(batch, coefficients, scored=scored)


def config_of(folder, steps: int = 7, **objective):
    config = settings(folder)
    return replace(
        config,
        run=replace(config.run, steps=steps, checkpoint_every=1),
        objective=replace(config.objective, **({"reference_every": 3} | objective)),
    )


def run(config, policy):
    rows = [{"prompt": prompt} for prompt in policy.prompts]
    return train(config, policy, train_rows=rows, rewards={"value": reward})


def test_the_reference_is_renewed_after_every_three_steps(tmp_path) -> None:
    config = config_of(tmp_path / "run")
    policy = Watched(config)
    run(config, policy)
    assert len(policy.seen) == 7
    tables = [own for own, _ in policy.seen]
    assert all(np.abs(a - b).max() > 1e-3 for a, b in itertools.pairwise(tables)), "a step changed nothing"
    for step, renewed_at in enumerate((1, 1, 1, 4, 4, 4, 7), start=1):
        np.testing.assert_array_equal(policy.seen[step - 1][1], tables[renewed_at - 1], err_msg=f"step {step}")


@pytest.mark.parametrize("stop", [2, 3, 4, 5])
def test_a_resumed_run_has_the_same_references(stop, tmp_path) -> None:
    config = config_of(tmp_path / "whole")
    whole = Watched(config)
    run(config, whole)
    first = config_of(tmp_path / "parts")
    run(replace(first, run=replace(first.run, steps=stop)), Watched(config))
    second = Watched(config)
    run(first, second)
    assert len(second.seen) == 7 - stop
    for ours, theirs in zip(second.seen, whole.seen[stop:], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(second.logits, whole.logits)


def test_recorded_groups_are_scored_by_the_renewed_reference(tmp_path) -> None:
    """Cached reference scores would be those of the initial model."""
    rows = [{"prompt": f"p{i}", "responses": ["a", "b", "c"], "rewards": [0.0, 1.0, 0.5 * i]} for i in range(3)]
    config = config_of(tmp_path / "run", steps=4, reference_every=2)
    config = replace(config, rewards={}, evaluation=EvaluationConfig(every=1))
    config = replace(config, optimizer=replace(config.optimizer, learning_rate=0.5))
    policy = Watched(config)
    result = train(config, policy, train_rows=rows, evaluation_rows=rows)
    np.testing.assert_array_equal(policy.seen[2][1], policy.seen[2][0])
    np.testing.assert_array_equal(policy.seen[3][1], policy.seen[2][0])
    losses = [metrics["eval/loss"] for metrics in result.evaluations]
    assert losses[0] > losses[1] > losses[2] < losses[3] > losses[4]  # against the reference of that moment
    assert all("eval/accuracy" in metrics for metrics in result.evaluations)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"reference": "rollout"}, "only the initial reference is renewed"),
        ({"name": "sft"}, "reads no reference"),
        ({"reference_every": -1}, "objective.reference_every = -1"),
    ],
)
def test_settings_that_have_no_reference_to_renew_are_named(objective, message, tmp_path) -> None:
    config = settings(tmp_path, objective=ObjectiveConfig(**({"reference_every": 2} | objective)))
    with pytest.raises(ConfigError, match=message):
        check_config(config)
