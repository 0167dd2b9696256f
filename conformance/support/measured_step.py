"""A step's rollout and improvement from plain numbers, and records as the run folder writes them."""

import json
import math
from typing import Any

import numpy as np

from gvpo_core.training.improve import Improvement
from gvpo_core.training.metrics import step_metrics
from gvpo_core.training.policy import Batch, Update
from gvpo_core.training.rollout import Rollout


def metrics_of(
    *, logprobs, ref_logprobs, rewards, group_ids, num_groups, lengths, finished, beta, gradient_norms, learning_rate,
    seconds, tokens_computed, peak_memory, reward_parts=None, reward_errors=None, reward_seconds=None,
    policy_details=None, reward_range=None, step_seconds=None,
) -> dict[str, float]:  # fmt: skip
    """`step_metrics` of N responses in `num_groups` groups; `seconds` by phase, and of the whole step."""
    rollout = Rollout(
        batch=Batch([], [], []), start=0, group_ids=group_ids, num_groups=num_groups, rewards=rewards,
        parts=reward_parts or {}, errors=reward_errors or {}, lengths=lengths, finished=finished, completions=[],
        seconds={k: v for k, v in seconds.items() if k not in ("score", "update")}, reward_seconds=reward_seconds or {},
    )  # fmt: skip
    updates = [Update(logprobs, norm, learning_rate, 0, 0, policy_details or {}) for norm in gradient_norms]
    improvement = Improvement(
        logprobs,
        ref_logprobs,
        updates,
        seconds.get("score", 0.0),
        seconds.get("update", 0.0),
        tokens_computed,
        peak_memory,
    )
    return step_metrics(rollout, improvement, beta=beta, seconds=step_seconds, reward_range=reward_range)


def make_record(kind: str, step: int, values: dict[str, Any], *, now: float = 0.0) -> dict[str, Any]:
    """One record of metrics.jsonl: `kind`, `step`, `time`, then the values; what is not finite becomes None."""
    plain = {key: value.item() if isinstance(value, np.generic) else value for key, value in values.items()}
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in plain.items()}
    return {"kind": kind, "step": int(step), "time": now, **finite}


def encode_record(record: dict[str, Any]) -> str:
    """The record as one line."""
    return json.dumps(record, allow_nan=False) + "\n"
