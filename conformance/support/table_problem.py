"""A problem of three prompts and five responses whose optimum is known exactly."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from gvpo_core.training.config import (
    Config,
    DataConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
)

BETA = 0.5
PROMPTS = ("p0", "p1", "p2")
RESPONSES = ("a", "b", "c", "d", "e")
REFERENCE = np.array([[0.30, 0.25, 0.20, 0.15, 0.10], [0.2, 0.2, 0.2, 0.2, 0.2], [0.10, 0.15, 0.35, 0.25, 0.15]])
REWARDS = np.array([[0.0, 0.3, 0.6, 0.1, 0.5], [1.0, 0.8, 0.6, 0.4, 0.7], [0.2, 0.2, 0.0, 0.4, 0.3]])


def table(probabilities: np.ndarray) -> dict[str, dict[str, float]]:
    return {p: dict(zip(RESPONSES, row, strict=True)) for p, row in zip(PROMPTS, probabilities.tolist(), strict=True)}


def reward(prompts, completions, **columns):
    return [REWARDS[PROMPTS.index(p), RESPONSES.index(c)] for p, c in zip(prompts, completions, strict=True)]


def settings(folder: Path, **changes) -> Config:
    config = Config(
        run=RunConfig(folder=str(folder), backend="table", steps=250, checkpoint_every=0, show_every=0),
        data=DataConfig(train="given"),
        rollout=RolloutConfig(prompts=3, responses=16, max_tokens=2),
        objective=ObjectiveConfig(beta=BETA),
        optimizer=OptimizerConfig(learning_rate=12.0, max_gradient_norm=0.0),
        rewards={"value": RewardConfig(function="given")},
    )
    return replace(config, **changes)
