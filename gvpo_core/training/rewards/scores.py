"""Rewards: the user's functions, called so that one bad response or one hung call never stops a run.

A reward function follows TRL's convention: `reward(prompts, completions, **columns) -> list[float | None]`, plain or
async. A completion is text, or a list of one assistant message where the prompt is chat messages. `columns` are the
other columns of the data, one value a response, and `completion_ids`.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gvpo_core.training.config import ConfigError, RewardConfig
from gvpo_core.training.config.secrets import resolved
from gvpo_core.training.policy import Prompt
from gvpo_core.training.rewards.calls import Caller, CallFailed, Processes, Threads, UnsendableError
from gvpo_core.training.rewards.worker import find_function

RewardFunction = Callable[..., Any]

_log = logging.getLogger("gvpo.rewards")
_STARTS = 5.0  # seconds; the least that a step waits for processes to start anew


class RewardError(RuntimeError):
    """A reward that cannot be used: a wrong count, a wrong type, too many failures, or no response scored at all."""


@dataclass(frozen=True)
class Scores:
    """The rewards of N responses."""

    total: np.ndarray  # (N,) float64, weighted sum; NaN where any reward is missing
    parts: dict[str, np.ndarray]  # name -> (N,) float64, unweighted; NaN = missing
    errors: dict[str, dict[str, int]] = field(default_factory=dict)  # name -> {"error" | "timeout" | "none": count}
    seconds: dict[str, float] = field(default_factory=dict)  # name -> seconds the reward took


@dataclass(frozen=True)
class Reward:
    """One reward function, how it is called, and what its results are worth."""

    name: str
    call: Caller
    weight: float = 1.0
    timeout: float = 30.0
    max_failures: float = 0.5
    failure_value: float | None = None


def load_rewards(config: Mapping[str, RewardConfig], given: Mapping[str, RewardFunction] | None = None) -> list[Reward]:
    """Finds the configured functions and starts their processes; close each `call` when done.

    Args:
      given: functions by name that take the place of the configured ones; they are called in threads.
    Raises: ConfigError: a module, file or function that is not there, an import that fails, or a function that runs
      code while nothing is said to contain it; naming it.
    """
    rewards: list[Reward] = []
    try:
        for name, c in config.items():
            c = replace(c, options=resolved(c.options, f"rewards.{name}.options"))
            call = _caller(name, c, (given or {}).get(name))
            rewards.append(Reward(name, call, c.weight, c.timeout, c.max_failures, c.failure_value))
            if call.runs_code and not c.sandbox:
                raise ConfigError(
                    f"rewards.{name} = {c.function!r} runs code from responses, and gvpo's processes do not contain it:"
                    f" run it in a sandbox (a container without network, say) and name that in rewards.{name}.sandbox"
                )
    except BaseException:  # Ctrl-C too: no process stays behind
        close_rewards(rewards)
        raise
    return rewards


def close_rewards(rewards: Sequence[Reward]) -> None:
    """Ends what the rewards hold."""
    for reward in rewards:
        reward.call.close()


def _caller(name: str, config: RewardConfig, given: RewardFunction | None) -> Caller:
    if given is not None:
        return Threads(given, config.options)
    try:
        if config.isolation == "thread":
            return Threads(find_function(config.function), config.options)
        memory = int(config.memory * 2**30)
        return Processes(config.function, config.options, width=config.workers, memory=memory)
    except LookupError as e:
        raise ConfigError(f"rewards.{name}.function = {config.function!r}: {e}") from e


def score(
    rewards: Sequence[Reward],
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> Scores:
    """Calls every reward, all at the same time, on the N responses.

    A response for which a reward raises, runs out of time, or gives None or NaN is left without a score. A call for
    all responses that fails is tried again response by response, so that only the bad ones are lost.

    Raises: RewardError: a wrong number of rewards, something that is not a number, or no response scored.
    """
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, responses, strict=True)
    ]
    n = len(completions)
    if n == 0:
        return Scores(np.zeros(0), {r.name: np.zeros(0) for r in rewards}, {r.name: _no_errors() for r in rewards})
    with ThreadPoolExecutor(len(rewards)) as pool:
        try:
            outcomes = list(pool.map(lambda r: _score_one(r, prompts, completions, columns), rewards))
        except (KeyboardInterrupt, SystemExit):
            close_rewards(rewards)  # else the pool would wait for them to the end of their limits
            raise
    parts = {r.name: values for r, (values, _, _) in zip(rewards, outcomes, strict=True)}
    total = np.asarray(sum(r.weight * parts[r.name] for r in rewards), dtype=np.float64)
    errors: dict[str, dict[str, int]] = {}
    for reward, (_, failures, _) in zip(rewards, outcomes, strict=True):
        errors[reward.name] = _no_errors()
        for failure in failures:
            errors[reward.name][failure.kind] += 1
        _report(reward, failures, prompts)
    seconds = {r.name: s for r, (_, _, s) in zip(rewards, outcomes, strict=True)}
    return Scores(total, parts, errors, seconds)


@dataclass(frozen=True)
class _Failure:
    kind: str  # error, timeout, none
    row: int
    message: str
    traceback: str = ""


def _report(reward: Reward, failures: Sequence[_Failure], prompts: Sequence[Prompt]) -> None:
    """Logs failures, and raises RewardError where there are too many."""
    if not failures:
        return
    for f in failures[:3]:
        _log.warning("reward %s: %s for the response to %r: %s", reward.name, f.kind, _start(prompts[f.row]), f.message)
    if len(failures) > 3:
        _log.warning("reward %s: failed on %d more responses", reward.name, len(failures) - 3)
    if reward.failure_value is not None and any(f.kind != "none" for f in failures):
        _log.warning("reward %s: errors and timeouts count as %g, its failure_value", reward.name, reward.failure_value)
    n, first = len(prompts), failures[0]
    what = f"the first ({first.kind}), to the prompt {_start(prompts[first.row])!r}: {first.message}"
    if len(failures) == n and (reward.failure_value is None or first.kind == "none"):
        raise RewardError(
            f"reward {reward.name} gave no score to any of {n} responses; {what}\n{first.traceback}".strip()
        )
    failed = [f for f in failures if f.kind != "none"]
    if len(failed) > reward.max_failures * n:
        raise RewardError(
            f"reward {reward.name} failed for {len(failed)} of {n} responses, above rewards.{reward.name}.max_failures"
            f" = {reward.max_failures:g}; {what}\n{first.traceback}".strip()
        )


def _no_errors() -> dict[str, int]:
    return {"error": 0, "timeout": 0, "none": 0}


def _score_one(
    reward: Reward, prompts: Sequence[Prompt], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]
) -> tuple[np.ndarray, list[_Failure], float]:
    """(N,) rewards, failures, seconds: one call for all, and where that fails, one a response within the same time.

    Processes that start anew have a limit's time beside that, or twice what the first took, or 5 s, whichever is most;
    what has no score when all of it has passed is given up.
    """
    start, n = time.perf_counter(), len(completions)
    until = time.monotonic() + 2 * reward.timeout + max(reward.timeout, 2 * reward.call.start, _STARTS)
    try:
        result = _numbers(reward.name, reward.call(prompts, completions, columns, reward.timeout, until), n)
        failures: list[_Failure] = []
    except UnsendableError as e:
        raise RewardError(f"reward {reward.name}: {e}") from e
    except (TimeoutError, CallFailed) as e:
        result = np.full(n, np.nan)
        if n == 1:
            failures = [_failure(0, e, reward.timeout)]
        else:
            failures = _one_by_one(reward, prompts, completions, columns, result, until)
    if reward.failure_value is not None:
        result[[f.row for f in failures]] = reward.failure_value
    failed = {f.row for f in failures}
    missing = [int(row) for row in np.flatnonzero(np.isnan(result)) if row not in failed]
    failures += [_Failure("none", row, "None or NaN") for row in missing]
    return result, failures, time.perf_counter() - start


def _one_by_one(
    reward: Reward,
    prompts: Sequence[Prompt],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    result: np.ndarray,
    until: float,
) -> list[_Failure]:
    """Fills `result` from a call a response.

    All together they have one limit's time in each of the processes; a response has at least its equal share of it, and
    what others leave, so that no number of hung ones costs the rest.
    """
    n, width = len(completions), min(reward.call.width, len(completions))
    budget, waiting, lock = reward.timeout * width, n, threading.Lock()

    def one(row: int) -> float | Exception:
        nonlocal budget, waiting
        with lock:
            limit = min(reward.timeout, budget / waiting)
            budget, waiting = budget - limit, waiting - 1
        own = {name: [values[row]] for name, values in columns.items()}
        start = time.monotonic()
        try:
            alone = reward.call([prompts[row]], [completions[row]], own, limit, until)
            return float(_numbers(reward.name, alone, 1)[0])
        except (TimeoutError, CallFailed, RewardError) as e:
            return e
        finally:
            with lock:
                budget += max(0.0, limit - (time.monotonic() - start))

    failures = []
    with ThreadPoolExecutor(width) as pool:
        for row, outcome in enumerate(pool.map(one, range(n))):
            if isinstance(outcome, RewardError):
                raise outcome
            if isinstance(outcome, Exception):
                failures.append(_failure(row, outcome, reward.timeout))
            else:
                result[row] = outcome
    return failures


def _failure(row: int, error: Exception, limit: float) -> _Failure:
    if isinstance(error, TimeoutError):
        return _Failure("timeout", row, f"no result within {limit:g} s")
    return _Failure("error", row, str(error), getattr(error, "traceback", ""))


def _numbers(name: str, values: Any, n: int) -> np.ndarray:
    """(n,) float64 from what a caller gave. Raises: RewardError: not one finite number or None each."""
    if not isinstance(values, list):
        raise RewardError(f"reward {name} returned {_start(values['text'])!r}; expected a list of {n} numbers or None")
    if len(values) != n:
        raise RewardError(f"reward {name} returned {len(values)} values for {n} completions; expected one each")
    for i, value in enumerate(values):
        if isinstance(value, dict):
            raise RewardError(
                f"reward {name} returned {_start(value['text'])!r} ({value['type']}) for completion {i};"
                " expected a number or None"
            )
        if value is not None and math.isinf(value):
            raise RewardError(f"reward {name} returned {value} for completion {i}; expected a finite number or None")
    return np.asarray([math.nan if v is None else v for v in values], dtype=np.float64)


def _start(value: Any, length: int = 80) -> str:
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= length else text[: length - 1] + "…"
