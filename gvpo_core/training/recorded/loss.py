"""Metrics of an evaluation by loss: held-out recorded groups under the policy."""

import numpy as np

from gvpo_core.objective import gvpo_loss
from gvpo_core.preferences import dpo_loss
from gvpo_core.training.config import ObjectiveConfig
from gvpo_core.training.objective import response_weights
from gvpo_core.training.rollout import Rollout


def loss_metrics(rollout: Rollout, logprobs: np.ndarray, objective: ObjectiveConfig) -> dict[str, float]:
    """Computes the loss of the objective, how well the policy orders the responses, and their log-probability.

    Args:
      rollout: N recorded responses.
      logprobs: (N,) float64, nats; NaN if a response has no reward.
    """
    rewards, groups = rollout.rewards, rollout.group_ids
    scored = ~np.isnan(rewards)
    reference = logprobs if rollout.ref_logprobs is None else rollout.ref_logprobs
    metrics = {
        "eval/loss": _loss(rollout, logprobs, reference, objective),
        "eval/nll": float(-logprobs[scored].sum() / rollout.lengths[scored].sum()),
        "eval/groups": rollout.num_groups,
    }
    if rollout.ref_logprobs is not None:
        ordered = [
            _ordered((logprobs - reference)[scored & (groups == g)], rewards[scored & (groups == g)])
            for g in range(rollout.num_groups)
        ]
        shares = [share for share in ordered if share is not None]
        metrics |= {"eval/accuracy": float(np.mean(shares))} if shares else {}
    return metrics


def _loss(rollout: Rollout, logprobs: np.ndarray, reference: np.ndarray, objective: ObjectiveConfig) -> float:
    rewards, groups = rollout.rewards, rollout.group_ids
    beta, count = objective.beta, rollout.num_groups
    if objective.name == "dpo":
        return float(dpo_loss(logprobs, reference, rewards, groups, beta=beta, num_groups=count))
    if objective.name in ("sft", "reject_sampling"):
        scored, means = ~np.isnan(rewards), []
        for g in range(count):
            rows = scored & (groups == g)
            if objective.name == "reject_sampling" and rows.any():
                rows &= rewards == rewards[rows].max()
            means += [-logprobs[rows].mean()] if rows.any() else []
        return float(np.mean(means))
    weights = response_weights(rollout.lengths, objective.length_exponent)
    loss = gvpo_loss(logprobs, reference, rewards, groups, beta=beta, num_groups=count, response_weights=weights)
    return float(loss.loss)


def _ordered(ratios: np.ndarray, rewards: np.ndarray) -> float | None:
    """Share of pairs with different rewards that the ratios order like the rewards; ties count half. None: no pairs."""
    better = rewards[:, None] > rewards[None, :]
    if not better.any():
        return None
    higher = np.sign(ratios[:, None] - ratios[None, :])[better]
    return float(((higher + 1) / 2).mean())
