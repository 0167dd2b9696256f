"""The built-in rewards, by the name under which Python code imports them."""

from gvpo_core.training.rewards.worker.builtin import BUILTIN, exact_match, math_verify, regex_match

__all__ = ["BUILTIN", "exact_match", "math_verify", "regex_match"]
