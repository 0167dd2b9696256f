"""The built-in rewards, by the name under which scripts import them."""

from gvpo_core.training.rewards.builtin import exact_match, math_verify, regex_match

__all__ = ["exact_match", "math_verify", "regex_match"]
