"""Which rank trains on which group: whole groups, longest first, so that ranks finish together.

A rollout's responses are on the ranks that drew them, in equal runs: a group may be on two ranks, and a rank may hold
the long ones. Before the updates each group moves to one rank. The step is the sum over all groups, so it does not
depend on who holds which.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gvpo_core.training.policy import Batch, Mask, Policy, Segment, Tokens
from gvpo_core.training.policy.tree import depth_first
from gvpo_core.training.rollout import Rollout

SPLIT_COST = 4 / 3  # of a group on two ranks: it is scored before its gradient is taken, 8 parts of work instead of 6


class Deal(NamedTuple):
    """The scored rows of a rollout, by rank."""

    batch: Batch  # of this rank
    rows: np.ndarray  # (n,) int64: its rows, as places among the rollout's N
    order: np.ndarray  # (M,) int64: the rows of all ranks in rank order, as `Policy.gather` gives them
    complete: bool  # no group is on two ranks

    def gathered(self, policy: Policy, values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """(N,) float64: numbers of each rank's `chosen` rows, at their places; NaN elsewhere.

        Args:
          values: of this rank's chosen rows, in the order of `rows`.
          chosen: (N,) bool.
        """
        everywhere = np.full(len(chosen), np.nan)
        everywhere[self.order[chosen[self.order]]] = policy.gather(np.asarray(values, np.float64))
        return everywhere


def deal(policy: Policy, rollout: Rollout, scored: np.ndarray, steps: Sequence[np.ndarray]) -> Deal:
    """Deals the scored rows to the ranks; every rank calls.

    Groups stay where they are if moving them whole leaves the fullest rank with more work than that: one group on
    eight ranks.

    Args:
      scored: (N,) bool.
      steps: the groups of each optimizer step of the first epoch; each step is balanced.
    """
    here = np.arange(rollout.start, rollout.start + len(rollout.batch))
    rows = here[scored[here]]
    if policy.world_size == 1:
        return Deal(_taken(rollout.batch, rows - rollout.start), rows, rows, True)
    home = policy.gather(np.full(len(here), policy.rank, np.int64))
    prompts = policy.gather(np.asarray([len(prompt) for prompt in rollout.batch.prompts], np.int64))
    of_rows = np.zeros(len(here), np.int64)
    of_rows[scored[here]] = added_tokens(_taken(rollout.batch, rows - rollout.start), getattr(policy, "packed", False))
    lengths = policy.gather(of_rows)
    owners, complete = assign(
        rollout.group_ids,
        home,
        prompts,
        lengths,
        scored,
        steps,
        policy.world_size,
        split_cost=SPLIT_COST if getattr(policy, "by_group", False) else 1.0,
    )
    batch, start = rollout.batch, rollout.start
    if (owners != home)[scored].any():
        batch, start = _everyones(policy, batch), 0
    rows = np.flatnonzero(scored & (owners == policy.rank))
    order = np.flatnonzero(scored)
    order = order[np.argsort(owners[order], kind="stable")]
    return Deal(_taken(batch, rows - start), rows, order, complete)


def assign(
    group_ids: np.ndarray,
    home: np.ndarray,
    prompts: np.ndarray,
    lengths: np.ndarray,
    scored: np.ndarray,
    steps: Sequence[np.ndarray],
    ranks: int,
    *,
    split_cost: float = SPLIT_COST,
) -> tuple[np.ndarray, bool]:
    """The rank of each row, and whether each group is on one.

    Args:
      group_ids, home: (N,) int64: each row's group, and the rank that holds it now.
      prompts, lengths: (N,) int64, tokens of each row's prompt, and those that it adds; see `added_tokens`.
      scored: (N,) bool: rows that are trained on.
      steps: the groups of each optimizer step.
      split_cost: of work on a group that is on two ranks, over that on one that is not.
    """
    num_groups = 1 + max((int(groups.max()) for groups in steps if len(groups)), default=-1)
    ids = group_ids[scored]
    prompt = np.zeros(num_groups, np.int64)
    np.maximum.at(prompt, ids, prompts[scored])
    costs = prompt + np.bincount(ids, weights=lengths[scored], minlength=num_groups)
    owner = np.zeros(num_groups, np.int64)
    by_group = split = 0.0
    for groups in steps:
        owner[groups], loads = longest_first(costs[groups], ranks)
        by_group += loads.max(initial=0.0)
        of_step = scored & np.isin(group_ids, groups)
        parts = {(int(r), int(g)): int(prompt[g]) for r, g in zip(home[of_step], group_ids[of_step], strict=True)}
        held = np.bincount(home[of_step], weights=lengths[of_step], minlength=ranks)
        for (rank, _), tokens in parts.items():
            held[rank] += tokens
        split += held.max(initial=0.0)
    if by_group <= split_cost * split:
        return owner[group_ids], True
    ranks_of = {(int(g), int(r)) for g, r in zip(ids, home[scored], strict=True)}
    return home, len(ranks_of) == len({g for g, _ in ranks_of})


def longest_first(costs: np.ndarray, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """(G,) int64, the rank of each group, each to the rank with the least work so far; and (ranks,) float64, the work.

    At most 4/3 of the least possible work of the fullest rank (Graham, 1969).
    """
    owner, loads = np.zeros(len(costs), np.int64), np.zeros(ranks)
    for group in np.argsort(-costs, kind="stable"):
        owner[group] = loads.argmin()
        loads[owner[group]] += costs[group]
    return owner, loads


def _taken(batch: Batch, places: np.ndarray) -> Batch:
    return batch.take([int(i) for i in places])


def added_tokens(batch: Batch, packed: bool) -> np.ndarray:
    """(N,) int64: the tokens that each response adds to its group's prompt, those of all its segments.

    Args:
      packed: what responses of a group begin with in common counts once, as packed rows compute it; else every row
        counts with its prompt, but for the first.
    """
    rows, owners = batch.by_segment()
    members: dict[int, list[int]] = {}
    for i, label in enumerate(rows.groups):
        members.setdefault(label, []).append(i)
    counts = np.zeros(len(batch), np.int64)
    for of_group in members.values():
        texts = [rows.prompts[i] + rows.responses[i] for i in of_group]
        order = depth_first(texts) if packed else [(n, 0) for n in range(len(texts))]
        for n, shared in order:
            counts[owners[of_group[n]]] += len(texts[n]) - shared
        first = owners[of_group[order[0][0]]]
        counts[first] -= len(batch.prompts[first])
    return counts


def _everyones(policy: Policy, batch: Batch) -> Batch:
    """The rows of all ranks, in rank order."""
    same = [i > 0 and batch.prompts[i] == batch.prompts[i - 1] for i in range(len(batch))]  # sent once a group
    prompts = _gathered(policy, [() if repeated else p for p, repeated in zip(batch.prompts, same, strict=True)])
    for i, prompt in enumerate(prompts):
        prompts[i] = prompt or prompts[i - 1]
    flags = policy.gather(np.asarray([batch.masks is not None, batch.later is not None])).reshape(-1, 2)
    has_masks, has_later = bool(flags[:, 0].any()), bool(flags[:, 1].any())
    masks: list[Mask | None] | None = None
    if has_masks:
        masks = _masks(policy, [None] * len(batch) if batch.masks is None else batch.masks)
    groups = [int(g) for g in policy.gather(np.asarray(batch.groups, np.int64))]
    responses = _gathered(policy, list(batch.responses))
    return Batch(prompts, responses, groups, masks, later=_later(policy, batch) if has_later else None)


def _masks(policy: Policy, masks: Sequence[Mask | None]) -> list[Mask | None]:
    """Masks of all ranks, in rank order."""
    return [tuple(map(bool, mask)) or None for mask in _gathered(policy, [mask or () for mask in masks])]


def _later(policy: Policy, batch: Batch) -> list[tuple[Segment, ...]]:
    """`Batch.later` of all ranks, in rank order."""
    of_each = [()] * len(batch) if batch.later is None else batch.later
    counts = policy.gather(np.asarray([len(segments) for segments in of_each], np.int64))
    flat = [segment for segments in of_each for segment in segments]
    prompts = _gathered(policy, [segment.prompt for segment in flat])
    responses = _gathered(policy, [segment.response for segment in flat])
    masks = _masks(policy, [segment.mask for segment in flat])
    every = iter([Segment(*parts) for parts in zip(prompts, responses, masks, strict=True)])
    return [tuple(itertools.islice(every, count)) for count in counts.tolist()]


def _gathered(policy: Policy, rows: Sequence[Sequence[int]]) -> list[Tokens]:
    """Lists of integers of all ranks, in rank order."""
    lengths = policy.gather(np.asarray([len(row) for row in rows], np.int64))
    flat = policy.gather(np.asarray([value for row in rows for value in row], np.int64)).tolist()
    stops = np.cumsum(lengths)
    return [tuple(flat[stop - n : stop]) for stop, n in zip(stops.tolist(), lengths.tolist(), strict=True)]
