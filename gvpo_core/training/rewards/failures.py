"""Responses that a reward left without a score: counted, reported, and refused where they are too many."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gvpo_core.training.policy import Prompt
from gvpo_core.training.rewards.load import Reward

_log = logging.getLogger("gvpo.rewards")
_TRACEBACKS = 3  # different ones of a reward that a step writes to run.log


class RewardError(RuntimeError):
    """A reward that cannot be used: a wrong count, a wrong type, too many failures, or no response scored at all."""


@dataclass(frozen=True)
class Failure:
    """A response that a reward left without a score."""

    kind: str  # error, timeout, none
    row: int
    message: str
    traceback: str = ""


def counted_failures(
    rewards: Sequence[Reward], failures: Mapping[str, Sequence[Failure]], part_of: np.ndarray
) -> dict[str, list[Failure]]:
    """The failures by reward, without those responses that are of another task: not of concern to the reward.

    Args:
      part_of: (F, N) bool, as total.members has it.
    """
    nobody = np.asarray(~part_of.any(axis=0))
    return {
        r.name: [f for f in failures[r.name] if f.kind != "none" or part_of[i, f.row] or nobody[f.row]]
        for i, r in enumerate(rewards)
    }


def count_errors(failures: Mapping[str, Sequence[Failure]]) -> dict[str, dict[str, int]]:
    """Name -> kind -> responses."""
    none: dict[str, int] = {"error": 0, "timeout": 0, "none": 0}
    return {name: none | dict(Counter(f.kind for f in errors)) for name, errors in failures.items()}


def report(
    rewards: Sequence[Reward],
    failures: Mapping[str, Sequence[Failure]],
    prompts: Sequence[Prompt],
    responses: Sequence[Any],
) -> None:
    """Logs one warning for all failures of a step, with the first question and response of each reward that failed."""
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
    """The error of a step in which no response has a reward."""
    name, failed = max(failures.items(), key=lambda item: len(item[1]), default=("", ()))
    if not failed:
        return RewardError(f"no reward gave a score to any of {n} responses")
    return _no_score(name, failed[0], prompts, n)


def _no_score(name: str, first: Failure, prompts: Sequence[Prompt], n: int) -> RewardError:
    what = f"the first ({first.kind}), to the prompt {start_of(prompts[first.row])!r}: {first.message}"
    if first.kind == "none":  # as a judge whose requests fail, which prints why
        what += "; what the reward printed is in rewards.log, in the run folder"
    return RewardError(f"reward {name} gave no score to any of {n} responses; {what}\n{first.traceback}".strip())


def write_tracebacks(reward: Reward, failures: Sequence[Failure]) -> None:
    """Writes each different traceback to run.log."""
    seen = Counter(f.traceback or f.message for f in failures if f.kind != "none")
    for text, count in seen.most_common(_TRACEBACKS):
        reward.log.error(f"reward {reward.name} failed on {count} of the responses of a step:\n{text}")


def check_failures(reward: Reward, failures: Sequence[Failure], prompts: Sequence[Prompt]) -> None:
    """Raises RewardError where too many calls failed."""
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
