"""`objective.length_exponent` (GVPO++): the trained table policy ends at its own optimum, and the metrics follow."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from table_problem import BETA, settings

from gvpo_core.training.config import Config, ConfigError, ObjectiveConfig
from gvpo_core.training.config.check import check_config
from gvpo_core.training.loop import train
from gvpo_core.training.policy import Response
from gvpo_core.training.policy.table import TablePolicy

pytestmark = pytest.mark.core

PROMPTS = ("p0", "p1")
RESPONSES = ("a", "bb", "cccc", "ddd")
REFERENCE = np.array([[0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]])
REWARDS = np.array([[0.0, 0.4, 0.5, 0.1], [0.5, 0.0, 0.4, 0.3]])


class LongerResponses(TablePolicy):
    """A table whose response has as many tokens as letters, and an end token. The first token is the response's id."""

    def generate(self, prompts, seeds, sampling):
        drawn = super().generate(prompts, seeds, sampling)
        return [[Response((r.tokens[0],) * len(self.decode(r.tokens)) + (0,), True) for r in rows] for rows in drawn]


def reward(prompts, completions, **columns):
    return [REWARDS[PROMPTS.index(p), RESPONSES.index(c)] for p, c in zip(prompts, completions, strict=True)]


def optimum(lengths: np.ndarray, exponent: float) -> np.ndarray:
    """pi_ref exp((R + c) / (beta f)) of each prompt, c by bisection."""
    factors = lengths**-exponent
    out = []
    for ref, values in zip(REFERENCE, REWARDS, strict=True):
        low, high = -50.0, 50.0
        for _ in range(200):
            c = (low + high) / 2
            total = (ref * np.exp(np.minimum((values + c) / (BETA * factors), 600))).sum()
            low, high = (low, c) if total > 1 else (c, high)
        out.append(ref * np.exp((values + low) / (BETA * factors)))
    return np.array(out)


def run(folder: Path, exponent: float, steps: int) -> tuple[TablePolicy, list[dict]]:
    config = settings(folder)
    config = replace(
        config,
        run=replace(config.run, steps=steps),
        rollout=replace(config.rollout, prompts=2, responses=32, max_tokens=5),
        objective=replace(config.objective, length_exponent=exponent),
        optimizer=replace(config.optimizer, learning_rate=6.0),
    )
    table = {p: dict(zip(RESPONSES, row, strict=True)) for p, row in zip(PROMPTS, REFERENCE.tolist(), strict=True)}
    policy = LongerResponses(table, config.optimizer)
    train(config, policy, rewards={"value": reward}, train_rows=[{"prompt": p} for p in PROMPTS])
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return policy, [r for r in records if r["kind"] == "train"]


@pytest.mark.slow
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_training_ends_at_the_optimum_of_the_exponent(exponent: float, tmp_path: Path) -> None:
    policy, records = run(tmp_path / "run", exponent, 400)
    lengths = np.array([len(r) + 1 for r in RESPONSES])
    assert records[-1]["length/max"] == lengths.max() and records[-1]["length/mean"] < lengths.max()
    end = np.exp(policy.log_table())[:, [policy.responses.index(r) for r in RESPONSES]]
    expected = optimum(lengths, exponent)
    others = [optimum(lengths, e) for e in (0.0, 0.5, 1.0) if e != exponent]
    distance = lambda q: float((q * np.log(q / end)).sum(axis=1).max())
    assert distance(expected) < 2e-3
    assert all(distance(other) > 5 * distance(expected) for other in others)
    assert records[-1]["regret/series"] < records[0]["regret/series"] / 10
    assert records[-1]["loss"] < records[0]["loss"] / 10


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"name": "rloo", "length_exponent": 1.0}, "objective.length_exponent = 1.0; expected 0 for .*'rloo'"),
        ({"length_exponent": -1.0}, "objective.length_exponent = -1.0; expected >= 0"),
        ({"length_exponent": 99.0}, "objective.length_exponent = 99.0; expected at most 8"),
    ],
)
def test_an_invalid_exponent_is_rejected(objective: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(Config(objective=ObjectiveConfig(**objective)))
