"""The configured objective: an entry of the table of objectives, or the user's own function."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gvpo_core.objectives import TABLE, objective_coefficients
from gvpo_core.training.config import Config, ConfigError, ObjectiveConfig
from gvpo_core.training.config.check import wrong_objective
from gvpo_core.training.rewards.worker.functions import find_function

_ARRAYS = ("logprobs", "ref_logprobs", "old_logprobs", "rewards", "group_ids")
_OPTIONS = ("beta", "num_groups", "clip", "lengths")


class ObjectiveError(RuntimeError):
    """An objective raised an error, returned unusable values, or cannot use the rewards. The message names it."""


@dataclass(frozen=True)
class TrainingObjective:
    """An objective in the form that the trainer uses."""

    name: str
    smallest: int  # scored responses that a group needs
    needs_old: bool  # reads the policy's log-probabilities before the rollout's first step
    function: Callable[..., Any] | None  # the user's function; None: an entry of the table
    options: dict[str, Any]  # beta, clip
    length_exponent: float = 0.0
    no_negative_rewards: bool = False

    def coefficients(
        self,
        logprobs: np.ndarray,
        ref_logprobs: np.ndarray,
        old_logprobs: np.ndarray,
        rewards: np.ndarray,
        group_ids: np.ndarray,
        num_groups: int,
        lengths: np.ndarray,
    ) -> np.ndarray:
        """Returns (N,) float64, the factor of each response's log-probability gradient.

        All arrays are (N,); `lengths` are in tokens.

        Raises: ObjectiveError: the user's function raised an error, or did not return N numbers.
        """
        arrays = (logprobs, ref_logprobs, old_logprobs, rewards, group_ids)
        options = self.options | {"num_groups": num_groups}
        if self.function is None:
            factors = response_weights(lengths, self.length_exponent)
            tokens = np.maximum(lengths, 1)
            return np.asarray(
                objective_coefficients(self.name, *arrays, **options, response_weights=factors, lengths=tokens)
            )
        accepted = _accepted_options(self.function)
        options["lengths"] = np.array(lengths)
        copies = [np.array(array) for array in arrays]  # the function may change its arguments in place
        try:
            coefficients = self.function(
                *copies, **{name: value for name, value in options.items() if name in accepted}
            )
            result = np.array(coefficients, np.float64)
        except Exception as error:  # the function may raise any error
            raise ObjectiveError(f"objective.name = {self.name!r} raised {type(error).__name__}: {error}") from error
        if result.shape != logprobs.shape:
            raise ObjectiveError(
                f"objective.name = {self.name!r} gave an array of shape {result.shape}; expected {logprobs.shape}, one"
                " coefficient a response"
            )
        return result


def response_weights(lengths: np.ndarray, exponent: float) -> np.ndarray | None:
    """Returns (N,) f = |y|^-exponent for `lengths` in tokens (GVPO++, arXiv 2609.21432); None if all are 1."""
    if not exponent:
        return None
    weights: np.ndarray = np.maximum(np.asarray(lengths, np.float64), 1.0) ** -exponent
    return weights


def find_objective(config: ObjectiveConfig) -> TrainingObjective:
    """Finds the objective that `objective.name` names.

    A user's function is `file.py:function` or `package.module:function`. It takes (N,) NumPy arrays by position:
    logprobs, ref_logprobs, old_logprobs, rewards and group_ids. By name it takes any of beta, num_groups, clip and
    lengths (N,). Every row has a reward. It returns (N,) coefficients c: the loss has the gradient
    -sum_i c_i grad log pi_i. A row's coefficient may depend only on its own group and on the number of groups.
    The function's attribute `smallest` (default 2) is the number of scored responses that a group needs.

    Raises: ConfigError: an unknown name, a function that does not exist, or one with other arguments.
    """
    options = {"beta": config.beta, "clip": config.clip}
    if config.name in TABLE:
        row = TABLE[config.name]
        facts = (row.smallest, row.needs_old, None, options, config.length_exponent, row.no_negative_rewards)
        return TrainingObjective(config.name, *facts)
    if wrong := wrong_objective(config.name):
        raise ConfigError(wrong)
    try:
        function = find_function(config.name)
    except LookupError as error:
        raise ConfigError(f"objective.name = {config.name!r}: {error}") from error
    try:
        signature = inspect.signature(function)
        signature.bind(*_ARRAYS, **{name: None for name in _OPTIONS if name in _accepted_options(function)})
    except TypeError as error:
        raise ConfigError(
            f"objective.name = {config.name!r} has other arguments ({error}); expected"
            f" {function.__name__}({', '.join(_ARRAYS)}), and as keywords any of {', '.join(_OPTIONS)}"
        ) from error
    smallest = getattr(function, "smallest", 2)
    if not isinstance(smallest, int) or smallest < 1:
        raise ConfigError(f"objective.name = {config.name!r} has smallest = {smallest!r}; expected 1 or more responses")
    return TrainingObjective(config.name, smallest, True, function, options)


def check_objective(config: Config) -> None:
    """Raises ConfigError if the objective cannot be found, or needs more responses than a prompt has."""
    objective = find_objective(config.objective)
    if objective.name not in TABLE and config.rollout.responses < objective.smallest:  # config.check covers TABLE
        raise ConfigError(
            f"rollout.responses = {config.rollout.responses}; expected at least {objective.smallest} for"
            f" objective.name = {config.objective.name!r}"
        )


def _accepted_options(function: Callable[..., Any]) -> set[str]:
    """Returns the options for which a function has parameters."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return set(_OPTIONS)
    return {p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY} & set(_OPTIONS)
