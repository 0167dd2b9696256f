"""Checks, opens and closes the sampler that the settings name. It is opened after the policy is loaded."""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from gvpo_core.training.config import Config, ConfigError
from gvpo_core.training.config.engine import needs_sampler
from gvpo_core.training.config.secrets import resolved
from gvpo_core.training.policy import Policy
from gvpo_core.training.rewards.worker.functions import find_function
from gvpo_core.training.samplers.background import InBackground
from gvpo_core.training.samplers.copied import PolicyCopy
from gvpo_core.training.samplers.engine import Engine
from gvpo_core.training.samplers.in_process import VLLM, check_installed
from gvpo_core.training.samplers.protocol import Sampler, close

_TEACHER = "gvpo_core.training.teacher.sampler:TeacherSampler"  # by name: the teacher package imports this one


def check_sampler(config: Config) -> None:
    """Raises ConfigError if the sampler is not found, takes other arguments or lacks its key. Does not open it."""
    if config.rollout.sampler == "engine":
        resolved({"api_key": config.engine.api_key}, "engine")
        if config.engine.kind == "vllm":
            check_installed()
    if ":" in config.rollout.sampler:  # `wrong_sampler` rejects unknown names without it
        _sampler_function(config)


def _sampler_function(config: Config) -> Callable[..., Any]:
    name = config.rollout.sampler
    try:
        function = find_function(_TEACHER if name == "teacher" else name)
    except LookupError as error:
        raise ConfigError(f"rollout.sampler = {name!r}: {error}") from error
    try:
        inspect.signature(function).bind(**dict.fromkeys(_argument_names(function)))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"rollout.sampler = {name!r} has other arguments ({error}); expected {name.rpartition(':')[2]}(), with any"
            " of config and policy as keywords"
        ) from error
    return function


def _argument_names(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.name in ("config", "policy") and p.kind is not p.POSITIONAL_ONLY]


@contextlib.contextmanager
def opened_sampler(
    config: Config, policy: Policy, given: Sampler | None = None, *, trained: bool = True
) -> Iterator[Sampler | None]:
    """Opens the sampler of rollout.sampler and closes it at the end. A sampler given in Python is not closed.

    Yields None if the policy draws its responses itself. With rollout.ahead, a copy of a trained policy draws them, and
    every sampler can draw in the background.

    Raises: ConfigError: both are given; the sampler cannot be created or has no `generate` method; or the policy cannot
      be copied.
    """
    name = config.rollout.sampler
    if given is not None and name != "policy":
        raise ConfigError(
            f"a sampler is given in Python, and rollout.sampler = {name!r} names one as well: leave one of them out"
        )
    if given is None and name == "policy":
        if wrong := needs_sampler(config):
            raise ConfigError("\n".join(wrong))
        if not config.rollout.ahead or not trained:
            yield None
            return
        copy = PolicyCopy(config, policy)
        try:
            yield copy
        finally:
            copy.close()
        return
    with contextlib.ExitStack() as stack:
        sampler: Any = given
        if given is None:
            sampler = _created(config, policy)
            stack.callback(close, sampler)
        _check(config, sampler, "the sampler" if given is not None else f"rollout.sampler = {name!r}")
        if config.rollout.ahead and not (hasattr(sampler, "ask") and hasattr(sampler, "probe")):
            sampler = InBackground(sampler)
            stack.callback(sampler.close)
        yield sampler


def _created(config: Config, policy: Policy) -> Any:
    name = config.rollout.sampler
    if name == "engine":
        if config.engine.weights == "adapters" and policy.describe().backend == "mlx":
            raise ConfigError(
                "engine.weights = 'adapters': the mlx backend writes adapters for mlx-lm, which engines do not load:"
                " set engine.weights = 'model'"
            )
        if config.engine.kind == "vllm":
            return VLLM(
                getattr(policy, "folder", config.model.path),
                dtype=policy.describe().dtype,
                folder=config.engine.folder,
                gap_tolerance=config.engine.gap_tolerance,
                gap_every=config.engine.gap_every,
                options={"trust_remote_code": config.model.trust_remote_code} | config.engine.options,
            )
        names = (f.name for f in dataclasses.fields(config.engine) if f.name != "options")
        return Engine(**{name: getattr(config.engine, name) for name in names})
    function, arguments = _sampler_function(config), {"config": config, "policy": policy}
    try:
        return function(**{name: arguments[name] for name in _argument_names(function)})
    except ConfigError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(f"rollout.sampler = {name!r} raised {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def opened_for_evaluation(config: Config, policy: Policy) -> Iterator[Sampler | None]:
    """Opens the sampler that answers the held-out prompts; None if the policy answers them."""
    with contextlib.ExitStack() as stack:
        sampled = config.evaluation.sampler == "rollout"
        yield stack.enter_context(opened_sampler(config, policy)) if sampled else None


def _check(config: Config, sampler: Any, name: str) -> None:
    if not callable(getattr(sampler, "generate", None)):
        raise ConfigError(f"{name} gave a {type(sampler).__name__} without a method generate(prompts, seeds, sampling)")
    if config.evaluation.sampler == "rollout" and not hasattr(sampler, "refresh"):
        raise ConfigError(
            f"evaluation.sampler = 'rollout', and {name} has no method refresh(policy, version), so it would not answer"
            " with the policy's weights; add one, or leave evaluation.sampler out"
        )
