"""Time of ranks that wait for each other at every micro-batch, relative to their mean time.

Lengths are ragged, so the rank with the most tokens sets the time of a pass. The job is J2 with log-normal response
lengths (spread 0.8, mean about 1,300, at most 4,096 tokens) on 8 ranks, in packed rows of at most 8,192 tokens. A
micro-batch costs its tokens. Before: every rank took an equal number of responses in sampling order.
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
    """Returns a rank's rounds of passes, as tokens per pass, if every group is scored first: one pass per round."""
    return [[len(micro) * micro[0].length] for micro in SPLITTING.rows(batch, rows)]


def by_group(batch: Batch, rows: list[int]) -> list[list[int]]:
    """Returns gvpo_torch's rounds: micro-batches of one group, then of several groups, then of groups scored first."""
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
    """Returns the tokens of the longest rank, summed over all passes, / the mean tokens of a rank."""
    total = sum(tokens for rounds in rounds_of_ranks for of_round in rounds for tokens in of_round)
    longest = 0
    for of_ranks in itertools.zip_longest(*rounds_of_ranks, fillvalue=[]):
        longest += sum(max(passes) for passes in itertools.zip_longest(*of_ranks, fillvalue=0))
    return longest / total * RANKS


def counts() -> Iterator[Count]:
    for seed in range(3):
        draw = np.random.default_rng(seed)
        level = np.repeat(draw.normal(0, 0.5, GROUPS), K)  # some prompts get longer responses
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
        for name, rounds, bound in (("groups scored first", scored_first, 1.2), ("groups in rounds", by_group, 1.2)):
            now = lockstep([rounds(batch, rows) for rows in held[1]])
            ratio = "tokens of the longest rank per pass / mean of 8 ranks"
            yield Count(f"{ratio}, {name}", f"J2, ragged lengths, draw {seed}", "", before, now, bound)
