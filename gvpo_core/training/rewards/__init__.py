"""Reward functions: finding them, calling them and turning their results into scores."""

from gvpo_core.training.rewards.failures import RewardError
from gvpo_core.training.rewards.load import Reward, RewardFunction, check_columns, close_rewards, load_rewards
from gvpo_core.training.rewards.log import RewardLog
from gvpo_core.training.rewards.scores import Scores, score

__all__ = [
    "Reward",
    "RewardError",
    "RewardFunction",
    "RewardLog",
    "Scores",
    "check_columns",
    "close_rewards",
    "load_rewards",
    "score",
]
