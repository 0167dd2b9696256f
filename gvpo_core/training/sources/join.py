"""Joins rollouts into one, and leaves responses out of the update."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gvpo_core.training.config import RolloutConfig
from gvpo_core.training.episodes.play import NUMBERS
from gvpo_core.training.policy import Batch, Mask, Policy, Segment
from gvpo_core.training.rollout import Rollout


def join(policy: Policy, parts: Sequence[Rollout], *, together: bool = False) -> Rollout:
    """Joins the responses of all parts into one rollout, in rank order. Every rank calls this.

    Args:
      together: group i of all parts is one group. Otherwise the groups of the parts follow one another.
    """
    if len(parts) == 1:
        return parts[0]
    firsts = [0] * len(parts) if together else np.cumsum([0, *(part.num_groups for part in parts)])[:-1].tolist()
    counts = np.stack([policy.gather(np.asarray([len(part.batch)])) for part in parts])  # (parts, ranks)
    order = _rank_order(counts)

    def in_rank_order(values: Sequence[np.ndarray]) -> np.ndarray:
        joined: np.ndarray = np.concatenate(values)[order]
        return joined

    def optional(name: str, missing: Any) -> np.ndarray | None:
        values = [getattr(part, name) for part in parts]
        if all(value is None for value in values):
            return None
        sizes = counts.sum(axis=1)
        return in_rank_order(
            [np.full((n, *np.shape(missing)), missing) if v is None else v for v, n in zip(values, sizes, strict=True)]
        )

    names = dict.fromkeys(name for part in parts for name in part.parts)
    unscored = [np.full(len(part.rewards), np.nan) for part in parts]
    local_groups = [g + first for part, first in zip(parts, firsts, strict=True) for g in part.batch.groups]
    completions = [c | {"group": c["group"] + f} for p, f in zip(parts, firsts, strict=True) for c in p.completions]
    complete = len(completions) == len(order)  # at least on the main rank
    return Rollout(
        batch=Batch(
            [prompt for part in parts for prompt in part.batch.prompts],
            [response for part in parts for response in part.batch.responses],
            local_groups,
            _masks([part.batch for part in parts]),
            later=_later([part.batch for part in parts]),
        ),
        start=int(counts[:, : policy.rank].sum()),
        group_ids=in_rank_order([part.group_ids + first for part, first in zip(parts, firsts, strict=True)]),
        num_groups=parts[0].num_groups if together else sum(part.num_groups for part in parts),
        rewards=in_rank_order([part.rewards for part in parts]),
        parts={n: in_rank_order([p.parts.get(n, u) for p, u in zip(parts, unscored, strict=True)]) for n in names},
        errors=_sums([part.errors for part in parts]),
        lengths=in_rank_order([part.lengths for part in parts]),
        finished=in_rank_order([part.finished for part in parts]),
        completions=[completions[i] for i in order] if complete else [],
        seconds=_sum([part.seconds for part in parts]),
        reward_seconds=_sum([part.reward_seconds for part in parts]),
        ref_logprobs=optional("ref_logprobs", np.nan),  # NaN: `improve` scores them
        recorded=optional("recorded", False),
        details=_sum([part.details for part in parts]),
        sampler_logprobs=optional("sampler_logprobs", np.nan),
        staleness=optional("staleness", np.nan),
        episodes=optional("episodes", np.full(NUMBERS, np.nan)),
        gaps=next((p.gaps for p in parts if p.gaps is not None), None),
        columns=parts[0].columns if together else [columns for part in parts for columns in part.columns],
        prompts=parts[0].prompts if together else [prompt for part in parts for prompt in part.prompts],
        left_out=optional("left_out", False),
        stopped=optional("stopped", False),
    )


def leave_out(rollout: Rollout, config: RolloutConfig) -> Rollout:
    """Leaves responses out of the update, as the settings say. Their rewards, records and metrics stay.

    truncated = "drop" leaves out responses that were cut. equal = "skip" or "redraw" leaves out groups with equal
    remaining rewards. If all groups are like that, none of them is left out.
    """
    unused = np.zeros(len(rollout.rewards), bool)
    if config.truncated == "drop":
        unused |= ~rollout.finished
    if config.equal != "keep":
        equal = equal_groups(replace(rollout, left_out=unused))
        unused |= equal[rollout.group_ids] if not equal.all() else False
    if not unused.any():
        return rollout
    completions = rollout.completions
    if completions:
        completions = [c | ({"left_out": True} if u else {}) for c, u in zip(completions, unused, strict=True)]
    return replace(rollout, left_out=unused, completions=completions)


def equal_groups(rollout: Rollout) -> np.ndarray:
    """(G,) bool: True for groups without two different rewards among the responses of the update."""
    rewards = rollout.trained_rewards
    scored = ~np.isnan(rewards)
    low, high = np.full(rollout.num_groups, np.inf), np.full(rollout.num_groups, -np.inf)
    np.minimum.at(low, rollout.group_ids[scored], rewards[scored])
    np.maximum.at(high, rollout.group_ids[scored], rewards[scored])
    equal: np.ndarray = low >= high
    return equal


def _masks(batches: Sequence[Batch]) -> list[Mask | None] | None:
    """Concatenates `Batch.masks` of the batches."""
    if all(batch.masks is None for batch in batches):
        return None
    return [mask for batch in batches for mask in (batch.masks or [None] * len(batch))]


def _later(batches: Sequence[Batch]) -> list[Sequence[Segment]] | None:
    """Concatenates `Batch.later` of the batches."""
    if all(batch.later is None for batch in batches):
        return None
    return [segments for batch in batches for segments in (batch.later or [()] * len(batch))]


def _rank_order(counts: np.ndarray) -> np.ndarray:
    """Returns the index of each joined row in the concatenated arrays of the parts: rank by rank, part by part.

    Args:
      counts: (parts, ranks) number of rows of each part on each rank.
    """
    sizes = counts.sum(axis=1)
    bases = np.cumsum([0, *sizes])[:-1]
    starts = bases[:, None] + np.cumsum(counts, axis=1) - counts
    runs = [
        np.arange(starts[p, r], starts[p, r] + counts[p, r]) for r in range(counts.shape[1]) for p in range(len(counts))
    ]
    return np.concatenate(runs).astype(np.int64)


def _sum(mappings: Sequence[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for mapping in mappings for name in mapping)
    return {name: sum(mapping.get(name, 0) for mapping in mappings) for name in names}


def _sums(mappings: Sequence[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    names = dict.fromkeys(name for mapping in mappings for name in mapping)
    return {name: _sum([mapping.get(name, {}) for mapping in mappings]) for name in names}  # type: ignore[misc]
