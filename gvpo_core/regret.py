"""The regret: the regularised reward that the policy can still gain, estimated from its own samples."""

from typing import Any, NamedTuple

from gvpo_core._arrays import Array, check_beta, constant, stop_gradient
from gvpo_core.groups import Groups
from gvpo_core.objective import centred_rows, loss_of

NEWTON_STEPS = 12  # the function is convex and nearly a line: they converge quadratically, and are cheap


class GVPORegret(NamedTuple):
    """beta KL(pi_theta || pi*) = J(pi*) - J(pi_theta) for samples from pi_theta (J: Eq. 5). Reward units."""

    second_order: Array  # (), loss / (2 beta) if f = 1
    series: Array  # (), mean over groups of beta log mean exp(w / beta)
    group_second_order: Array  # (num_groups,)
    group_series: Array  # (num_groups,)


def gvpo_regret(
    logprobs: Array,
    ref_logprobs: Array,
    rewards: Array,
    group_ids: Array,
    *,
    beta: float,
    num_groups: int | None = None,
    valid: Array | None = None,
    response_weights: Array | None = None,
) -> GVPORegret:
    """The regularised reward that pi_theta can still gain, from responses that pi_theta itself sampled.

    J(pi*) - J(pi_theta) = beta KL(pi_theta || pi*) = beta log E exp(w / beta) = Var(w) / (2 beta) + O(w^3)

    `second_order` is unbiased for its limit. `series` estimates the log of a mean from k samples, so it is too
    low by O(1/k), and never above max(w) of its group.

    With response weights f, pi* = pi_ref exp((R + c) / (beta f)) maximises J(pi) = E_pi[R - beta f (s - 1)]. With
    u = (w - c) / (beta f),

      J(pi*) - J(pi_theta) = beta E f (exp(u) - 1 - u), where c solves E exp(u) = 1
                           = (E[w^2 / f] - E[w / f]^2 / E[1 / f]) / (2 beta) + O(w^3)

    Args:
      logprobs: (N,) float, nats; log pi_theta of whole responses; differentiated.
      ref_logprobs: (N,) float, nats; log pi_ref.
      rewards: (N,) real; NaN = no score, the response leaves its group.
      group_ids: (N,) integer in 0..num_groups-1; rows of a group may be anywhere.
      beta: KL coefficient, reward units per nat, one finite number > 0.
      num_groups: static int; default: largest id + 1. Required under compilation.
      valid: (N,) bool; True = counted. Default: all.
      response_weights: (N,) float > 0, f of GVPO++; constants. Default: 1.
    Returns: GVPORegret, reward units; groups with fewer than two counted responses are 0 and not in the means.
    Raises: TypeError, ValueError: an argument of a wrong type, dtype, shape, device or value; the message names it.
    Reference: derived from Eq. 5 and 6 of Zhang et al., GVPO, arXiv 2504.19599, and for f from GVPO++, arXiv
      2609.21432. The papers do not state it.
    """
    check_beta(beta, positive=True)
    rows = centred_rows(logprobs, ref_logprobs, rewards, group_ids, beta, num_groups, valid, response_weights)
    beta, groups = constant(beta), rows.groups
    if rows.factors is None:
        second = loss_of(rows).group_loss / (2 * beta)
        series = beta * log_mean_exp(groups, rows.weights() / beta)
    else:
        second, series = _weighted(groups, rows.weights(), rows.factors, beta)
    return GVPORegret(groups.mean(second), groups.mean(series), second, series)


def log_mean_exp(groups: Groups, exponent: Array) -> Array:
    """(N,) -> (num_groups,) log mean exp over counted rows; 0 in groups that do not count."""
    xp = groups.xp
    largest = groups.max(stop_gradient(exponent))
    below = xp.where(groups.counted, exponent - groups.per_row(largest), xp.zeros_like(exponent))
    terms = xp.where(groups.counted, xp.exp(below), xp.zeros_like(exponent))
    mean = groups.sum(terms) / groups.divisor()
    log_mean = largest + xp.log(xp.where(groups.kept, mean, xp.ones_like(mean)))
    return xp.where(groups.kept, log_mean, xp.zeros_like(mean))


def _weighted(groups: Groups, weights: Array, factors: Array, beta: Any) -> tuple[Array, Array]:
    """Returns (num_groups,) second order and series for w (N,) and f (N,)."""
    xp = groups.xp

    def mean(values: Array) -> Array:
        """(N,) -> (num_groups,) over counted rows; 0 in groups that do not count."""
        return groups.sum(xp.where(groups.counted, values, xp.zeros_like(values))) / groups.divisor()

    inverse = mean(1 / factors)
    inverse = xp.where(groups.kept, inverse, xp.ones_like(inverse))
    shifted = weights - groups.per_row(mean(weights / factors) / inverse)
    second = mean(shifted**2 / factors) * groups.divisor() / groups.divisor(less=1) / (2 * beta)
    shift = xp.zeros_like(inverse)
    fixed = stop_gradient(weights)
    for _ in range(NEWTON_STEPS):
        exponent = (fixed - groups.per_row(shift)) / (beta * factors)
        excess = log_mean_exp(groups, exponent)
        share = xp.exp(exponent - groups.per_row(excess))  # sums to k
        slope = mean(share / factors)
        shift = shift + beta * excess / xp.where(groups.kept, slope, xp.ones_like(slope))
    u = (weights - groups.per_row(shift)) / (beta * factors)
    return second, beta * mean(factors * (xp.exp(u) - 1 - u))
