"""Splits the responses of an optimizer step into micro-batches."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gvpo_mlx_lm.groups import Group


class StepResponse(NamedTuple):
    """One response of a step."""

    group: int  # index in the step
    response: int  # index in the group


def epochs(groups: int, per_step: int, seed: int) -> Iterator[list[int]]:
    """Yields the groups of each optimizer step, without end. Each epoch has a new order."""
    epoch, order = 0, np.empty(0, dtype=np.int64)
    while True:
        while len(order) < per_step:
            fresh = np.random.default_rng(np.random.SeedSequence((seed, epoch))).permutation(groups)
            order, epoch = np.concatenate([order, fresh]), epoch + 1
        yield order[:per_step].tolist()
        order = order[per_step:]


def grouped_micro_batches(groups: Sequence[Group], micro_batches: int, rows: int) -> list[list[StepResponse]] | None:
    """Returns the step's responses in `micro_batches` of at most `rows`, with no group split; None if they do not fit.

    Assigns the largest groups first, each to the emptiest micro-batch. So no group depends on another micro-batch.
    """
    micro: list[list[StepResponse]] = [[] for _ in range(micro_batches)]
    for g in sorted(range(len(groups)), key=lambda g: -len(groups[g])):
        emptiest = min(micro, key=len)
        if len(emptiest) + len(groups[g]) > rows:
            return None
        emptiest += [StepResponse(g, i) for i in range(len(groups[g]))]
    return micro


def split_groups(groups: Sequence[Group], micro_batches: int) -> list[list[StepResponse]]:
    """Returns the step's responses in `micro_batches` of nearly equal size, ignoring groups."""
    responses = [StepResponse(g, i) for g in range(len(groups)) for i in range(len(groups[g]))]
    return [[responses[i] for i in part] for part in np.array_split(np.arange(len(responses)), micro_batches)]
