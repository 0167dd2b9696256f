"""Deals groups to ranks for training: whole groups, longest first, so that the ranks finish together.

A rollout's responses are on the ranks that drew them, in equal contiguous parts. So a group may be on two ranks, and
one rank may hold most of the long responses. Before the updates each group moves to one rank. The step is the sum over
all groups, so it does not depend on which rank holds which group.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gvpo_core.training.policy import Batch, Mask, Policy, Segment, Tokens
from gvpo_core.training.policy.tree import depth_first
from gvpo_core.training.rollout import Rollout

SPLIT_COST = 4 / 3  # a group on two ranks is scored before its gradient is taken: 8 units of work instead of 6


class Deal(NamedTuple):
    """The scored rows of a rollout, by rank."""

    batch: Batch  # this rank's rows
    rows: np.ndarray  # (n,) int64: their positions among the rollout's N rows
    order: np.ndarray  # (M,) int64: the rows of all ranks in rank order, as `Policy.gather` gives them
    complete: bool  # no group is on two ranks

    def gathered(self, policy: Policy, values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """Gathers (N,) float64 values of all ranks' `chosen` rows, at their positions; NaN elsewhere.

        Args:
          values: of this rank's chosen rows, in the order of `rows`.
          chosen: (N,) bool.
        """
        all_values = np.full(len(chosen), np.nan)
        all_values[self.order[chosen[self.order]]] = policy.gather(np.asarray(values, np.float64))
        return all_values


def deal(policy: Policy, rollout: Rollout, scored: np.ndarray, steps: Sequence[np.ndarray]) -> Deal:
    """Deals the scored rows to the ranks. Every rank must call it.

    Groups stay where they are if moving whole groups would give the fullest rank more work: one group on eight ranks.

    Args:
      scored: (N,) bool.
      steps: the groups of each optimizer step of the first epoch; each step is balanced.
    """
    local_rows = np.arange(rollout.start, rollout.start + len(rollout.batch))
    rows = local_rows[scored[local_rows]]
    if policy.world_size == 1:
        return Deal(_rows_at(rollout.batch, rows - rollout.start), rows, rows, True)
    home = policy.gather(np.full(len(local_rows), policy.rank, np.int64))
    prompts = policy.gather(np.asarray([len(prompt) for prompt in rollout.batch.prompts], np.int64))
    added = np.zeros(len(local_rows), np.int64)
    added[scored[local_rows]] = added_tokens(
        _rows_at(rollout.batch, rows - rollout.start), getattr(policy, "packed", False)
    )
    lengths = policy.gather(added)
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
        batch, start = _all_ranks_batch(policy, batch), 0
    rows = np.flatnonzero(scored & (owners == policy.rank))
    order = np.flatnonzero(scored)
    order = order[np.argsort(owners[order], kind="stable")]
    return Deal(_rows_at(batch, rows - start), rows, order, complete)


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
    """Returns the rank of each row, and whether each group is on a single rank.

    Args:
      group_ids, home: (N,) int64: each row's group, and the rank that holds it now.
      prompts, lengths: (N,) int64, tokens of each row's prompt, and tokens that the row adds; see `added_tokens`.
      scored: (N,) bool: rows that are trained on.
      steps: the groups of each optimizer step.
      split_cost: work on a group that is on two ranks, relative to a group on one rank.
    """
    num_groups = 1 + max((int(groups.max()) for groups in steps if len(groups)), default=-1)
    ids = group_ids[scored]
    prompt = np.zeros(num_groups, np.int64)
    np.maximum.at(prompt, ids, prompts[scored])
    costs = prompt + np.bincount(ids, weights=lengths[scored], minlength=num_groups)
    owner = np.zeros(num_groups, np.int64)
    grouped_work = split_work = 0.0
    for groups in steps:
        owner[groups], loads = longest_first(costs[groups], ranks)
        grouped_work += loads.max(initial=0.0)
        of_step = scored & np.isin(group_ids, groups)
        parts = {(int(r), int(g)): int(prompt[g]) for r, g in zip(home[of_step], group_ids[of_step], strict=True)}
        split_loads = np.bincount(home[of_step], weights=lengths[of_step], minlength=ranks)
        for (rank, _), tokens in parts.items():
            split_loads[rank] += tokens
        split_work += split_loads.max(initial=0.0)
    if grouped_work <= split_cost * split_work:
        return owner[group_ids], True
    ranks_of = {(int(g), int(r)) for g, r in zip(ids, home[scored], strict=True)}
    return home, len(ranks_of) == len({g for g, _ in ranks_of})


def longest_first(costs: np.ndarray, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """Gives each group, longest first, to the rank with the least work so far.

    The fullest rank gets at most 4/3 of the least possible work (Graham, 1969).

    Returns: (G,) int64, the rank of each group; (ranks,) float64, the work of each rank.
    """
    owner, loads = np.zeros(len(costs), np.int64), np.zeros(ranks)
    for group in np.argsort(-costs, kind="stable"):
        owner[group] = loads.argmin()
        loads[owner[group]] += costs[group]
    return owner, loads


def _rows_at(batch: Batch, places: np.ndarray) -> Batch:
    return batch.take([int(i) for i in places])


def added_tokens(batch: Batch, packed: bool) -> np.ndarray:
    """Returns (N,) int64: the tokens that each response, with all its segments, adds to its group's prompt.

    Args:
      packed: a common beginning of a group's responses counts once, as in packed rows. Otherwise every row but the
        first counts with its prompt.
    """
    rows, owners = batch.by_segment()
    members: dict[int, list[int]] = {}
    for i, label in enumerate(rows.groups):
        members.setdefault(label, []).append(i)
    counts = np.zeros(len(batch), np.int64)
    for places in members.values():
        texts = [rows.prompts[i] + rows.responses[i] for i in places]
        order = depth_first(texts) if packed else [(n, 0) for n in range(len(texts))]
        for n, shared in order:
            counts[owners[places[n]]] += len(texts[n]) - shared
        first = owners[places[order[0][0]]]
        counts[first] -= len(batch.prompts[first])
    return counts


def _all_ranks_batch(policy: Policy, batch: Batch) -> Batch:
    """Returns the rows of all ranks, in rank order."""
    repeats = [i > 0 and batch.prompts[i] == batch.prompts[i - 1] for i in range(len(batch))]  # sent once per group
    prompts = _gathered(policy, [() if repeated else p for p, repeated in zip(batch.prompts, repeats, strict=True)])
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
    """Returns the masks of all ranks, in rank order."""
    return [tuple(map(bool, mask)) or None for mask in _gathered(policy, [mask or () for mask in masks])]


def _later(policy: Policy, batch: Batch) -> list[tuple[Segment, ...]]:
    """Returns `Batch.later` of all ranks, in rank order."""
    segments_of_rows = [()] * len(batch) if batch.later is None else batch.later
    counts = policy.gather(np.asarray([len(segments) for segments in segments_of_rows], np.int64))
    flat = [segment for segments in segments_of_rows for segment in segments]
    prompts = _gathered(policy, [segment.prompt for segment in flat])
    responses = _gathered(policy, [segment.response for segment in flat])
    masks = _masks(policy, [segment.mask for segment in flat])
    all_segments = iter([Segment(*parts) for parts in zip(prompts, responses, masks, strict=True)])
    return [tuple(itertools.islice(all_segments, count)) for count in counts.tolist()]


def _gathered(policy: Policy, rows: Sequence[Sequence[int]]) -> list[Tokens]:
    """Returns the lists of integers of all ranks, in rank order."""
    lengths = policy.gather(np.asarray([len(row) for row in rows], np.int64))
    flat = policy.gather(np.asarray([value for row in rows for value in row], np.int64)).tolist()
    stops = np.cumsum(lengths)
    return [tuple(flat[stop - n : stop]) for stop, n in zip(stops.tolist(), lengths.tolist(), strict=True)]
