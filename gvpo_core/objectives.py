"""The table of objectives (Eq. 9): how each weights the responses of a group, and how a step sums them."""

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, NamedTuple

from gvpo_core._arrays import Array, check_beta, check_rows, concrete, constant, stop_gradient
from gvpo_core.baselines import clipped_ratio_weights, leave_one_out, over_the_mean, penalised, scored, standardise
from gvpo_core.groups import Groups
from gvpo_core.objective import centred_rows
from gvpo_core.preferences import dpo_weights, pairs
from gvpo_core.residuals import mirror_descent_residual, optimal_advantage_residual


class Scores(NamedTuple):
    """The checked arguments of `objective_coefficients`."""

    logprobs: Array
    ref_logprobs: Array
    old_logprobs: Array | None
    rewards: Array
    group_ids: Array
    beta: Any
    num_groups: int | None
    valid: Array | None
    clip: Any
    response_weights: Array | None
    lengths: Array | None


class Objective(NamedTuple):
    """One objective. Its coefficients are weights / scale, so that a step is the gradient of a mean over groups."""

    weights: Callable[[Scores], tuple[Groups, Array]]  # the groups that count, and (N,) w
    smallest: int  # scored responses that a group needs to count
    needs_old: bool  # reads the log-probabilities at sampling
    scale: Callable[[Groups, Any], Array]  # groups, beta -> (num_groups,)
    positive_beta: bool = False  # beta = 0 is rejected
    needs_lengths: bool = False  # reads the responses' lengths
    no_negative_rewards: bool = False  # a negative reward is rejected


def _gvpo(x: Scores) -> tuple[Groups, Array]:
    scores = (x.logprobs, x.ref_logprobs, x.rewards, x.group_ids)
    rows = centred_rows(*scores, x.beta, x.num_groups, x.valid, x.response_weights)
    return rows.groups, rows.gradient_weights()


def _clipped(advantages_of: Callable[[Groups, Array], Array]) -> Callable[[Scores], tuple[Groups, Array]]:
    """Makes a weight function with the clipped ratio. The KL penalty in the reward is that at old_logprobs (Eq. 18)."""

    def weights(x: Scores) -> tuple[Groups, Array]:
        groups, centred = penalised(
            x.rewards, x.group_ids, x.beta, x.old_logprobs, x.ref_logprobs, x.num_groups, x.valid
        )
        advantages = advantages_of(groups, centred)
        return groups, clipped_ratio_weights(x.logprobs, x.old_logprobs, advantages, clip=x.clip, valid=groups.counted)

    return weights


def _grpo_advantages(groups: Groups, centred: Array) -> Array:
    return standardise(groups, centred, 1, 1e-4)


def _gspo(x: Scores) -> tuple[Groups, Array]:
    """Weights of GSPO: GRPO's advantages, with the geometric mean of the tokens' ratios as the ratio."""
    groups, centred = penalised(x.rewards, x.group_ids, x.beta, x.old_logprobs, x.ref_logprobs, x.num_groups, x.valid)
    lengths = _lengths(groups, x.lengths, centred.dtype)
    now, old = (groups.xp.astype(scores, centred.dtype) / lengths for scores in (x.logprobs, x.old_logprobs))
    advantages = _grpo_advantages(groups, centred)
    return groups, clipped_ratio_weights(now, old, advantages, clip=x.clip, valid=groups.counted) / lengths


def _lengths(groups: Groups, lengths: Any, dtype: Any) -> Array:
    """Returns (N,) lengths, checked to be at least 1 in counted rows; 1 in the others."""
    xp = groups.xp
    lengths = stop_gradient(xp.astype(lengths, dtype))
    lengths = xp.where(groups.counted, lengths, xp.ones_like(lengths))
    low, high = concrete(xp.min(lengths)), concrete(xp.max(lengths))
    if low is not None and high is not None and not 1 <= low <= high < float("inf"):
        raise ValueError(f"lengths span {low}..{high} in counted rows; expected 1 token or more")
    return lengths


def _maxrl(x: Scores) -> tuple[Groups, Array]:
    groups, rewards = scored(x.rewards, x.group_ids, x.num_groups, x.valid, smallest=2)
    low = concrete(groups.xp.min(groups.xp.where(groups.counted, rewards, groups.xp.zeros_like(rewards))))
    if low is not None and low < 0:
        raise ValueError(f"rewards go down to {low}; maxrl divides by their mean and expects rewards >= 0")
    advantages = over_the_mean(groups, rewards)
    return groups, clipped_ratio_weights(x.logprobs, x.old_logprobs, advantages, clip=x.clip, valid=groups.counted)


def _mirror_descent(x: Scores) -> tuple[Groups, Array]:
    return mirror_descent_residual(
        x.logprobs, x.ref_logprobs, x.rewards, x.group_ids, x.beta, num_groups=x.num_groups, valid=x.valid
    )


def _optimal_advantage(x: Scores) -> tuple[Groups, Array]:
    return optimal_advantage_residual(
        x.logprobs, x.ref_logprobs, x.old_logprobs, x.rewards, x.group_ids, x.beta,
        num_groups=x.num_groups, valid=x.valid,
    )  # fmt: skip


def _reject_sampling(x: Scores) -> tuple[Groups, Array]:
    groups, rewards = scored(x.rewards, x.group_ids, x.num_groups, x.valid, smallest=1)
    return groups, groups.share(groups.at_the_top(rewards))


def _sft(x: Scores) -> tuple[Groups, Array]:
    groups, rewards = scored(x.rewards, x.group_ids, x.num_groups, x.valid, smallest=1)
    return groups, groups.xp.astype(groups.counted, rewards.dtype)


def _dpo(x: Scores) -> tuple[Groups, Array]:
    scores = (x.logprobs, x.ref_logprobs, x.rewards, x.group_ids)
    groups = pairs(*scores, x.beta, x.num_groups, x.valid)[0]
    return groups, dpo_weights(*scores, beta=x.beta, num_groups=x.num_groups, valid=x.valid)


def _responses(groups: Groups, beta: Any) -> Array:
    return groups.divisor() * groups.total_divisor()


def _groups(groups: Groups) -> Array:
    return groups.xp.ones_like(groups.size) * groups.total_divisor()


def _degrees_of_freedom(groups: Groups, beta: Any) -> Array:
    return groups.divisor(less=1) * groups.total_divisor()


TABLE: dict[str, Objective] = {
    "gvpo": Objective(_gvpo, 2, False, _degrees_of_freedom),
    "trajectory_balance": Objective(_gvpo, 2, False, _responses),
    "rebel": Objective(_gvpo, 2, False, _degrees_of_freedom),
    "mirror_descent": Objective(_mirror_descent, 2, False, _responses),
    "a_star_po": Objective(_optimal_advantage, 2, True, _responses, positive_beta=True),
    "grpo": Objective(_clipped(_grpo_advantages), 2, True, _responses),
    "dr_grpo": Objective(_clipped(lambda groups, centred: centred), 2, True, _responses),
    "rloo": Objective(_clipped(leave_one_out), 2, True, _responses),
    "gspo": Objective(_gspo, 2, True, _responses, needs_lengths=True),
    "maxrl": Objective(_maxrl, 2, True, _responses, no_negative_rewards=True),
    "reject_sampling": Objective(_reject_sampling, 1, False, lambda groups, beta: _groups(groups)),
    "sft": Objective(_sft, 1, False, _responses),
    "dpo": Objective(_dpo, 2, False, lambda groups, beta: _groups(groups) / beta, positive_beta=True),
}
OBJECTIVES = tuple(TABLE)
OTHER_NAMES = {  # name used elsewhere -> objective
    "tba": "trajectory_balance",
    "tb": "trajectory_balance",
    "vargrad": "trajectory_balance",
    "kimi": "mirror_descent",
    "opmd": "mirror_descent",
    "pmd": "mirror_descent",
    "a*-po": "a_star_po",
    "astar_po": "a_star_po",
    "apo": "a_star_po",
    "raft": "reject_sampling",
    "rejection_sampling": "reject_sampling",
    "ppo": "grpo",
    "reinforce": "rloo",
}


def suggestion(name: str) -> str:
    """Returns `; did you mean ...?` for an unknown objective; empty if no name is similar."""
    meant = OTHER_NAMES.get(name.lower()) or next(iter(get_close_matches(name.lower(), OBJECTIVES, n=1)), None)
    return f"; did you mean {meant!r}?" if meant else ""


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
    response_weights: Array | None = None,
    lengths: Array | None = None,
) -> Array:
    """The factor of each response's log-probability gradient in one step of the named objective.

    -sum_i c_i grad log pi_i is the gradient of a mean over the G groups that count, of

      gvpo                1/(2 beta) 1/(k-1) sum w^2, Eq. 16                       k >= 2   c = f w / ((k-1) G)
      trajectory_balance  beta/2 1/k sum (log Z + s - R/beta)^2, log Z estimated   k >= 2   c = w / (k G)
      rebel               1/(4 beta) mean over pairs of (beta (s-s') - (R-R'))^2   k >= 2   c = w / ((k-1) G)
      mirror_descent      1/(2 beta) 1/k sum (D(R) - beta s)^2                     k >= 2   c = (D(R) - beta s) / (k G)
      a_star_po           1/(2 beta) 1/k sum (R - V - beta s)^2                    k >= 2   c = (R - V - beta s) / (k G)
      grpo                -1/k sum min(rho A, clamp(rho) A), A = grpo_weights      k >= 2   c = w_clip / (k G)
      dr_grpo             the same, A = dr_grpo_weights                            k >= 2   c = w_clip / (k G)
      rloo                the same, A = rloo_weights                               k >= 2   c = w_clip / (k G)
      gspo                the same with rho^(1/n), A = grpo_weights                k >= 2   c = w_clip / (n k G)
      maxrl               the same with rho, A = D(R) / mean(R)                    k >= 2   c = w_clip / (k G)
      reject_sampling     -log pi of the best response                             k >= 1   c = w / G
      sft                 -1/k sum log pi                                          k >= 1   c = w / (k G)
      dpo                 -log sigmoid(beta s_best - beta s_worst), Eq. 8      two rewards  c = beta w / G

    where w are that objective's weights (gvpo_weights for the first three), w_clip = clipped_ratio_weights(A), and n is
    a response's length. In grpo, dr_grpo, rloo and gspo, beta is the coefficient of the KL penalty (k1) in the reward.
    The penalty is constant and computed at old_logprobs (Eq. 18). At logprobs = old_logprobs the coefficients of rloo
    are those of gvpo. V = beta log mean exp(R/beta - s_old) over the group, s_old = old_logprobs - ref_logprobs.

    Args:
      name: one of OBJECTIVES.
      logprobs: (N,) float, nats; log pi_theta of whole responses.
      ref_logprobs: (N,) float, nats; log pi_ref.
      old_logprobs: (N,) float, nats, of the policy that sampled; a_star_po, grpo, dr_grpo, rloo, gspo and maxrl
        read it. For the others it may be None.
      rewards: (N,) real; NaN = no score, the response leaves its group in every objective, also in sft.
      group_ids: (N,) integer in 0..num_groups-1; rows of a group may be anywhere.
      beta: reward units per nat (dpo: per nat), >= 0, and > 0 for dpo and a_star_po. Unused by maxrl, reject_sampling
        and sft. It is TBA's beta, REBEL's 1/eta, Kimi's tau, A*-PO's beta_1 = beta_2.
      num_groups: static int; default: largest id + 1. Required under compilation.
      valid: (N,) bool; True = counted. Default: all.
      clip: > 0, the largest distance of the ratio from 1; used by grpo, dr_grpo, rloo, gspo and maxrl.
      response_weights: (N,) float > 0, f of GVPO++, only for gvpo. Default: 1.
      lengths: (N,) real >= 1, tokens of each response; only gspo reads it.
    Returns: (N,), constant under differentiation; 0 for rows and groups that do not count.
    Raises: TypeError, ValueError: an argument of a wrong type, dtype, shape, device or value; the message names it.
      ValueError: an unknown name; old_logprobs or lengths missing although the objective reads them; response_weights
      with an objective other than gvpo; a negative reward in maxrl.
    Reference: Zhang et al., GVPO, arXiv 2504.19599, Eq. 9, 12, 18 and 19; f: GVPO++, arXiv 2609.21432. The others:
      docs/objectives.md lists the papers, their equations and the departures.
    """
    if name not in TABLE:
        raise ValueError(f"objective is {name!r}; expected one of {', '.join(OBJECTIVES)}{suggestion(str(name))}")
    objective = TABLE[name]
    rows = {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "rewards": rewards}
    if objective.needs_lengths and lengths is not None:
        rows["lengths"] = lengths
    check_rows(rows, group_ids=group_ids, valid=valid)
    check_beta(beta, positive=objective.positive_beta)
    if objective.needs_old and old_logprobs is None:
        raise ValueError(f"old_logprobs is None; {name} needs the log-probabilities at sampling")
    if response_weights is not None and name != "gvpo":
        raise ValueError(f"response_weights was given; {name} has none, only gvpo does")
    if objective.needs_lengths and lengths is None:
        raise ValueError(f"lengths is None; {name} needs the length of each response")
    arguments = (logprobs, ref_logprobs, old_logprobs, rewards, group_ids, constant(beta), num_groups, valid, clip)
    groups, weights = objective.weights(Scores(*arguments, response_weights, lengths))
    return stop_gradient(weights / groups.per_row(objective.scale(groups, constant(beta))))
