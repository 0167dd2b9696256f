"""Calls the user's reward functions so that one bad response or one hung call does not stop a run.

A reward function follows TRL's convention: `reward(prompts, completions, **columns) -> list[float | None]`, plain or
async. It may leave out arguments that it does not use. A completion is text, or a list of one assistant message if the
prompt is chat messages. `columns` are the other columns of the data, one value for each response, and `completion_ids`.
"""

import math
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gvpo_core.training.policy import Prompt
from gvpo_core.training.rewards.clock import now
from gvpo_core.training.rewards.failures import (
    Failure,
    RewardError,
    check_failures,
    count_errors,
    counted_failures,
    no_score,
    report,
    start_of,
    write_tracebacks,
)
from gvpo_core.training.rewards.load import Reward, close_rewards
from gvpo_core.training.rewards.process import CallFailed
from gvpo_core.training.rewards.total import members, total_rewards
from gvpo_core.training.rewards.worker.encoding import LARGEST_REWARD, UnsendableError

_STARTS = 5.0  # minimum of the seconds that a step allows for processes to restart


@dataclass(frozen=True)
class Calls:
    """Results of the reward functions for N responses, before they are combined by group."""

    parts: dict[str, np.ndarray]  # name -> (N,) float64, unweighted; NaN = missing
    failures: dict[str, list[Failure]]  # name -> one for each response without a score of its own
    seconds: dict[str, float]  # name -> seconds the reward took

    def failed(self, name: str) -> np.ndarray:
        """(N,) bool: the reward raised an error or timed out."""
        mask = np.zeros(len(self.parts[name]), bool)
        mask[[f.row for f in self.failures[name] if f.kind != "none"]] = True
        return mask


@dataclass(frozen=True)
class Scores:
    """The rewards of N responses."""

    total: np.ndarray  # (N,) float64, weighted sum; NaN = no reward
    parts: dict[str, np.ndarray]  # name -> (N,) float64, unweighted; NaN = missing
    errors: dict[str, dict[str, int]] = field(default_factory=dict)  # name -> {"error" | "timeout" | "none": count}
    seconds: dict[str, float] = field(default_factory=dict)  # name -> seconds the reward took


def score(
    rewards: Sequence[Reward],
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    group_ids: Sequence[int] | None = None,
) -> Scores:
    """Calls all rewards at the same time on the N responses, and computes the weighted totals.

    A response has no score if a reward raises an error, runs out of time, or returns None or NaN for it. If the call
    for all responses fails, each response is tried alone, so that only the bad ones are lost. A reward that returns
    None for all responses of a group does not count in that group's total (see total.total_rewards).

    Args:
      group_ids: (N,) labels. Default: responses to equal prompts are a group.
    Raises: RewardError: a wrong number of results, a result that is not a number, or no response scored.
    """
    calls = call_rewards(rewards, prompts, responses, columns)
    if group_ids is None:
        texts = [repr(prompt) for prompt in prompts]
        group_ids = [texts.index(text) for text in texts]
    groups = np.asarray(group_ids, np.int64)
    parts, failed = stacked(rewards, calls, len(responses))
    total = total_rewards(parts, failed, [r.weight for r in rewards], groups)
    counted = counted_failures(rewards, calls.failures, members(parts, failed, groups))
    report(rewards, counted, prompts, responses)
    if len(responses) and np.isnan(total).all():
        raise no_score(counted, prompts, len(responses))
    return Scores(total, calls.parts, count_errors(counted), calls.seconds)


def stacked(rewards: Sequence[Reward], calls: Calls, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (F, N) float scores and (F, N) bool, True if the function failed."""
    parts = np.asarray([calls.parts[r.name] for r in rewards], np.float64).reshape(len(rewards), n)
    failed = np.asarray([calls.failed(r.name) for r in rewards], bool).reshape(len(rewards), n)
    return parts, failed


def call_rewards(
    rewards: Sequence[Reward],
    prompts: Sequence[Prompt],
    responses: Sequence[str | list[dict[str, Any]]],
    columns: Mapping[str, Sequence[Any]],
) -> Calls:
    """Calls all rewards at the same time.

    Args:
      responses: text, or messages that follow the prompt's.
    Raises: RewardError: an invalid result, or too many failures.
    """
    completions = [
        response
        if isinstance(prompt, str) or not isinstance(response, str)
        else [{"role": "assistant", "content": response}]
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    if not completions:
        return Calls({r.name: np.zeros(0) for r in rewards}, {r.name: [] for r in rewards}, {})
    with ThreadPoolExecutor(len(rewards)) as pool:
        try:
            outcomes = list(pool.map(lambda r: _score_one(r, prompts, completions, columns), rewards))
        except (KeyboardInterrupt, SystemExit):
            close_rewards(rewards)  # otherwise the pool waits until their time limits
            raise
    for reward, (_, failures, _) in zip(rewards, outcomes, strict=True):
        write_tracebacks(reward, failures)
        check_failures(reward, failures, prompts)
    named = list(zip(rewards, outcomes, strict=True))
    return Calls(
        parts={r.name: values for r, (values, _, _) in named},
        failures={r.name: failures for r, (_, failures, _) in named},
        seconds={r.name: seconds for r, (_, _, seconds) in named},
    )


def _score_one(
    reward: Reward, prompts: Sequence[Prompt], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]
) -> tuple[np.ndarray, list[Failure], float]:
    """Returns (N,) rewards, failures, and seconds.

    Makes one call for all responses. If it fails, makes one call for each within the same time limit. Restarts of
    processes get extra time: one limit, twice the first start, or 5 s, whichever is longest. Responses without a score
    after all this time have failed.
    """
    start, n = time.perf_counter(), len(completions)
    until = now() + 2 * reward.timeout + max(reward.timeout, 2 * reward.call.start, _STARTS)
    try:
        result = _numbers(reward.name, reward.call(prompts, completions, columns, reward.timeout, until), n)
        failures: list[Failure] = []
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
    failures += [Failure("none", row, "None or NaN") for row in missing]
    return result, failures, time.perf_counter() - start


def _one_by_one(
    reward: Reward,
    prompts: Sequence[Prompt],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    result: np.ndarray,
    until: float,
) -> list[Failure]:
    """Calls the reward for each response alone and writes the scores into `result`. Returns the failures.

    All calls share one time limit in each process. Each response gets an equal share of the time plus what earlier
    ones did not use, so that hung calls do not take the time of the others.
    """
    n, width = len(completions), min(reward.call.width, len(completions))
    budget, waiting, lock = reward.timeout * width, n, threading.Lock()

    def score_row(row: int) -> float | Exception:
        nonlocal budget, waiting
        with lock:
            limit = min(reward.timeout, budget / waiting)
            budget, waiting = budget - limit, waiting - 1
        row_columns = {name: [values[row]] for name, values in columns.items()}
        start = now()
        try:
            answer = reward.call([prompts[row]], [completions[row]], row_columns, limit, until)
            return float(_numbers(reward.name, answer, 1)[0])
        except (TimeoutError, CallFailed, RewardError) as e:
            return e
        finally:
            with lock:
                budget += max(0.0, limit - (now() - start))

    failures = []
    with ThreadPoolExecutor(width) as pool:
        for row, outcome in enumerate(pool.map(score_row, range(n))):
            if isinstance(outcome, RewardError):
                raise outcome
            if isinstance(outcome, Exception):
                failures.append(_failure(row, outcome, reward.timeout))
            else:
                result[row] = outcome
    return failures


def _failure(row: int, error: Exception, limit: float) -> Failure:
    if isinstance(error, TimeoutError):
        return Failure("timeout", row, f"no result within {limit:g} s")
    return Failure("error", row, str(error), getattr(error, "traceback", ""))


def _numbers(name: str, values: Any, n: int) -> np.ndarray:
    """(n,) float64 from a caller's result; None becomes NaN.

    Raises: RewardError: the result is not a list of n finite numbers or None.
    """
    if isinstance(values, dict) and "count" in values:
        raise RewardError(f"reward {name} returned {values['count']} values for {n} completions; expected one each")
    if not isinstance(values, list):
        raise RewardError(
            f"reward {name} returned {start_of(values['text'])!r}; expected a list of {n} numbers or None"
        )
    for i, value in enumerate(values):
        if isinstance(value, dict):
            raise RewardError(
                f"reward {name} returned {start_of(value['text'])!r} ({value['type']}) for completion {i};"
                " expected a number or None"
            )
        if value is not None and math.isinf(value):
            raise RewardError(f"reward {name} returned {value} for completion {i}; expected a finite number or None")
        if value is not None and abs(value) > LARGEST_REWARD:
            raise RewardError(
                f"reward {name} returned {value:g} for completion {i}; expected a number within {LARGEST_REWARD:g}"
                " (float32), or None"
            )
    return np.asarray([math.nan if v is None else v for v in values], dtype=np.float64)
