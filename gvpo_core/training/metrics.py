"""Computes the numbers of a run: one line of metrics.jsonl from one step's rollout and improvement.

A line is one JSON object with `kind` ("train", "eval" or "event"), `step` and `time`; non-finite numbers are written
as null. Pure NumPy, float64.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gvpo_core.objective import gvpo_loss
from gvpo_core.regret import gvpo_regret
from gvpo_core.training.episodes import ends_of, episode_metrics
from gvpo_core.training.improve import Improvement
from gvpo_core.training.intervals import mean_half_width, prompts_half_width
from gvpo_core.training.objective import response_weights
from gvpo_core.training.rollout import Rollout
from gvpo_core.training.samplers.gaps import gaps
from gvpo_core.training.watch.metric_names import PHASES


def step_metrics(
    rollout: Rollout,
    improvement: Improvement,
    *,
    beta: float,
    length_exponent: float = 0.0,
    seconds: float | None = None,
    reward_range: tuple[float, float] | None = None,
) -> dict[str, float]:
    """Returns the numbers of one training step, by the names in METRICS. Keys without a meaning are left out.

    Args:
      beta: the objective's.
      length_exponent: the objective's (GVPO++); 0: all responses have the same weight.
      seconds: wall time of the whole step. Default: the sum of its phases.
      reward_range: lowest and highest reward of earlier steps, if known.
    Raises: ValueError: arrays whose lengths differ, or a group id out of range; the message names it.
    """
    rewards = np.asarray(rollout.rewards, dtype=np.float64)
    scored = ~np.isnan(rewards)
    metrics: dict[str, float] = {"responses/total": rewards.size, "responses/unscored": int((~scored).sum())}
    if rollout.left_out is not None:
        metrics["responses/left_out"] = int((rollout.left_out & scored).sum())
    metrics |= _objective_metrics(rollout, improvement, beta, length_exponent)
    drawn = rollout.drawn if rollout.drawn.any() else np.ones(rewards.size, bool)  # a mixture counts its drawn rows
    metrics |= _group_metrics(rollout, rewards, drawn, reward_range)
    for name, values in rollout.parts.items():
        metrics[f"reward/{name}"] = _mean(np.asarray(values, dtype=np.float64)[drawn])
    for name, kinds in rollout.errors.items():
        metrics |= {f"reward_errors/{name}/{kind}": count for kind, count in kinds.items()}
    metrics |= {f"reward_seconds/{name}": taken for name, taken in rollout.reward_seconds.items()}
    updates = improvement.updates
    if updates:
        norms = [update.gradient_norm for update in updates]
        metrics["gradient_norm"], metrics["gradient_norm/max"] = float(np.mean(norms)), float(np.max(norms))
        metrics["learning_rate"] = updates[-1].learning_rate
    metrics |= {
        "tokens/sampled": int(np.asarray(rollout.lengths)[rollout.drawn].sum()),
        "tokens/computed": improvement.tokens,
        "memory/peak": improvement.peak_memory,
    }
    if rollout.sampler_logprobs is not None:
        gap = gaps(rollout.sampler_logprobs, improvement.logprobs, rollout.lengths)
        metrics |= {"sampler/gap": float(gap.mean()), "sampler/gap/max": float(gap.max())} if gap.size else {}
    if rollout.staleness is not None and (stale := rollout.staleness[~np.isnan(rollout.staleness)]).size:
        metrics |= {"sampler/staleness": float(stale.mean()), "sampler/staleness/max": int(stale.max())}
    metrics |= _length_metrics(
        np.asarray(rollout.lengths, np.float64)[drawn], np.asarray(rollout.finished, bool)[drawn], rewards[drawn]
    )
    metrics |= {} if rollout.episodes is None else episode_metrics(rollout.episodes)
    scoring = rollout.seconds.get("score", 0.0) + improvement.score_seconds
    phases = {**rollout.seconds, "score": scoring, "update": improvement.update_seconds}
    metrics |= _time_metrics(phases, seconds, int(np.sum(rollout.lengths))) | rollout.details
    return metrics | {f"policy/{name}": value for update in updates[-1:] for name, value in update.details.items()}


def evaluation_metrics(
    rewards: np.ndarray,
    prompt_ids: Sequence[int],
    lengths: np.ndarray,
    finished: np.ndarray,
    *,
    seconds: float,
    reward_parts: Mapping[str, np.ndarray] | None = None,
    rewarded: bool = True,
    episodes: np.ndarray | None = None,
) -> dict[str, float]:
    """Returns the numbers of one evaluation. N held-out responses, any number per prompt.

    Args:
      rewards: (N,) float, total; NaN = unscored.
      prompt_ids: N labels of the held-out prompts.
      lengths: (N,) int, tokens.
      finished: (N,) bool.
      seconds: time of the evaluation.
      reward_parts: name -> (N,).
      rewarded: whether anything scores the responses.
      episodes: (N, NUMBERS) of `episode_rows`; None: single responses.
    """
    answered = {
        "eval/length": float(np.mean(lengths)),
        "eval/truncated": float(1 - np.mean(finished)),
        "seconds/evaluate": seconds,
    }
    answered |= {} if episodes is None else {f"eval/{key}": share for key, share in ends_of(episodes).items()}
    if not rewarded:
        return {"eval/prompts": len({*prompt_ids})} | answered
    rewards = np.asarray(rewards, dtype=np.float64)
    means = _group_means(rewards, np.unique(np.asarray(prompt_ids), return_inverse=True)[1])
    metrics = {
        "eval/reward": _mean(means),
        "eval/prompts": int(means.size),
        "eval/unscored": int(np.isnan(rewards).sum()),
    } | answered
    if means.size > 1:
        metrics["eval/half_width"] = prompts_half_width(means)
    for name, values in (reward_parts or {}).items():
        metrics[f"eval/reward/{name}"] = _mean(np.asarray(values, dtype=np.float64))
    return metrics


def teacher_metrics(log_ratios: np.ndarray, prompt_ids: Sequence[int]) -> dict[str, float]:
    """Returns the KL of the policy to its teacher on held-out prompts.

    Args:
      log_ratios: (N,) log pi - log pi_T of responses that the policy drew at temperature 1, nats; NaN = unscored.
      prompt_ids: N labels of the prompts.
    """
    means = _group_means(log_ratios, np.unique(np.asarray(prompt_ids), return_inverse=True)[1])
    metrics = {"eval/teacher_kl": _mean(means)}
    if means.size > 1:
        metrics["eval/teacher_kl_half_width"] = mean_half_width(means[~np.isnan(means)])
    return metrics


def _objective_metrics(
    rollout: Rollout, improvement: Improvement, beta: float, length_exponent: float
) -> dict[str, float]:
    logprobs = np.asarray(improvement.logprobs, dtype=np.float64)
    reference = np.asarray(improvement.ref_logprobs, dtype=np.float64)
    rewards, groups = np.asarray(rollout.trained_rewards, dtype=np.float64), np.asarray(rollout.group_ids)
    options: dict[str, Any] = {"beta": beta, "num_groups": rollout.num_groups}
    options["response_weights"] = response_weights(rollout.lengths, length_exponent)
    loss = gvpo_loss(logprobs, reference, rewards, groups, **options)
    metrics = {
        "loss": float(loss.loss),
        "loss/implicit_variance": float(loss.implicit_variance),
        "loss/reward_variance": float(loss.reward_variance),
        "loss/covariance": float(loss.covariance),
        "reward/spread": float(np.sqrt(loss.group_reward_variance).sum() / max(float(loss.counted_groups), 1)),
    }
    if beta > 0:
        with np.errstate(invalid="ignore"):  # alerts report a NaN
            regret = gvpo_regret(logprobs, reference, rewards, groups, **options)
        metrics["regret/second_order"] = float(regret.second_order)
        metrics["regret/series"] = float(regret.series)
    counted = ~np.isnan(rewards) & (loss.group_size[groups] >= 2)
    # Rows outside the loss may not have been scored, so their NaN means nothing. A NaN inside the loss must show.
    shown = counted | ~np.isnan(logprobs)
    for rows, entropy, kl in ((rollout.drawn, "entropy", "kl"), (~rollout.drawn, "nll", "log_ratio")):
        if (shown & rows).any():
            metrics[entropy] = float(-logprobs[shown & rows].sum() / np.sum(np.asarray(rollout.lengths)[shown & rows]))
        if (counted & rows).any():
            metrics[kl] = float((logprobs - reference)[counted & rows].mean())
    if rollout.left_out is not None:
        scored = np.bincount(groups[~np.isnan(rollout.rewards)], minlength=rollout.num_groups)
        metrics["groups/left_out"] = int((scored >= 2).sum() - loss.counted_groups)
    return metrics


def _length_metrics(lengths: np.ndarray, finished: np.ndarray, rewards: np.ndarray) -> dict[str, float]:
    metrics = {
        "length/mean": float(lengths.mean()),
        "length/max": int(lengths.max()),
        "truncated": float(1 - finished.mean()),
    }
    if not finished.all():
        metrics["length/truncated"] = float(lengths[~finished].mean())
    if not np.isnan(rewards).all() and np.nanmax(rewards) > np.nanmin(rewards):
        for name, reward in (("best", np.nanmax(rewards)), ("worst", np.nanmin(rewards))):
            if (chosen := finished & (rewards == reward)).any():
                metrics[f"length/{name}"] = float(lengths[chosen].mean())
    return metrics


def _group_metrics(
    rollout: Rollout, rewards: np.ndarray, drawn: np.ndarray, reward_range: tuple[float, float] | None
) -> dict[str, float]:
    """Returns the numbers of groups and rewards. Args: drawn: (N,) bool, the rows whose rewards are the policy's."""
    groups, scored = np.asarray(rollout.group_ids), ~np.isnan(rewards)
    size = np.bincount(groups[scored], minlength=rollout.num_groups)
    low = np.full(rollout.num_groups, np.inf)
    high = np.full(rollout.num_groups, -np.inf)
    np.minimum.at(low, groups[scored], rewards[scored])
    np.maximum.at(high, groups[scored], rewards[scored])
    dead = (size >= 2) & (low == high)
    metrics: dict[str, float] = {
        "groups/total": rollout.num_groups,
        "groups/counted": int((size >= 2).sum()),
        "groups/dropped_unscored": int((size < 2).sum()),
    }
    if not rollout.rewarded:
        return metrics
    if not rollout.taught:
        metrics["groups/all_equal"] = int(dead.sum())
    if not (scored & drawn).any():
        return metrics
    mean, worst, best = (float(f(rewards[scored & drawn])) for f in (np.mean, np.min, np.max))
    metrics |= {"reward/mean": mean, "reward/min": worst, "reward/max": best}
    if (means := _group_means(rewards[drawn], groups[drawn])).size > 1:
        metrics["reward/half_width"] = mean_half_width(means)
    if reward_range is not None:
        worst, best = min(worst, reward_range[0]), max(best, reward_range[1])
    if rollout.taught:
        return metrics
    rewards_differ = best > worst  # a single value so far is neither best nor worst
    metrics["groups/all_best"] = int((dead & (high == best)).sum()) if rewards_differ else 0
    metrics["groups/all_worst"] = int((dead & (low == worst)).sum()) if rewards_differ else 0
    return metrics


def _time_metrics(phases: dict[str, float], step: float | None, tokens_sampled: int) -> dict[str, float]:
    total = sum(phases.values()) if step is None else step
    if total - sum(phases.values()) > 0:
        phases["other"] = total - sum(phases.values())
    metrics = {f"seconds/{phase}": value for phase, value in phases.items()} | {"seconds/step": total}
    if total > 0:
        metrics |= {f"share/{phase}": value / total for phase, value in phases.items()}
    working = sum(phases.get(phase, 0.0) for phase in PHASES[:4])
    return metrics | ({"tokens_per_second": tokens_sampled / working} if working > 0 else {})


def _group_means(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Returns the mean over the scored rows of each group that has any."""
    scored = ~np.isnan(values)
    size = np.bincount(groups[scored])
    total = np.bincount(groups[scored], weights=values[scored])
    means: np.ndarray = total[size > 0] / size[size > 0]
    return means


def _mean(values: np.ndarray) -> float:
    scored = values[~np.isnan(values)]
    return float(scored.mean()) if scored.size else math.nan


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the records of a file; skips lines that are not JSON objects, which a killed run may leave."""
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict):
                yield record
