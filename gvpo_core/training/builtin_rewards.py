"""The built-in rewards, under the module name that scripts import."""

from gvpo_core.training.rewards.builtin import exact_match, judge, math_verify, reasoning_gym, regex_match, reward_model

__all__ = ["exact_match", "judge", "math_verify", "reasoning_gym", "regex_match", "reward_model"]
