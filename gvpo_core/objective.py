"""GVPO as functions of arrays: weights (Eq. 12), loss and its parts (Eq. 15-17), coefficients.

Notation: s_i = log pi_theta(y_i|x) - log pi_ref(y_i|x), summed over the response's tokens, nats; R_i the
reward; D(v)_i = v_i - mean of v over i's group; k the counted responses of a group; G the groups with k >= 2.
A row counts if it is `valid` and its reward is not NaN. The others leave their group, and k is the number that remains
(Cor. 3.4). f_i is the response's weight inside the implicit reward, 1 unless `response_weights` is given (GVPO++).
Every function takes NumPy, torch, JAX, MLX, CuPy or any Array API arrays, eager or compiled, and
computes in float32 or wider: 16-bit inputs are upcast before any sum.
"""

from typing import NamedTuple, NoReturn

from gvpo_core._arrays import (
    Array,
    check_beta,
    check_rows,
    concrete,
    constant,
    namespace,
    stop_gradient,
    wide_dtype,
)
from gvpo_core.groups import Groups, counted_groups


class GVPOLoss(NamedTuple):
    """Eq. 16 and its parts (Eq. 17), reward^2: loss = implicit_variance + reward_variance - 2 covariance."""

    loss: Array  # (), mean over the G groups with k >= 2; 0 without any
    implicit_variance: Array  # (), of beta * f * s
    reward_variance: Array  # (), of R
    covariance: Array  # (), of beta * f * s and R
    group_loss: Array  # (num_groups,), and likewise below; 0 in a group with k < 2
    group_implicit_variance: Array
    group_reward_variance: Array
    group_covariance: Array
    group_size: Array  # (num_groups,) float, k
    counted_groups: Array  # () float, G

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"GVPOLoss has no {name!r}; the scalar to differentiate is .loss: gvpo_loss(...).loss")

    def __float__(self) -> NoReturn:
        raise TypeError("GVPOLoss is a tuple of the loss and its parts; take .loss: float(gvpo_loss(...).loss)")


class CentredRows(NamedTuple):
    """The two terms of w = D(R) - beta * D(f * s)."""

    groups: Groups
    implicit: Array  # (N,) beta * D(f * s)
    reward: Array  # (N,) D(R)
    factors: Array | None  # (N,) f, 1 in rows not counted; None: all 1

    def weights(self) -> Array:
        """Returns (N,) w."""
        return self.reward - self.implicit

    def gradient_weights(self) -> Array:
        """Returns (N,) f * w, the factor of grad log pi."""
        return self.weights() if self.factors is None else self.factors * self.weights()


def centred_rows(
    logprobs: Array,
    ref_logprobs: Array,
    rewards: Array,
    group_ids: Array,
    beta: float,
    num_groups: int | None,
    valid: Array | None,
    response_weights: Array | None,
) -> CentredRows:
    """Checks the arguments of gvpo_weights and centres the implicit and the actual rewards."""
    check_beta(beta)
    groups, log_ratio, rewards = checked_groups(
        logprobs, ref_logprobs, rewards, group_ids, num_groups, valid, smallest=2
    )
    factors = None
    if response_weights is not None:
        factors = _factors(groups, rewards, response_weights)
        log_ratio = factors * log_ratio
    return CentredRows(groups, constant(beta) * groups.center(log_ratio), groups.center(rewards), factors)


def _factors(groups: Groups, rewards: Array, response_weights: Array) -> Array:
    """Returns (N,) f, checked to be finite and > 0 in counted rows; 1 in the others."""
    xp = check_rows({"rewards": rewards, "response_weights": response_weights})
    factors = stop_gradient(xp.astype(response_weights, rewards.dtype))
    factors = xp.where(groups.counted, factors, xp.ones_like(factors))
    low, high = concrete(xp.min(factors)), concrete(xp.max(factors))
    if low is not None and high is not None and not 0 < low <= high < float("inf"):
        raise ValueError(f"response_weights span {low}..{high} in counted rows; expected finite numbers > 0")
    return factors


def checked_groups(
    logprobs: Array,
    ref_logprobs: Array,
    rewards: Array,
    group_ids: Array,
    num_groups: int | None,
    valid: Array | None,
    *,
    smallest: int,
) -> tuple[Groups, Array, Array]:
    """Checks the arguments of gvpo_weights; returns the groups, and (N,) s and R.

    A group counts with `smallest` scored rows or more. `s` is differentiated through logprobs only; the reference and
    the rewards are constants.
    """
    xp = check_rows(
        {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "rewards": rewards},
        group_ids=group_ids,
        valid=valid,
    )
    dtype = wide_dtype(xp, logprobs, ref_logprobs, rewards)
    logprobs, ref_logprobs, rewards = (xp.astype(x, dtype) for x in (logprobs, ref_logprobs, rewards))
    ref_logprobs, rewards = stop_gradient(ref_logprobs), stop_gradient(rewards)
    groups = counted_groups(xp, rewards, group_ids, num_groups, valid, smallest=smallest)
    return groups, logprobs - ref_logprobs, rewards


def gvpo_weights(
    logprobs: Array,
    ref_logprobs: Array,
    rewards: Array,
    group_ids: Array,
    *,
    beta: float,
    num_groups: int | None = None,
    valid: Array | None = None,
    response_weights: Array | None = None,
) -> Array:
    """The weight of each response's log-likelihood; sums to zero in each group.

    w_i = D(R)_i - beta * D(f * s)_i, with f = 1 unless response_weights is given

    With response weights the optimum is pi_ref exp((R + c) / (beta f)), where c(x) makes it sum to 1, and the
    factor of grad log pi_i is f_i w_i. The result is constant under differentiation, because a gradient
    through the weights would be wrong.

    Args:
      logprobs: (N,) float, nats; log pi_theta of whole responses.
      ref_logprobs: (N,) float, nats; log pi_ref.
      rewards: (N,) real; NaN = no score, the response leaves its group.
      group_ids: (N,) integer in 0..num_groups-1; rows of a group may be anywhere.
      beta: KL coefficient, reward units per nat, one finite number >= 0.
      num_groups: static int; default: largest id + 1. Required under compilation.
      valid: (N,) bool; True = counted. Default: all.
      response_weights: (N,) float > 0, f of GVPO++; constants. Default: 1.
    Returns: (N,), reward units; 0 for rows not counted and in groups with fewer than two counted responses.
    Raises: TypeError, ValueError: an argument of a wrong type, dtype, shape, device or value; the message names it.
    Reference: Zhang et al., GVPO, arXiv 2504.19599, Eq. 12; f: GVPO++, arXiv 2609.21432. Departures: none.
    """
    rows = centred_rows(logprobs, ref_logprobs, rewards, group_ids, beta, num_groups, valid, response_weights)
    return stop_gradient(rows.weights())


def gvpo_coefficients(
    logprobs: Array,
    ref_logprobs: Array,
    rewards: Array,
    group_ids: Array,
    *,
    beta: float,
    num_groups: int | None = None,
    valid: Array | None = None,
    response_weights: Array | None = None,
) -> Array:
    """The factor of each response's log-probability gradient in a GVPO step, at policy-gradient scale.

    c_i = f_i w_i / ((k - 1) G), so that -sum_i c_i grad log pi_i = grad(gvpo_loss) / (2 beta)

    With beta = 0 this is REINFORCE with RLOO's baseline; learning rates carry over from there. The result
    is constant under differentiation, like gvpo_weights.

    Args:
      logprobs: (N,) float, nats; log pi_theta of whole responses.
      ref_logprobs: (N,) float, nats; log pi_ref.
      rewards: (N,) real; NaN = no score, the response leaves its group.
      group_ids: (N,) integer in 0..num_groups-1; rows of a group may be anywhere.
      beta: KL coefficient, reward units per nat, one finite number >= 0.
      num_groups: static int; default: largest id + 1. Required under compilation.
      valid: (N,) bool; True = counted. Default: all.
      response_weights: (N,) float > 0, f of GVPO++; constants. Default: 1.
    Returns: (N,), reward units; 0 where gvpo_weights is 0.
    Raises: TypeError, ValueError: an argument of a wrong type, dtype, shape, device or value; the message names it.
    Reference: Zhang et al., GVPO, arXiv 2504.19599, Eq. 12 and 16. Departures: scale. The gradient of Eq. 16
      is 2 beta times this one. The authors' released code steps along beta * w_i / (k - 1).
    """
    rows = centred_rows(logprobs, ref_logprobs, rewards, group_ids, beta, num_groups, valid, response_weights)
    return stop_gradient(_coefficients(rows))


def _coefficients(rows: CentredRows) -> Array:
    groups = rows.groups
    return rows.gradient_weights() / groups.per_row(groups.divisor(less=1) * groups.total_divisor())


def gvpo_surrogate(
    logprobs: Array,
    ref_logprobs: Array,
    rewards: Array,
    group_ids: Array,
    *,
    beta: float,
    num_groups: int | None = None,
    valid: Array | None = None,
    response_weights: Array | None = None,
) -> Array:
    """A scalar to differentiate: its gradient is a GVPO step at policy-gradient scale, for any beta, including 0.

    -sum_i c_i log pi_i, with constant coefficients. Its value has no meaning; report gvpo_loss instead.

    Args:
      logprobs: (N,) float, nats; log pi_theta of whole responses; differentiated.
      ref_logprobs: (N,) float, nats; log pi_ref.
      rewards: (N,) real; NaN = no score, the response leaves its group.
      group_ids: (N,) integer in 0..num_groups-1; rows of a group may be anywhere.
      beta: KL coefficient, reward units per nat, one finite number >= 0.
      num_groups: static int; default: largest id + 1. Required under compilation.
      valid: (N,) bool; True = counted. Default: all.
      response_weights: (N,) float > 0, f of GVPO++; constants. Default: 1.
    Returns: (), nats times reward units.
    Raises: TypeError, ValueError: an argument of a wrong type, dtype, shape, device or value; the message names it.
    Reference: Zhang et al., GVPO, arXiv 2504.19599, Eq. 12. Departures: scale, as in gvpo_coefficients.
    """
    coefficients = gvpo_coefficients(
        logprobs,
        ref_logprobs,
        rewards,
        group_ids,
        beta=beta,
        num_groups=num_groups,
        valid=valid,
        response_weights=response_weights,
    )
    xp = namespace(logprobs)
    logprobs = xp.astype(logprobs, coefficients.dtype)
    logprobs = xp.where(coefficients != 0, logprobs, xp.zeros_like(logprobs))  # an uncounted row may have -inf
    return -xp.sum(coefficients * logprobs)


def gvpo_loss(
    logprobs: Array,
    ref_logprobs: Array,
    rewards: Array,
    group_ids: Array,
    *,
    beta: float,
    num_groups: int | None = None,
    valid: Array | None = None,
    response_weights: Array | None = None,
) -> GVPOLoss:
    """The unbiased estimate of the within-group variance of implicit minus actual reward.

    loss = (1/G) sum_g 1/(k_g - 1) sum_{i in g} w_i^2, w = gvpo_weights

    Args:
      logprobs: (N,) float, nats; log pi_theta of whole responses; differentiated.
      ref_logprobs: (N,) float, nats; log pi_ref.
      rewards: (N,) real; NaN = no score, the response leaves its group.
      group_ids: (N,) integer in 0..num_groups-1; rows of a group may be anywhere.
      beta: KL coefficient, reward units per nat, one finite number >= 0.
      num_groups: static int; default: largest id + 1. Required under compilation.
      valid: (N,) bool; True = counted. Default: all.
      response_weights: (N,) float > 0, f of GVPO++; constants. Default: 1.
    Returns: GVPOLoss; its field `loss`, (), mean over G, reward^2 units, is the scalar to differentiate:
      gvpo_loss(...).loss. The other fields are the parts of the loss and the values per group.
    Raises: TypeError, ValueError: an argument of a wrong type, dtype, shape, device or value; the message names it.
    Reference: Zhang et al., GVPO, arXiv 2504.19599, Eq. 15, 16 (ragged k), 17 (parts). Departures: none.
    """
    return loss_of(centred_rows(logprobs, ref_logprobs, rewards, group_ids, beta, num_groups, valid, response_weights))


def loss_of(rows: CentredRows) -> GVPOLoss:
    """Computes gvpo_loss from checked arguments."""
    groups = rows.groups
    weights = rows.weights()
    products = (weights**2, rows.implicit**2, rows.reward**2, rows.implicit * rows.reward)
    loss, implicit, reward, both = (groups.sum(product) / groups.divisor(less=1) for product in products)
    return GVPOLoss(
        loss=groups.mean(loss),
        implicit_variance=groups.mean(implicit),
        reward_variance=groups.mean(reward),
        covariance=groups.mean(both),
        group_loss=loss,
        group_implicit_variance=implicit,
        group_reward_variance=reward,
        group_covariance=both,
        group_size=groups.size,
        counted_groups=groups.total(),
    )


def sequence_logprobs(token_logprobs: Array, mask: Array) -> Array:
    """log pi(y|x) of each response: the sum of its tokens' log-probabilities.

    Args:
      token_logprobs: (N, T) float, nats; differentiated. Values outside the mask are ignored, NaN included.
      mask: (N, T) bool; True = a response token, its end token included.
    Returns: (N,) float32 or wider, nats. A sum, never a mean: GVPO's s is that of a whole response.
    Raises: TypeError, ValueError: an argument of a wrong type, dtype, shape or device; the message names it.
    Reference: the chain rule under log pi_theta(y|x), Section 2 of arXiv 2504.19599.
    """
    xp = check_rows({"token_logprobs": token_logprobs}, tokens=True, mask=mask)
    wide = xp.astype(token_logprobs, wide_dtype(xp, token_logprobs))
    return xp.sum(xp.where(mask, wide, xp.zeros_like(wide)), axis=1)
