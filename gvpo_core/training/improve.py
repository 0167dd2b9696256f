"""Turns a rollout into optimizer steps: chooses the rows, computes the weights (Eq. 9), and calls the policy."""

import time
from dataclasses import dataclass, field, replace

import numpy as np

from gvpo_core.training.config import ObjectiveConfig
from gvpo_core.training.dealing import Deal, deal
from gvpo_core.training.objective import ObjectiveError, TrainingObjective, find_objective
from gvpo_core.training.policy import Coefficients, Policy, Update
from gvpo_core.training.policy.step import check_finite
from gvpo_core.training.rollout import Rollout


class NoSignalError(RuntimeError):
    """No group of a rollout can be learned from."""


@dataclass
class Improvement:
    """The results of one rollout's updates, for the metrics. N rows over all ranks; NaN = no score."""

    logprobs: np.ndarray  # (N,) of the policy before each row's first update
    ref_logprobs: np.ndarray  # (N,)
    updates: list[Update] = field(default_factory=list)  # of this rank
    score_seconds: float = 0.0
    update_seconds: float = 0.0
    tokens: int = 0  # computed in the updates, over all ranks
    peak_memory: int = 0  # bytes, of the rank that used most


def renew_reference(policy: Policy, config: ObjectiveConfig, step: int) -> None:
    """Makes the policy the reference every `config.reference_every` steps.

    Args:
      step: the next step, from 1.
    """
    if config.reference_every and step > 1 and (step - 1) % config.reference_every == 0:
        policy.renew_reference()


def with_signal(rollout: Rollout, config: ObjectiveConfig) -> Rollout:
    """Returns the rollout. Raises: NoSignalError: no group has enough scored responses."""
    need = find_objective(config).smallest
    if not (_scored(rollout)[1] >= need).any():
        raise NoSignalError(_no_signal(rollout, need))
    return rollout


def _scored(rollout: Rollout) -> tuple[np.ndarray, np.ndarray]:
    """Returns (N,) whether a response has a reward, and (G,) the number of such responses in each group."""
    scored = ~np.isnan(rollout.trained_rewards)
    return scored, np.bincount(rollout.group_ids[scored], minlength=rollout.num_groups)


def improve(
    policy: Policy,
    rollout: Rollout,
    config: ObjectiveConfig,
    *,
    seed: tuple[int, ...],
) -> Improvement:
    """Takes the optimizer steps of a rollout: `epochs` passes of `minibatches` steps of whole groups.

    Responses without a score are dropped. The first step uses the log-probs of a scoring pass before it, if there was
    one, because the policy has not changed since.

    Args:
      seed: seed of the order of the groups in epochs after the first.
    Raises: NoSignalError: no group has enough scored responses. ObjectiveError: a user's objective failed,
      or a negative reward in maxrl.
    """
    objective = find_objective(config)
    scored, sizes = _scored(rollout)
    need = objective.smallest
    with_signal(rollout, config)
    if objective.no_negative_rewards and (lowest := float(rollout.rewards[scored].min())) < 0:
        raise ObjectiveError(
            f"objective.name = {objective.name!r} divides by a group's mean reward and expects rewards >= 0; the lowest"
            f" is {lowest:g}: shift or clip them, or use rloo, grpo or gvpo"
        )
    start = time.perf_counter()
    dealt = deal(policy, rollout, scored, _steps(rollout.num_groups, config, seed, 0))
    batch, rows = dealt.batch, dealt.rows
    by_group = dealt.complete and getattr(policy, "by_group", False)
    ref = old = None
    if config.reference == "initial":
        ref = _of_reference(policy, rollout, scored, dealt)
    elif rollout.ref_logprobs is not None:
        ref = rollout.ref_logprobs
    updates = config.epochs * config.minibatches
    if updates > 1 and (config.reference == "rollout" or objective.needs_old):
        old = dealt.gathered(policy, policy.logprobs(batch), scored)
    clock = time.perf_counter()

    result = Improvement(np.full(len(scored), np.nan), np.full(len(scored), np.nan), score_seconds=clock - start)
    for epoch in range(config.epochs):
        for groups in _steps(rollout.num_groups, config, seed, epoch):
            chosen = scored & np.isin(rollout.group_ids, groups)
            if not (sizes[groups] >= need).any():
                continue
            coefficients = _coefficients(policy, rollout, objective, ref, old, chosen, dealt)
            local_chosen = np.flatnonzero(chosen[rows])
            part = replace(batch.take([int(i) for i in local_chosen]), complete=by_group)
            first = not result.updates
            scored_logprobs = old[rows[local_chosen]] if old is not None and first else None
            update = policy.update(part, coefficients, scored=scored_logprobs)
            result.updates.append(update)
            if epoch == 0:
                result.logprobs[chosen] = dealt.gathered(policy, update.logprobs, chosen)[chosen]
    if old is not None:
        result.logprobs = old
    result.ref_logprobs = result.logprobs if ref is None else ref
    result.update_seconds = time.perf_counter() - clock
    result.tokens = int(policy.gather(np.asarray([sum(u.tokens for u in result.updates)])).sum())
    result.peak_memory = int(policy.gather(np.asarray([max(u.peak_memory for u in result.updates)])).max())
    return result


def _of_reference(policy: Policy, rollout: Rollout, scored: np.ndarray, dealt: Deal) -> np.ndarray:
    """Returns (N,) log-probs of pi_ref for the scored rows, from the source or computed."""
    ref_logprobs = np.full(len(scored), np.nan) if rollout.ref_logprobs is None else rollout.ref_logprobs
    missing = scored & np.isnan(ref_logprobs)
    if not missing.any():
        return ref_logprobs
    batch = dealt.batch.take([int(i) for i in np.flatnonzero(missing[dealt.rows])])
    return np.where(missing, dealt.gathered(policy, policy.logprobs(batch, reference=True), missing), ref_logprobs)


def _no_signal(rollout: Rollout, need: int) -> str:
    scored, left_out = ~np.isnan(rollout.rewards), 0 if rollout.left_out is None else int(rollout.left_out.sum())
    scored_part = f"{int(scored.sum())} of the {len(scored)} responses in {rollout.num_groups} groups were scored"
    if left_out:
        return (
            f"no group has {need} responses to train on: {scored_part}, and {left_out} are left out, as cut at"
            " rollout.max_tokens (rollout.truncated = 'drop'): raise rollout.max_tokens"
        )
    return f"no group has {need} scored responses: {scored_part}; see the reward's warnings"


def _steps(groups: int, config: ObjectiveConfig, seed: tuple[int, ...], epoch: int) -> list[np.ndarray]:
    """The groups of each optimizer step of an epoch."""
    return np.array_split(_order(groups, seed, epoch), config.minibatches)


def _order(groups: int, seed: tuple[int, ...], epoch: int) -> np.ndarray:
    """Returns a permutation of the groups. The first epoch needs none: the prompts are already in random order."""
    if epoch == 0:
        return np.arange(groups)
    return np.random.default_rng(np.random.SeedSequence((*seed, epoch))).permutation(groups)


def _coefficients(
    policy: Policy,
    rollout: Rollout,
    objective: TrainingObjective,
    ref: np.ndarray | None,
    old: np.ndarray | None,
    chosen: np.ndarray,
    dealt: Deal,
) -> Coefficients:
    """Returns a function that computes the objective's float64 weights for any part of this rank's chosen rows.

    A group's weights depend on its own rows and on the number of groups, never on other groups' log-probs. So if no
    group is on two ranks, a call may pass only some whole groups. Otherwise, and for a policy that does not call by
    group, every rank passes all its rows and the log-probs are gathered.
    """
    rows = dealt.rows
    places = np.cumsum(chosen) - 1  # position of each chosen row among the chosen rows
    local_places = places[rows[chosen[rows]]]
    gathering = policy.world_size > 1 and not (dealt.complete and getattr(policy, "by_group", False))
    _, group_ids = np.unique(rollout.group_ids[chosen], return_inverse=True)
    num_groups = int(group_ids.max()) + 1
    placeholder = ref if old is None else old  # for the other groups: harmless numbers of the right size

    def coefficients(logprobs: np.ndarray, part: np.ndarray) -> np.ndarray:
        logprobs = np.asarray(logprobs, np.float64)
        if gathering:
            full = dealt.gathered(policy, logprobs, chosen)[chosen]
        else:
            full = np.zeros(len(group_ids)) if placeholder is None else placeholder[chosen].copy()
            full[local_places[part]] = logprobs
        factors = factors_at(full)
        if gathering:  # all ranks raise together, so none waits for another
            check_finite("log-probabilities", full, np.flatnonzero(chosen))
            check_finite("coefficients", factors, np.flatnonzero(chosen))
        elif objective.function is not None and len(part) < len(group_ids):
            check_own_group(full, factors, local_places[part])
        result: np.ndarray = factors[local_places[part]]
        return result

    def factors_at(full: np.ndarray) -> np.ndarray:
        before = full if old is None else old[chosen]
        reference = before if ref is None else ref[chosen]
        rewards, lengths = rollout.rewards[chosen], rollout.lengths[chosen]
        return objective.coefficients(full, reference, before, rewards, group_ids, num_groups, lengths)

    def check_own_group(full: np.ndarray, factors: np.ndarray, part: np.ndarray) -> None:
        others = np.setdiff1d(np.arange(len(full)), part)
        moved = full.copy()
        moved[others] += 1.0
        if not np.allclose(factors_at(moved)[part], factors[part], rtol=1e-9, atol=0, equal_nan=True):
            raise ObjectiveError(
                f"objective.name = {objective.name!r} gives a response another coefficient when the log-probs of other"
                " groups change; it may depend only on the response's group, as a micro-batch holds only some groups"
            )

    return coefficients
