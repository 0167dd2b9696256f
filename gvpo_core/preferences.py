"""Preferences: DPO on the best and the worst response of a group, and the reward model's loss on pairs.

Notation and conventions are those of `objective` and `baselines`.
"""

from typing import Any

from gvpo_core._arrays import Array, check_beta, check_rows, constant, stop_gradient, wide_dtype
from gvpo_core.groups import Groups
from gvpo_core.objective import checked_groups


def dpo_weights(
    logprobs: Array,
    ref_logprobs: Array,
    rewards: Array,
    group_ids: Array,
    *,
    beta: float,
    num_groups: int | None = None,
    valid: Array | None = None,
) -> Array:
    """DPO in the unified framework: the best response of a group against the worst.

    w = sigmoid(beta s_worst - beta s_best) for the best, -w for the worst, 0 for the others

    These are the weights of Eq. 9. The gradient of Eq. 8 is beta times as large: -beta sum_i w_i grad log pi_i.

    Args:
      logprobs: (N,) float, nats; log pi_theta of complete responses.
      ref_logprobs: (N,) float, nats; log pi_ref.
      rewards: (N,) real; only their order matters. NaN = no score, the response leaves its group.
      group_ids: (N,) integer in 0..num_groups-1; rows of a group may be anywhere.
      beta: per nat, one finite number > 0.
      num_groups: static int. Default: largest id + 1. Required under compilation.
      valid: (N,) bool; True = counted. Default: all.
    Returns: (N,); sums to zero in each group; 0 if all rewards of the group are equal or fewer than two count.
    Raises: TypeError, ValueError: an argument of a wrong type, dtype, shape, device or value; the message names it.
    Reference: Zhang et al., GVPO, arXiv 2504.19599, Eq. 8 and 9. Departures: tied best (worst) responses
      share the weight, and s is then their mean, so that the order of rows does not matter.
    """
    groups, chosen, rejected, margin = pairs(logprobs, ref_logprobs, rewards, group_ids, beta, num_groups, valid)
    share, sigmoid = chosen - rejected, groups.per_row(groups.xp.exp(-_softplus(groups.xp, margin)))
    return stop_gradient(groups.xp.where(share != 0, sigmoid * share, groups.xp.zeros_like(share)))


def dpo_loss(
    logprobs: Array,
    ref_logprobs: Array,
    rewards: Array,
    group_ids: Array,
    *,
    beta: float,
    num_groups: int | None = None,
    valid: Array | None = None,
) -> Array:
    """DPO's loss with the best response of each group as chosen and the worst as rejected.

    loss = -mean over groups of log sigmoid(beta s_best - beta s_worst)

    Args:
      logprobs: (N,) float, nats; log pi_theta of complete responses; differentiated.
      ref_logprobs: (N,) float, nats; log pi_ref.
      rewards: (N,) real; only their order matters. NaN = no score, the response leaves its group.
      group_ids: (N,) integer in 0..num_groups-1; rows of a group may be anywhere.
      beta: per nat, one finite number > 0.
      num_groups: static int. Default: largest id + 1. Required under compilation.
      valid: (N,) bool; True = counted. Default: all.
    Returns: (), nats; mean over the groups whose rewards are not all equal, 0 without any.
    Raises: TypeError, ValueError: an argument of a wrong type, dtype, shape, device or value; the message names it.
    Reference: Zhang et al., GVPO, arXiv 2504.19599, Eq. 8. Departures: the mean instead of Eq. 8's sum; ties as
      in dpo_weights.
    """
    groups, _, _, margin = pairs(logprobs, ref_logprobs, rewards, group_ids, beta, num_groups, valid)
    return groups.mean(groups.xp.where(groups.kept, _softplus(groups.xp, -margin), groups.xp.zeros_like(margin)))


def bradley_terry_loss(chosen_rewards: Array, rejected_rewards: Array, *, valid: Array | None = None) -> Array:
    """The reward model's loss on preference pairs.

    loss = -mean over pairs of log sigmoid(R_chosen - R_rejected)

    Args:
      chosen_rewards: (M,) float, a reward model's scores; differentiated. A pair with a NaN is dropped.
      rejected_rewards: (M,) float, like chosen_rewards.
      valid: (M,) bool; True = counted. Default: all.
    Returns: (), nats; mean over the counted pairs, 0 without any.
    Raises: TypeError, ValueError: an argument of a wrong type, dtype, shape or device; the message names it.
    Reference: Zhang et al., GVPO, arXiv 2504.19599, Eq. 4. Departures: the mean instead of Eq. 4's sum.
    """
    xp = check_rows({"chosen_rewards": chosen_rewards, "rejected_rewards": rejected_rewards}, valid=valid)
    dtype = wide_dtype(xp, chosen_rewards, rejected_rewards)
    margin = xp.astype(chosen_rewards, dtype) - xp.astype(rejected_rewards, dtype)
    counted = ~xp.isnan(margin) if valid is None else valid & ~xp.isnan(margin)
    zeros = xp.zeros_like(margin)
    losses = xp.where(counted, _softplus(xp, -xp.where(counted, margin, zeros)), zeros)
    count = xp.sum(xp.astype(counted, dtype))
    return xp.sum(losses) / xp.where(count > 0, count, xp.ones_like(count))


def pairs(
    logprobs: Array,
    ref_logprobs: Array,
    rewards: Array,
    group_ids: Array,
    beta: float,
    num_groups: int | None,
    valid: Array | None,
) -> tuple[Groups, Array, Array, Array]:
    """Finds the best and the worst responses of each group.

    Returns: the groups, which count with two different rewards; (N,) each row's share among the best responses, and
      among the worst; (num_groups,) beta (s_best - s_worst).
    """
    check_beta(beta, positive=True)
    groups, log_ratio, rewards = checked_groups(
        logprobs, ref_logprobs, rewards, group_ids, num_groups, valid, smallest=2
    )
    best, worst = groups.at_the_top(rewards), groups.at_the_top(-rewards)
    differ = groups.kept & (groups.sum(groups.xp.astype(best & worst, groups.size.dtype)) == 0)
    groups = groups._replace(kept=differ, counted=groups.counted & groups.per_row(differ))
    chosen, rejected = groups.share(best & groups.counted), groups.share(worst & groups.counted)
    in_pair = (chosen > 0) | (rejected > 0)
    paired = groups.xp.where(in_pair, log_ratio, groups.xp.zeros_like(log_ratio))
    return groups, chosen, rejected, constant(beta) * groups.sum((chosen - rejected) * paired)


def _softplus(xp: Any, x: Array) -> Array:
    """log(1 + exp(x)) without overflow: -log sigmoid(-x)."""
    return xp.logaddexp(x, xp.zeros_like(x))
