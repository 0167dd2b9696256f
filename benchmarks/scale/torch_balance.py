"""How long ranks that meet at every micro-batch take, over the mean: lengths are ragged, and the fullest rank decides.

J2 with log-normal lengths of responses (spread 0.8, mean about 1,300, at most 4,096 tokens) on 8 ranks, in packed rows
of at most 8,192 tokens; a micro-batch costs its tokens. Before: equal runs of responses, as they are drawn.
"""

import itertools
from collections.abc import Iterator

import numpy as np

from benchmarks.scale.table import Count
from gvpo_core.training.dealing import assign
from gvpo_core.training.policy import Batch
from gvpo_core.training.policy.layout import Splitting
from gvpo_core.training.policy.step import HELD_MICRO_BATCHES, plan_step

RANKS, GROUPS, K = 8, 128, 16
BUDGET = 8192
SPLITTING = Splitting(True, BUDGET, 0, 0)


def scored_first(batch: Batch, rows: list[int]) -> list[list[int]]:
    """Rounds of passes of a rank, tokens each, where every group is scored first: a round a pass."""
    return [[len(micro) * micro[0].length] for micro in SPLITTING.rows(batch, rows)]


def by_group(batch: Batch, rows: list[int]) -> list[list[int]]:
    """Rounds as gvpo_torch has them: the micro-batches of a group, of several groups, then what is scored first."""
    mine = batch.take(rows)
    plan = plan_step(
        mine,
        SPLITTING,
        lambda logprobs, part: np.zeros(len(part)),
        together=True,
        scored=None,
        score=lambda part: (np.zeros(len(part)), 0),
        held=HELD_MICRO_BATCHES * BUDGET,
        lockstep=True,
    )
    rounds = [
        *plan.deferred,
        *([micro] for micro in plan.grouped),
    ]
    return [[len(micro) * micro[0].length for micro in of_round] for of_round in rounds]


def lockstep(rounds_of_ranks: list[list[list[int]]]) -> float:
    """Tokens of the largest micro-batch of each pass, over the ranks' mean."""
    total = sum(tokens for rounds in rounds_of_ranks for of_round in rounds for tokens in of_round)
    longest = 0
    for of_ranks in itertools.zip_longest(*rounds_of_ranks, fillvalue=[]):
        longest += sum(max(passes) for passes in itertools.zip_longest(*of_ranks, fillvalue=0))
    return longest / total * RANKS


def counts() -> Iterator[Count]:
    for seed in range(3):
        draw = np.random.default_rng(seed)
        level = np.repeat(draw.normal(0, 0.5, GROUPS), K)  # some prompts ask for more
        lengths = np.clip(np.exp(draw.normal(np.log(900), 0.6, GROUPS * K) + level), 1, 4096).astype(int)
        prompts = np.repeat(draw.integers(64, 1025, GROUPS), K)
        ids, home = np.arange(GROUPS * K) // K, np.arange(GROUPS * K) * RANKS // (GROUPS * K)
        batch = Batch(
            [(int(g),) + (0,) * (int(n) - 1) for g, n in zip(ids, prompts, strict=True)],
            [(i, *(0,) * (int(n) - 1)) for i, n in enumerate(lengths)],
            ids.tolist(),
        )
        scored = np.ones(GROUPS * K, bool)
        owners, complete = assign(ids, home, prompts, lengths, scored, [np.arange(GROUPS)], RANKS)
        assert complete
        held = [[np.flatnonzero(of == rank).tolist() for rank in range(RANKS)] for of in (home, owners)]
        before = lockstep([scored_first(batch, rows) for rows in held[0]])
        for name, rounds, bound in (("", scored_first, 1.2), (", by group", by_group, 1.2)):
            now = lockstep([rounds(batch, rows) for rows in held[1]])
            yield Count(
                f"lockstep of 8 ranks over their mean{name}", f"J2, ragged, draw {seed}", "", before, now, bound
            )
