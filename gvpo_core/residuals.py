"""Objectives that regress the log-ratio on the reward with a baseline other than GVPO's group means.

Each is the gradient of a mean over responses of (baseline + R - beta s)^2 / (2 beta), with a constant baseline.
Notation as in `objective`. GVPO centres R and s alike, so a baseline drops out of its weights. Here it does not.
"""

from typing import Any

from gvpo_core._arrays import Array, check_rows, stop_gradient
from gvpo_core.groups import Groups
from gvpo_core.objective import checked_groups
from gvpo_core.regret import log_mean_exp


def mirror_descent_residual(
    logprobs: Array,
    ref_logprobs: Array,
    rewards: Array,
    group_ids: Array,
    beta: Any,
    *,
    num_groups: int | None,
    valid: Array | None,
) -> tuple[Groups, Array]:
    """Kimi k1.5's policy mirror descent: beta log Z is taken to be the group's mean reward.

    r_i = D(R)_i - beta s_i, not centred in s

    Returns: the groups, which count with two rows or more, and (N,) r in reward units; 0 for rows not counted.
    Reference: Kimi Team, arXiv 2501.12599, Section 2.3.2, Eq. 3, with pi_ref for its pi_theta_i and beta for its tau.
    """
    groups, log_ratio, rewards = checked_groups(
        logprobs, ref_logprobs, rewards, group_ids, num_groups, valid, smallest=2
    )
    return groups, groups.center(rewards) - beta * _counted(groups, log_ratio)


def optimal_advantage_residual(
    logprobs: Array,
    ref_logprobs: Array,
    old_logprobs: Any,
    rewards: Array,
    group_ids: Array,
    beta: Any,
    *,
    num_groups: int | None,
    valid: Array | None,
) -> tuple[Groups, Array]:
    """A*-PO's optimal advantage regression, with V estimated from the group's own responses.

    r_i = R_i - V - beta s_i, V = beta log mean_j exp(R_j / beta - (log pi_old - log pi_ref)_j)

    Returns: the groups, which count with two rows or more, and (N,) r in reward units; 0 for rows not counted.
    Reference: Brantley et al., arXiv 2505.20686, the two stages of Algorithm 1 with beta_1 = beta_2 = beta. Departures:
      the paper estimates V once, from responses of pi_ref only. Here the responses are pi_old's, so each is weighted
      by pi_ref / pi_old. With pi_old = pi_ref it is the paper's estimate.
    """
    check_rows({"logprobs": logprobs, "old_logprobs": old_logprobs})
    groups, _, rewards = checked_groups(logprobs, ref_logprobs, rewards, group_ids, num_groups, valid, smallest=2)
    xp = groups.xp
    now, before, ref = (xp.astype(x, rewards.dtype) for x in (logprobs, old_logprobs, ref_logprobs))
    moved, old = now - stop_gradient(before), stop_gradient(before - ref)
    # r = beta (e - log mean exp(e)) - beta (s - s_old), e = R / beta - s_old minus its maximum: large numbers cancel
    exponent = _counted(groups, groups.center(rewards) / beta - old)
    exponent = _counted(groups, exponent - groups.per_row(groups.max(stop_gradient(exponent))))
    excess = exponent - groups.per_row(log_mean_exp(groups, exponent))
    return groups, beta * _counted(groups, excess - moved)


def _counted(groups: Groups, values: Array) -> Array:
    """Returns (N,) values, 0 for rows that do not count."""
    return groups.xp.where(groups.counted, values, groups.xp.zeros_like(values))
