"""The built-in rewards by name."""

from collections.abc import Callable
from typing import Any

from .builtin import exact_match, math_verify, regex_match
from .judge import judge
from .reasoning_gym import reasoning_gym
from .reward_model import reward_model

BUILTIN: dict[str, Callable[..., Any]] = {
    "exact_match": exact_match,
    "regex_match": regex_match,
    "math_verify": math_verify,
    "reward_model": reward_model,
    "judge": judge,
    "reasoning_gym": reasoning_gym,
}
