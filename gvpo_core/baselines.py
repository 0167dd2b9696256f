"""Weights of the other methods in the unified framework (Eq. 9): a step follows sum_i w_i grad log pi_theta(y_i|x).

Notation and conventions are those of `objective`: the namespace is inferred from the arrays, 16-bit inputs are upcast,
and weights are constant under differentiation. A row leaves its group if it is not `valid` or its reward is NaN.
As in the paper, all ratios and log-probabilities are those of whole responses, not of tokens.
"""

from gvpo_core._arrays import Array, check_beta, check_number, check_rows, stop_gradient, wide_dtype
from gvpo_core.groups import Groups, counted_groups
from gvpo_core.objective import checked_groups


def sft_weights(logprobs: Array, *, valid: Array | None = None) -> Array:
    """Supervised fine-tuning: every demonstration has the same weight.

    w_i = 1

    Args:
      logprobs: (N,) float, nats; only its shape, dtype and device are read.
      valid: (N,) bool; True = counted. Default: all.
    Returns: (N,) float32 or wider; 0 for rows not counted.
    Raises: TypeError, ValueError: an argument of a wrong type, dtype, shape or device; the message names it.
    Reference: Zhang et al., GVPO, arXiv 2504.19599, Eq. 1 and 9. Departures: none.
    """
    xp = check_rows({"logprobs": logprobs}, valid=valid)
    ones = xp.ones_like(xp.astype(logprobs, wide_dtype(xp, logprobs)))
    return ones if valid is None else xp.where(valid, ones, xp.zeros_like(ones))


def reject_sampling_weights(
    rewards: Array, group_ids: Array, *, num_groups: int | None = None, valid: Array | None = None
) -> Array:
    """Reject sampling: only the best response of each group has a weight.

    w_i = 1/m if R_i is the largest reward of i's group, reached by m responses; else 0

    Args:
      rewards: (N,) real; NaN = no score, the response leaves its group.
      group_ids: (N,) integer in 0..num_groups-1; rows of a group may be anywhere.
      num_groups: static int. Default: largest id + 1. Required under compilation.
      valid: (N,) bool; True = counted. Default: all.
    Returns: (N,), sums to 1 in each group with a counted response.
    Raises: TypeError, ValueError: an argument of a wrong type, dtype, shape, device or value; the message names it.
    Reference: Zhang et al., GVPO, arXiv 2504.19599, Eq. 2 and 9. Departures: tied best responses share the
      weight, so that the order of rows does not matter; Eq. 2's argmax leaves open which of them is taken.
    """
    groups, rewards = scored(rewards, group_ids, num_groups, valid, smallest=1)
    return stop_gradient(groups.share(groups.at_the_top(rewards)))


def grpo_weights(
    rewards: Array,
    group_ids: Array,
    *,
    beta: float = 0.0,
    logprobs: Array | None = None,
    ref_logprobs: Array | None = None,
    ddof: int = 1,
    eps: float = 1e-4,
    num_groups: int | None = None,
    valid: Array | None = None,
) -> Array:
    """GRPO: rewards standardised within their group.

    w_i = D(R')_i / (std(R') + eps), R' = R - beta * s, std over i's group with k - ddof degrees of freedom

    Args:
      rewards: (N,) real; NaN = no score, the response leaves its group.
      group_ids: (N,) integer in 0..num_groups-1; rows of a group may be anywhere.
      beta: coefficient of the KL penalty (k1) in the reward, reward units per nat, >= 0.
      logprobs: (N,) float, nats; of the policy at sampling. Required with beta > 0. A NaN makes the weights
        of its group NaN, as in GVPO.
      ref_logprobs: (N,) float, nats; of the reference. Required with beta > 0.
      ddof: 1 for the sample's standard deviation, as in TRL; 0 for the population's.
      eps: added to the standard deviation, reward units, finite, >= 0.
      num_groups: static int. Default: largest id + 1. Required under compilation.
      valid: (N,) bool; True = counted. Default: all.
    Returns: (N,); 0 in groups with fewer than two counted responses, and in groups whose R' are all equal.
    Raises: TypeError, ValueError: an argument of a wrong type, dtype, shape, device or value; the message names it.
      ValueError: beta > 0 without log-probabilities.
    Reference: Zhang et al., GVPO, arXiv 2504.19599, Eq. 3 and 9; R' from Eq. 18. Departures: eps, and ddof,
      which Eq. 3 leaves open.
    """
    if ddof not in (0, 1):
        raise ValueError(f"ddof is {ddof}; expected 0 or 1")
    check_number("eps", eps)
    groups, advantages = penalised(rewards, group_ids, beta, logprobs, ref_logprobs, num_groups, valid)
    return stop_gradient(standardise(groups, advantages, ddof, eps))


def dr_grpo_weights(
    rewards: Array,
    group_ids: Array,
    *,
    beta: float = 0.0,
    logprobs: Array | None = None,
    ref_logprobs: Array | None = None,
    num_groups: int | None = None,
    valid: Array | None = None,
) -> Array:
    """Dr. GRPO: rewards centred within their group, not divided by their spread.

    w_i = D(R')_i, R' = R - beta * s

    Args:
      rewards: (N,) real; NaN = no score, the response leaves its group.
      group_ids: (N,) integer in 0..num_groups-1; rows of a group may be anywhere.
      beta: coefficient of the KL penalty (k1) in the reward, reward units per nat, >= 0.
      logprobs: (N,) float, nats; of the policy at sampling. Required with beta > 0. A NaN makes the weights
        of its group NaN, as in GVPO.
      ref_logprobs: (N,) float, nats; of the reference. Required with beta > 0.
      num_groups: static int. Default: largest id + 1. Required under compilation.
      valid: (N,) bool; True = counted. Default: all.
    Returns: (N,), reward units; 0 in groups with fewer than two counted responses.
    Raises: TypeError, ValueError: an argument of a wrong type, dtype, shape, device or value; the message names it.
      ValueError: beta > 0 without log-probabilities.
    Reference: Liu et al., arXiv 2503.20783; Eq. 9 and 18 of arXiv 2504.19599. Departures: none. Its other
      change, no division by response length, holds for every objective here.
    """
    return stop_gradient(penalised(rewards, group_ids, beta, logprobs, ref_logprobs, num_groups, valid)[1])


def rloo_weights(
    rewards: Array,
    group_ids: Array,
    *,
    beta: float = 0.0,
    logprobs: Array | None = None,
    ref_logprobs: Array | None = None,
    num_groups: int | None = None,
    valid: Array | None = None,
) -> Array:
    """RLOO: each reward less the mean of the others in its group.

    w_i = R'_i - mean of R' over the group without i = k/(k - 1) D(R')_i, R' = R - beta * s

    Args:
      rewards: (N,) real; NaN = no score, the response leaves its group.
      group_ids: (N,) integer in 0..num_groups-1; rows of a group may be anywhere.
      beta: coefficient of the KL penalty (k1) in the reward, reward units per nat, >= 0.
      logprobs: (N,) float, nats; of the policy at sampling. Required with beta > 0. A NaN makes the weights
        of its group NaN, as in GVPO.
      ref_logprobs: (N,) float, nats; of the reference. Required with beta > 0.
      num_groups: static int. Default: largest id + 1. Required under compilation.
      valid: (N,) bool; True = counted. Default: all.
    Returns: (N,), reward units; 0 in groups with fewer than two counted responses.
    Raises: TypeError, ValueError: an argument of a wrong type, dtype, shape, device or value; the message names it.
      ValueError: beta > 0 without log-probabilities.
    Reference: Ahmadian et al., arXiv 2402.14740; Eq. 9 and 18 of arXiv 2504.19599. Departures: none.
    """
    groups, advantages = penalised(rewards, group_ids, beta, logprobs, ref_logprobs, num_groups, valid)
    return stop_gradient(leave_one_out(groups, advantages))


def importance_ratio(logprobs: Array, old_logprobs: Array) -> Array:
    """The probability of each response now, divided by its probability when it was sampled.

    rho_i = pi_theta(y_i|x) / pi_old(y_i|x) = exp(logprobs - old_logprobs)

    Args:
      logprobs: (N,) float, nats; differentiated.
      old_logprobs: (N,) float, nats, of the policy that sampled; a constant.
    Returns: (N,) float32 or wider; inf if the difference exceeds 88 nats in float32, 709 in float64.
    Raises: TypeError, ValueError: an argument of a wrong type, dtype, shape or device; the message names it.
    Reference: Zhang et al., GVPO, arXiv 2504.19599, Eq. 19, of whole responses. Departures: none.
    """
    xp = check_rows({"logprobs": logprobs, "old_logprobs": old_logprobs})
    dtype = wide_dtype(xp, logprobs, old_logprobs)
    return xp.exp(xp.astype(logprobs, dtype) - stop_gradient(xp.astype(old_logprobs, dtype)))


def clipped_ratio_weights(
    logprobs: Array, old_logprobs: Array, advantages: Array, *, clip: float = 0.2, valid: Array | None = None
) -> Array:
    """PPO's clipped importance ratio, as the factor of grad log pi.

    w_i = rho_i A_i, but 0 if A_i > 0 and rho_i > 1 + clip, or if A_i < 0 and rho_i < 1 - clip

    This is the gradient of min(rho A, clamp(rho, 1 - clip, 1 + clip) A) in log pi.

    Args:
      logprobs: (N,) float, nats; of the policy now.
      old_logprobs: (N,) float, nats; of the policy when it sampled.
      advantages: (N,) float, reward units; taken as constants.
      clip: > 0; float("inf") never clips and gives Eq. 19 itself.
      valid: (N,) bool; True = counted. Default: all.
    Returns: (N,), reward units; 0 for rows not counted.
    Raises: TypeError, ValueError: an argument of a wrong type, dtype, shape, device or value; the message names it.
    Reference: Zhang et al., GVPO, arXiv 2504.19599, Eq. 19, and for the clip Schulman et al., arXiv
      1707.06347, Eq. 7. Departures: the ratio is that of whole responses, as in Eq. 19; PPO's is that of tokens.
    """
    check_number("clip", clip, positive=True, finite=False)
    rows = {"logprobs": logprobs, "old_logprobs": old_logprobs, "advantages": advantages}
    xp = check_rows(rows, valid=valid)
    ratio = importance_ratio(logprobs, old_logprobs)
    advantages = xp.astype(advantages, wide_dtype(xp, ratio, advantages))
    clipped = ((advantages > 0) & (ratio > 1 + clip)) | ((advantages < 0) & (ratio < 1 - clip))
    zeroed = clipped | (advantages == 0) if valid is None else clipped | (advantages == 0) | ~valid
    return stop_gradient(xp.where(zeroed, xp.zeros_like(advantages), ratio * advantages))


def scored(
    rewards: Array, group_ids: Array, num_groups: int | None, valid: Array | None, *, smallest: int
) -> tuple[Groups, Array]:
    """Returns the groups, which count with `smallest` scored rows or more, and (N,) R in float32 or wider."""
    xp = check_rows({"rewards": rewards}, floating=False, group_ids=group_ids, valid=valid)
    rewards = xp.astype(rewards, wide_dtype(xp, rewards))
    return counted_groups(xp, rewards, group_ids, num_groups, valid, smallest=smallest), rewards


def penalised(
    rewards: Array,
    group_ids: Array,
    beta: float,
    logprobs: Array | None,
    ref_logprobs: Array | None,
    num_groups: int | None,
    valid: Array | None,
) -> tuple[Groups, Array]:
    """Returns the groups, which count with two scored rows or more, and (N,) D(R - beta s)."""
    check_beta(beta)
    if logprobs is None or ref_logprobs is None:
        if not (isinstance(beta, int | float) and beta == 0):
            raise ValueError(f"beta is {beta} without logprobs and ref_logprobs; the KL penalty needs both")
        groups, rewards = scored(rewards, group_ids, num_groups, valid, smallest=2)
        return groups, groups.center(rewards)
    groups, log_ratio, rewards = checked_groups(
        logprobs, ref_logprobs, rewards, group_ids, num_groups, valid, smallest=2
    )
    return groups, groups.center(rewards) - beta * groups.center(log_ratio)


def standardise(groups: Groups, advantages: Array, ddof: int, eps: float) -> Array:
    """Divides (N,) centred rewards by their group's standard deviation plus eps; 0 in a group of equal rewards."""
    xp = groups.xp
    scale = xp.sqrt(groups.sum(advantages**2) / groups.divisor(less=ddof)) + eps
    equal = groups.max(advantages) == -groups.max(-advantages)  # with eps = 0 the result would be rounding errors only
    scale = groups.per_row(xp.where(equal | (scale == 0), xp.ones_like(scale), scale))
    return xp.where(groups.per_row(equal), xp.zeros_like(advantages), advantages / scale)


def leave_one_out(groups: Groups, advantages: Array) -> Array:
    """Turns (N,) centred rewards into differences from the mean of the group's other rewards."""
    return advantages * groups.per_row(groups.divisor() / groups.divisor(less=1))


def over_the_mean(groups: Groups, rewards: Array) -> Array:
    """Returns (N,) centred rewards divided by their group's mean; 0 if the mean is not positive."""
    mean = groups.sum(groups.xp.where(groups.counted, rewards, groups.xp.zeros_like(rewards))) / groups.divisor()
    positive = groups.kept & (mean > 0)
    scale = groups.per_row(groups.xp.where(positive, mean, groups.xp.ones_like(mean)))
    centred = groups.center(rewards)
    return groups.xp.where(groups.per_row(positive), centred / scale, groups.xp.zeros_like(centred))
