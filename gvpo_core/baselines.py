"""The methods beside GVPO, in the unified framework (Eq. 9): a step along sum_i w_i grad log pi_theta(y_i|x).

Notation and conventions are those of `objective`: arrays in, namespace inferred, 16-bit inputs upcast,
weights constant under differentiation, and a row that is not `valid` or whose reward is NaN leaves its group.
All ratios and log-probabilities are of whole responses, as in the paper, not of tokens.
"""

from difflib import get_close_matches
from typing import Any

from gvpo_core._arrays import Array, check_beta, check_number, check_rows, constant, stop_gradient, wide_dtype
from gvpo_core.groups import Groups, counted_groups
from gvpo_core.objective import checked_groups, gvpo_coefficients
from gvpo_core.preferences import dpo_weights, pairs

OBJECTIVES = ("gvpo", "grpo", "dr_grpo", "rloo", "reject_sampling", "sft", "dpo")
_NEED_OLD = ("grpo", "dr_grpo", "rloo")


def sft_weights(logprobs: Array, *, valid: Array | None = None) -> Array:
    """Supervised fine-tuning: every demonstration counts alike.

    w_i = 1

    Args:
      logprobs: (N,) float, nats; its shape, dtype and device alone are read.
      valid: (N,) bool; True = counted. Default: all.
    Returns: (N,) float32 or wider; 0 for rows not counted.
    Raises: TypeError, ValueError: an argument's type, dtype, shape or device, naming it.
    Reference: Zhang et al., GVPO, arXiv 2504.19599, Eq. 1 and 9. Departures: none.
    """
    xp = check_rows({"logprobs": logprobs}, valid=valid)
    ones = xp.ones_like(xp.astype(logprobs, wide_dtype(xp, logprobs)))
    return ones if valid is None else xp.where(valid, ones, xp.zeros_like(ones))


def reject_sampling_weights(
    rewards: Array, group_ids: Array, *, num_groups: int | None = None, valid: Array | None = None
) -> Array:
    """Reject sampling: the best response of each group is imitated, the others are not.

    w_i = 1/m if R_i is the largest reward of i's group, reached by m responses; else 0

    Args:
      rewards: (N,) real; NaN = no score, the response leaves its group.
      group_ids, num_groups, valid: as gvpo_weights.
    Returns: (N,), sums to 1 in each group with a counted response.
    Raises: as gvpo_weights.
    Reference: Zhang et al., GVPO, arXiv 2504.19599, Eq. 2 and 9. Departures: tied best responses share the
      weight, so that the order of rows does not matter; Eq. 2's argmax leaves open which of them is taken.
    """
    groups, rewards = _scored(rewards, group_ids, num_groups, valid, smallest=1)
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
      group_ids, num_groups, valid: as gvpo_weights.
      beta: coefficient of the KL penalty (k1) in the reward, reward units per nat, >= 0.
      logprobs, ref_logprobs: (N,) float, nats, of the policy at sampling and of the reference; wanted with
        beta > 0. A NaN in one spoils its group, not only its row, as in GVPO.
      ddof: 1 for the sample's standard deviation, as in TRL; 0 for the population's.
      eps: added to the standard deviation, reward units, finite, >= 0.
    Returns: (N,); 0 in groups with fewer than two counted responses, and where all of R' are equal.
    Raises: as gvpo_weights; ValueError: ddof not 0 or 1, beta > 0 without log-probabilities.
    Reference: Zhang et al., GVPO, arXiv 2504.19599, Eq. 3 and 9; R' from Eq. 18. Departures: eps, and ddof,
      which Eq. 3 leaves open.
    """
    if ddof not in (0, 1):
        raise ValueError(f"ddof is {ddof}; expected 0 or 1")
    check_number("eps", eps)
    groups, advantages = _penalised(rewards, group_ids, beta, logprobs, ref_logprobs, num_groups, valid)
    return stop_gradient(_standardise(groups, advantages, ddof, eps))


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

    Args: as grpo_weights.
    Returns: (N,), reward units; 0 in groups with fewer than two counted responses.
    Raises: as grpo_weights.
    Reference: Liu et al., arXiv 2503.20783; Eq. 9 and 18 of arXiv 2504.19599. Departures: none; its other
      change, no division by response length, holds for every objective here.
    """
    return stop_gradient(_penalised(rewards, group_ids, beta, logprobs, ref_logprobs, num_groups, valid)[1])


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

    Args: as grpo_weights.
    Returns: (N,), reward units; 0 in groups with fewer than two counted responses.
    Raises: as grpo_weights.
    Reference: Ahmadian et al., arXiv 2402.14740; Eq. 9 and 18 of arXiv 2504.19599. Departures: none.
    """
    groups, advantages = _penalised(rewards, group_ids, beta, logprobs, ref_logprobs, num_groups, valid)
    return stop_gradient(_leave_one_out(groups, advantages))


def importance_ratio(logprobs: Array, old_logprobs: Array) -> Array:
    """How much likelier a response is now than when it was sampled.

    rho_i = pi_theta(y_i|x) / pi_old(y_i|x) = exp(logprobs - old_logprobs)

    Args:
      logprobs: (N,) float, nats; differentiated.
      old_logprobs: (N,) float, nats, of the policy that sampled; a constant.
    Returns: (N,) float32 or wider; inf where the difference exceeds 88 nats in float32, 709 in float64.
    Raises: TypeError, ValueError: an argument's type, dtype, shape or device, naming it.
    Reference: Zhang et al., GVPO, arXiv 2504.19599, Eq. 19, of whole responses. Departures: none.
    """
    xp = check_rows({"logprobs": logprobs, "old_logprobs": old_logprobs})
    dtype = wide_dtype(xp, logprobs, old_logprobs)
    return xp.exp(xp.astype(logprobs, dtype) - stop_gradient(xp.astype(old_logprobs, dtype)))


def clipped_ratio_weights(
    logprobs: Array, old_logprobs: Array, advantages: Array, *, clip: float = 0.2, valid: Array | None = None
) -> Array:
    """PPO's clipped importance ratio, as the factor of grad log pi.

    w_i = rho_i A_i, and 0 where rho_i > 1 + clip with A_i > 0 or rho_i < 1 - clip with A_i < 0

    This is the gradient of min(rho A, clamp(rho, 1 - clip, 1 + clip) A) in log pi.

    Args:
      logprobs, old_logprobs: (N,) float, nats; of the policy now and when it sampled.
      advantages: (N,) float, reward units; taken as constants.
      clip: > 0; float("inf") never clips and gives Eq. 19 itself.
      valid: (N,) bool; True = counted. Default: all.
    Returns: (N,), reward units; 0 for rows not counted.
    Raises: TypeError, ValueError: an argument's type, dtype, shape, device or value, naming it.
    Reference: Zhang et al., GVPO, arXiv 2504.19599, Eq. 19, and for the clip Schulman et al., arXiv
      1707.06347, Eq. 7. Departures: the ratio is of whole responses, as Eq. 19's, where PPO's is of tokens.
    """
    check_number("clip", clip, positive=True, finite=False)
    rows = {"logprobs": logprobs, "old_logprobs": old_logprobs, "advantages": advantages}
    xp = check_rows(rows, valid=valid)
    ratio = importance_ratio(logprobs, old_logprobs)
    advantages = xp.astype(advantages, wide_dtype(xp, ratio, advantages))
    clipped = ((advantages > 0) & (ratio > 1 + clip)) | ((advantages < 0) & (ratio < 1 - clip))
    left = clipped | (advantages == 0) if valid is None else clipped | (advantages == 0) | ~valid
    return stop_gradient(xp.where(left, xp.zeros_like(advantages), ratio * advantages))


def objective_coefficients(
    name: str,
    logprobs: Array,
    ref_logprobs: Array,
    old_logprobs: Array | None,
    rewards: Array,
    group_ids: Array,
    *,
    beta: float,
    num_groups: int | None = None,
    valid: Array | None = None,
    clip: float = 0.2,
) -> Array:
    """The factor of each response's log-probability gradient in one step of the named objective.

    -sum_i c_i grad log pi_i is the gradient of a mean over the G groups that count, of

      gvpo             1/(2 beta) 1/(k-1) sum w^2, Eq. 16                          k >= 2   c = w / ((k-1) G)
      grpo             -1/k sum min(rho A, clamp(rho) A), A = grpo_weights         k >= 2   c = w_clip / (k G)
      dr_grpo          the same, A = dr_grpo_weights                               k >= 2   c = w_clip / (k G)
      rloo             the same, A = rloo_weights                                  k >= 2   c = w_clip / (k G)
      reject_sampling  -log pi of the best response                                k >= 1   c = w / G
      sft              -1/k sum log pi                                             k >= 1   c = w / (k G)
      dpo              -log sigmoid(beta s_best - beta s_worst), Eq. 8     two rewards      c = beta w / G

    with w that objective's weights and w_clip = clipped_ratio_weights(A). In grpo, dr_grpo and rloo beta is
    the coefficient of the KL penalty (k1) in the reward, taken at old_logprobs and constant (Eq. 18). At
    logprobs = old_logprobs the coefficients of rloo are those of gvpo.

    Args:
      name: one of OBJECTIVES.
      logprobs, ref_logprobs, rewards, group_ids, num_groups, valid: as gvpo_weights; rows without a reward
        leave in every objective, sft too.
      old_logprobs: (N,) float, nats, of the policy that sampled; grpo, dr_grpo and rloo read it, for the
        others it may be None.
      beta: reward units per nat (dpo: per nat), >= 0, for dpo > 0; unused by reject_sampling and sft.
      clip: as clipped_ratio_weights; used by grpo, dr_grpo and rloo.
    Returns: (N,), constant under differentiation; 0 for rows and groups that do not count.
    Raises: as gvpo_weights; ValueError: unknown name, or old_logprobs missing where it is read.
    Reference: Zhang et al., GVPO, arXiv 2504.19599, Eq. 9, 12, 18 and 19.
    """
    if name not in OBJECTIVES:
        close = get_close_matches(str(name), OBJECTIVES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"objective is {name!r}; expected one of {', '.join(OBJECTIVES)}{hint}")
    options: dict[str, Any] = {"num_groups": num_groups, "valid": valid}
    if name == "gvpo":
        return gvpo_coefficients(logprobs, ref_logprobs, rewards, group_ids, beta=beta, **options)
    if name == "dpo":
        groups = pairs(logprobs, ref_logprobs, rewards, group_ids, beta, num_groups, valid)[0]
        weights = dpo_weights(logprobs, ref_logprobs, rewards, group_ids, beta=beta, **options)
        return constant(beta) * weights / groups.total_divisor()
    xp = check_rows(
        {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "rewards": rewards},
        group_ids=group_ids,
        valid=valid,
    )
    check_beta(beta)
    if name in _NEED_OLD:
        if old_logprobs is None:
            raise ValueError(f"old_logprobs is None; {name} needs the log-probabilities at sampling")
        groups, advantages = _penalised(rewards, group_ids, beta, old_logprobs, ref_logprobs, num_groups, valid)
        if name == "grpo":
            advantages = _standardise(groups, advantages, 1, 1e-4)
        elif name == "rloo":
            advantages = _leave_one_out(groups, advantages)
        weights = clipped_ratio_weights(logprobs, old_logprobs, advantages, clip=clip, valid=groups.counted)
        return weights / groups.per_row(groups.divisor() * groups.total_divisor())
    groups, wide = _scored(rewards, group_ids, num_groups, valid, smallest=1)
    if name == "reject_sampling":
        return stop_gradient(groups.share(groups.at_the_top(wide)) / groups.total_divisor())
    return xp.astype(groups.counted, wide.dtype) / groups.per_row(groups.divisor() * groups.total_divisor())


def _scored(
    rewards: Array, group_ids: Array, num_groups: int | None, valid: Array | None, *, smallest: int
) -> tuple[Groups, Array]:
    xp = check_rows({"rewards": rewards}, floating=False, group_ids=group_ids, valid=valid)
    rewards = xp.astype(rewards, wide_dtype(xp, rewards))
    return counted_groups(xp, rewards, group_ids, num_groups, valid, smallest=smallest), rewards


def _penalised(
    rewards: Array,
    group_ids: Array,
    beta: float,
    logprobs: Array | None,
    ref_logprobs: Array | None,
    num_groups: int | None,
    valid: Array | None,
) -> tuple[Groups, Array]:
    """Groups of two and more, and (N,) D(R - beta s)."""
    check_beta(beta)
    if logprobs is None or ref_logprobs is None:
        if not (isinstance(beta, int | float) and beta == 0):
            raise ValueError(f"beta is {beta} without logprobs and ref_logprobs; the KL penalty needs both")
        groups, rewards = _scored(rewards, group_ids, num_groups, valid, smallest=2)
        return groups, groups.center(rewards)
    groups, log_ratio, rewards = checked_groups(
        logprobs, ref_logprobs, rewards, group_ids, num_groups, valid, smallest=2
    )
    return groups, groups.center(rewards) - beta * groups.center(log_ratio)


def _standardise(groups: Groups, advantages: Array, ddof: int, eps: float) -> Array:
    xp = groups.xp
    scale = xp.sqrt(groups.sum(advantages**2) / groups.divisor(less=ddof)) + eps
    equal = groups.max(advantages) == -groups.max(-advantages)  # with eps = 0 rounding would be all that is left
    scale = groups.per_row(xp.where(equal | (scale == 0), xp.ones_like(scale), scale))
    return xp.where(groups.per_row(equal), xp.zeros_like(advantages), advantages / scale)


def _leave_one_out(groups: Groups, advantages: Array) -> Array:
    return advantages * groups.per_row(groups.divisor() / groups.divisor(less=1))
