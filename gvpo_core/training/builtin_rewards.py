"""The built-in rewards, by the name under which scripts import them."""

from gvpo_core.training.rewards.builtin import exact_match, judge, math_verify, reasoning_gym, regex_match, reward_model

__all__ = ["exact_match", "judge", "math_verify", "reasoning_gym", "regex_match", "reward_model"]
