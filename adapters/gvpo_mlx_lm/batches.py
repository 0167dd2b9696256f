"""Which responses of an optimizer step go through the model together."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gvpo_mlx_lm.groups import Group


class StepResponse(NamedTuple):
    """One response of a step."""

    group: int  # among the step's groups
    response: int  # among the group's


def epochs(groups: int, per_step: int, seed: int) -> Iterator[list[int]]:
    """The groups of one optimizer step after another, in a new order each epoch."""
    epoch, order = 0, np.empty(0, dtype=np.int64)
    while True:
        while len(order) < per_step:
            fresh = np.random.default_rng(np.random.SeedSequence((seed, epoch))).permutation(groups)
            order, epoch = np.concatenate([order, fresh]), epoch + 1
        yield order[:per_step].tolist()
        order = order[per_step:]


def grouped_micro_batches(groups: Sequence[Group], micro_batches: int, rows: int) -> list[list[StepResponse]] | None:
    """The step's responses in `micro_batches` of at most `rows`, each group in one of them; None if they do not fit.

    The largest groups first, each to the emptiest micro-batch: a group then waits for no other part of the step.
    """
    micro: list[list[StepResponse]] = [[] for _ in range(micro_batches)]
    for g in sorted(range(len(groups)), key=lambda g: -len(groups[g])):
        least = min(micro, key=len)
        if len(least) + len(groups[g]) > rows:
            return None
        least += [StepResponse(g, i) for i in range(len(groups[g]))]
    return micro


def split_groups(groups: Sequence[Group], micro_batches: int) -> list[list[StepResponse]]:
    """The step's responses in `micro_batches` of nearly equal size, regardless of groups."""
    everything = [StepResponse(g, i) for g in range(len(groups)) for i in range(len(groups[g]))]
    return [[everything[i] for i in part] for part in np.array_split(np.arange(len(everything)), micro_batches)]
