"""Finds the configured reward functions, checks their arguments, and starts their processes."""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from gvpo_core.training.config import ConfigError, RewardConfig
from gvpo_core.training.config.secrets import resolved
from gvpo_core.training.rewards.calls import Caller, Processes, Threads
from gvpo_core.training.rewards.log import RewardLog
from gvpo_core.training.rewards.prints import printing_to
from gvpo_core.training.rewards.process import working_folder
from gvpo_core.training.rewards.worker.encoding import UnsendableError
from gvpo_core.training.rewards.worker.functions import find_function

RewardFunction = Callable[..., Any]


@dataclass(frozen=True)
class Reward:
    """A reward function, its caller, and its settings."""

    name: str
    call: Caller
    weight: float = 1.0
    timeout: float = 30.0
    max_failures: float = 0.5
    failure_value: float | None = None
    log: RewardLog = field(default_factory=RewardLog)


def load_rewards(
    config: Mapping[str, RewardConfig],
    given: Mapping[str, RewardFunction] | None = None,
    *,
    log: RewardLog | None = None,
) -> list[Reward]:
    """Finds the configured functions and starts their processes; `close_rewards` ends them.

    Args:
      given: functions by name that replace the configured ones; they are called in threads.
      log: receives the output and the errors of the rewards. Default: both are dropped.
    Raises: ConfigError: a module, file or function is missing, its import fails, its arguments do not match, or it runs
      code from responses and no sandbox is named. The message names the reward.
    """
    rewards: list[Reward] = []
    log = log or RewardLog()
    try:
        for name, settings in config.items():
            settings = replace(settings, options=resolved(settings.options, f"rewards.{name}.options"))
            call = _caller(name, settings, (given or {}).get(name), log)
            rewards.append(
                Reward(
                    name, call, settings.weight, settings.timeout, settings.max_failures, settings.failure_value, log
                )
            )
            if wrong := call.wrong_columns(None):
                raise ConfigError(
                    f"rewards.{name}.{wrong}" if wrong.startswith("options") else f"rewards.{name}: {wrong}"
                )
            if call.signature.runs_code and not settings.sandbox:
                raise ConfigError(
                    f"rewards.{name} = {settings.function!r} runs code from responses, and gvpo's processes do not"
                    " contain it: run it in a sandbox (for example a container without network) and name that in"
                    f" rewards.{name}.sandbox"
                )
    except BaseException:  # also Ctrl-C: leave no process behind
        close_rewards(rewards)
        raise
    return rewards


def check_columns(rewards: Sequence[Reward], columns: Collection[str], name: str) -> None:
    """Checks that the rewards can be called with data of these columns.

    Args:
      name: name of the data in error messages.
    Raises: ConfigError: a reward cannot be called with them.
    """
    for reward in rewards:
        if wrong := reward.call.wrong_columns({*columns, "completion_ids"}):
            raise ConfigError(f"rewards.{reward.name}: with {name}, {wrong}")


def close_rewards(rewards: Sequence[Reward]) -> None:
    """Ends the processes and calls of the rewards."""
    for reward in rewards:
        reward.call.close()


def _caller(name: str, config: RewardConfig, given: RewardFunction | None, log: RewardLog) -> Caller:
    try:
        if given is not None:
            return Threads(name, given, config.options, log=log)
        if config.isolation == "thread":
            before = working_folder()
            with printing_to(partial(log.output, name)):
                function = find_function(config.function)
            if before != (after := working_folder()):
                if before is not None:
                    os.chdir(before)
                raise ConfigError(
                    f"rewards.{name}: importing {config.function} changed the working directory to {after}, from which"
                    " the settings' relative paths would be read: set isolation = 'process', or leave it as it is"
                )
            return Threads(name, function, config.options, log=log)
        memory = int(config.memory * 2**30)
        return Processes(name, config.function, config.options, width=config.workers, memory=memory, log=log)
    except UnsendableError as e:
        raise ConfigError(
            f"rewards.{name}.options cannot be sent to a reward's process as JSON and arrive equal: {e}"
        ) from e
    except (LookupError, ImportError) as e:
        raise ConfigError(f"rewards.{name}.function = {config.function!r}: {e}") from e
