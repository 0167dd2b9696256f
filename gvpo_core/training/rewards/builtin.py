"""The built-in rewards, for import in Python code."""

from gvpo_core.training.rewards.worker.all_builtin import BUILTIN
from gvpo_core.training.rewards.worker.builtin import exact_match, math_verify, regex_match
from gvpo_core.training.rewards.worker.judge import judge
from gvpo_core.training.rewards.worker.reasoning_gym import reasoning_gym
from gvpo_core.training.rewards.worker.reward_model import reward_model

__all__ = ["BUILTIN", "exact_match", "judge", "math_verify", "reasoning_gym", "regex_match", "reward_model"]
