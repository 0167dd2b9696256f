"""Counts and reports responses that a reward did not score; raises an error if there are too many."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gvpo_core.training.policy import Prompt
from gvpo_core.training.rewards.load import Reward

_log = logging.getLogger("gvpo.rewards")
_TRACEBACKS = 3  # different tracebacks of a reward that a step writes to run.log


class RewardError(RuntimeError):
    """A reward cannot be used: wrong number or type of results, too many failures, or no response scored."""


@dataclass(frozen=True)
class Failure:
    """A response that a reward did not score."""

    kind: str  # error, timeout, none
    row: int
    message: str
    traceback: str = ""


def counted_failures(
    rewards: Sequence[Reward], failures: Mapping[str, Sequence[Failure]], part_of: np.ndarray
) -> dict[str, list[Failure]]:
    """The failures by reward, without None results for responses of tasks that the reward does not score.

    Args:
      part_of: (F, N) bool, from total.members.
    """
    unclaimed = np.asarray(~part_of.any(axis=0))
    return {
        r.name: [f for f in failures[r.name] if f.kind != "none" or part_of[i, f.row] or unclaimed[f.row]]
        for i, r in enumerate(rewards)
    }


def count_errors(failures: Mapping[str, Sequence[Failure]]) -> dict[str, dict[str, int]]:
    """The number of failed responses: reward -> kind -> count."""
    zero_counts: dict[str, int] = {"error": 0, "timeout": 0, "none": 0}
    return {name: zero_counts | dict(Counter(f.kind for f in errors)) for name, errors in failures.items()}


def report(
    rewards: Sequence[Reward],
    failures: Mapping[str, Sequence[Failure]],
    prompts: Sequence[Prompt],
    responses: Sequence[Any],
) -> None:
    """Logs one warning for all failures of a step, with the first failed prompt and response of each reward."""
    messages = []
    for reward in rewards:
        if not (failed := failures[reward.name]):
            continue
        kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(f.kind for f in failed).items())
        first = failed[0]
        text = (
            f"reward {reward.name}: {len(failed)} of {len(responses)} responses failed ({kinds}); the first,"
            f" {first.kind}, is {start_of(responses[first.row], 200)!r} to {start_of(prompts[first.row], 200)!r}:"
            f" {first.message}"
        )
        if reward.failure_value is not None and any(f.kind != "none" for f in failed):
            text += f"; errors and timeouts count as {reward.failure_value:g}, its failure_value"
        messages.append(text)
    if messages:
        _log.warning("%s", "; ".join(messages))


def no_score(failures: Mapping[str, Sequence[Failure]], prompts: Sequence[Prompt], n: int) -> RewardError:
    """The error for a step in which no response has a reward."""
    name, failed = max(failures.items(), key=lambda item: len(item[1]), default=("", ()))
    if not failed:
        return RewardError(f"no reward gave a score to any of {n} responses")
    return _no_score(name, failed[0], prompts, n)


def _no_score(name: str, first: Failure, prompts: Sequence[Prompt], n: int) -> RewardError:
    detail = f"the first ({first.kind}), to the prompt {start_of(prompts[first.row])!r}: {first.message}"
    if first.kind == "none":  # for example a judge, which prints why its requests fail
        detail += "; what the reward printed is in rewards.log, in the run folder"
    return RewardError(f"reward {name} gave no score to any of {n} responses; {detail}\n{first.traceback}".strip())


def write_tracebacks(reward: Reward, failures: Sequence[Failure]) -> None:
    """Writes each different traceback to run.log."""
    seen = Counter(f.traceback or f.message for f in failures if f.kind != "none")
    for text, count in seen.most_common(_TRACEBACKS):
        reward.log.error(f"reward {reward.name} failed on {count} of the responses of a step:\n{text}")


def check_failures(reward: Reward, failures: Sequence[Failure], prompts: Sequence[Prompt]) -> None:
    """Raises RewardError: too many calls failed."""
    n, failed = len(prompts), [f for f in failures if f.kind != "none"]
    if not failed:
        return
    if len(failed) == n and reward.failure_value is None:
        raise _no_score(reward.name, failures[0], prompts, n)
    if len(failed) > reward.max_failures * n:
        first = failed[0]
        raise RewardError(
            f"reward {reward.name} failed for {len(failed)} of {n} responses, above rewards.{reward.name}.max_failures"
            f" = {reward.max_failures:g}; the first ({first.kind}), to the prompt {start_of(prompts[first.row])!r}:"
            f" {first.message}\n{first.traceback}".strip()
        )


def start_of(value: Any, length: int = 80) -> str:
    """The first characters of a value's text."""
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= length else text[: length - 1] + "…"
