"""The table of objectives (Eq. 9): how each weighs the responses of a group, and how a step adds them up."""

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, NamedTuple

from gvpo_core._arrays import Array, check_beta, check_rows, constant, stop_gradient
from gvpo_core.baselines import clipped_ratio_weights, leave_one_out, penalised, scored, standardise
from gvpo_core.groups import Groups
from gvpo_core.objective import centred_rows
from gvpo_core.preferences import dpo_weights, pairs


class Scores(NamedTuple):
    """The arguments of `objective_coefficients`, checked."""

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


class Objective(NamedTuple):
    """One objective. Its coefficients are weights / scale, so that a step is the gradient of a mean over groups."""

    weights: Callable[[Scores], tuple[Groups, Array]]  # the groups that count, and (N,) w
    smallest: int  # scored responses that a group needs to count
    needs_old: bool  # reads the log-probabilities at sampling
    scale: Callable[[Groups, Any], Array]  # groups, beta -> (num_groups,)


def _gvpo(x: Scores) -> tuple[Groups, Array]:
    scores = (x.logprobs, x.ref_logprobs, x.rewards, x.group_ids)
    rows = centred_rows(*scores, x.beta, x.num_groups, x.valid, x.response_weights)
    return rows.groups, rows.gradient_weights()


def _clipped(advantages_of: Callable[[Groups, Array], Array]) -> Callable[[Scores], tuple[Groups, Array]]:
    """Weights by the clipped ratio; the KL penalty in the reward is taken at old_logprobs (Eq. 18)."""

    def weights(x: Scores) -> tuple[Groups, Array]:
        groups, centred = penalised(
            x.rewards, x.group_ids, x.beta, x.old_logprobs, x.ref_logprobs, x.num_groups, x.valid
        )
        advantages = advantages_of(groups, centred)
        return groups, clipped_ratio_weights(x.logprobs, x.old_logprobs, advantages, clip=x.clip, valid=groups.counted)

    return weights


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


TABLE: dict[str, Objective] = {
    "gvpo": Objective(_gvpo, 2, False, lambda groups, beta: groups.divisor(less=1) * groups.total_divisor()),
    "grpo": Objective(_clipped(lambda groups, centred: standardise(groups, centred, 1, 1e-4)), 2, True, _responses),
    "dr_grpo": Objective(_clipped(lambda groups, centred: centred), 2, True, _responses),
    "rloo": Objective(_clipped(leave_one_out), 2, True, _responses),
    "reject_sampling": Objective(_reject_sampling, 1, False, lambda groups, beta: _groups(groups)),
    "sft": Objective(_sft, 1, False, _responses),
    "dpo": Objective(_dpo, 2, False, lambda groups, beta: _groups(groups) / beta),
}
OBJECTIVES = tuple(TABLE)


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
) -> Array:
    """The factor of each response's log-probability gradient in one step of the named objective.

    -sum_i c_i grad log pi_i is the gradient of a mean over the G groups that count, of

      gvpo             1/(2 beta) 1/(k-1) sum w^2, Eq. 16                          k >= 2   c = f w / ((k-1) G)
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
      logprobs: (N,) float, nats; log pi_theta of whole responses.
      ref_logprobs: (N,) float, nats; log pi_ref.
      old_logprobs: (N,) float, nats, of the policy that sampled; grpo, dr_grpo and rloo read it, for the
        others it may be None.
      rewards: (N,) real; NaN = no score, the response leaves its group in every objective, sft too.
      group_ids: (N,) integer in 0..num_groups-1; rows of a group may lie anywhere.
      beta: reward units per nat (dpo: per nat), >= 0, for dpo > 0; unused by reject_sampling and sft.
      num_groups: static int; default: largest id + 1. Required under compilation.
      valid: (N,) bool; True = counted. Default: all.
      clip: > 0, the bound of the ratio's distance from 1; used by grpo, dr_grpo and rloo.
      response_weights: (N,) float > 0, f of GVPO++, for gvpo alone. Default: 1.
    Returns: (N,), constant under differentiation; 0 for rows and groups that do not count.
    Raises: TypeError, ValueError: an argument's type, dtype, shape, device or value, naming it; an unknown name;
      old_logprobs missing where it is read; response_weights with another objective than gvpo.
    Reference: Zhang et al., GVPO, arXiv 2504.19599, Eq. 9, 12, 18 and 19; f: GVPO++, arXiv 2609.21432.
    """
    if name not in TABLE:
        close = get_close_matches(str(name), OBJECTIVES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"objective is {name!r}; expected one of {', '.join(OBJECTIVES)}{hint}")
    check_rows(
        {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "rewards": rewards}, group_ids=group_ids, valid=valid
    )
    check_beta(beta)
    objective = TABLE[name]
    if objective.needs_old and old_logprobs is None:
        raise ValueError(f"old_logprobs is None; {name} needs the log-probabilities at sampling")
    if response_weights is not None and name != "gvpo":
        raise ValueError(f"response_weights was given; {name} has none, only gvpo does")
    arguments = (logprobs, ref_logprobs, old_logprobs, rewards, group_ids, constant(beta), num_groups, valid, clip)
    groups, weights = objective.weights(Scores(*arguments, response_weights))
    return stop_gradient(weights / groups.per_row(objective.scale(groups, constant(beta))))
