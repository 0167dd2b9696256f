"""Reward functions: how they are found, called and turned into scores."""

from gvpo_core.training.rewards.scores import (
    Reward,
    RewardError,
    RewardFunction,
    Scores,
    close_rewards,
    load_rewards,
    score,
)

__all__ = [
    "Reward",
    "RewardError",
    "RewardFunction",
    "Scores",
    "close_rewards",
    "load_rewards",
    "score",
]
