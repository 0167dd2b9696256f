"""Whole groups go to ranks longest first; a step is the same whoever holds which rows."""

import numpy as np
import pytest
from ranks import run_ranks
from trees import alike

from gvpo_core.training import dealing
from gvpo_core.training.config import OptimizerConfig
from gvpo_core.training.policy import Batch, Segment, layout
from gvpo_core.training.policy.segments import sharing_beginnings

RANKS = 4


class Rows:
    """What `deal` reads of a rollout."""

    def __init__(self, batch: Batch, start: int, group_ids: np.ndarray) -> None:
        self.batch, self.start, self.group_ids = batch, start, group_ids


def everyone(groups: int = 9, size: int = 5) -> Batch:
    """All ranks' rows: ragged responses, each with tokens of its own, one of them masked."""
    draw = np.random.default_rng(0)
    prompts = [tuple(range(100 * g, 100 * g + 3 + g % 4)) for g in range(groups) for _ in range(size)]
    responses = [tuple(range(n, n + int(draw.integers(1, 30)))) for n in range(1000, 1000 + groups * size)]
    own = [None] * len(responses)
    own[7] = tuple(i % 2 == 0 for i in range(len(responses[7])))
    return Batch(prompts, responses, [p[0] // 100 for p in prompts], own)


@pytest.mark.parametrize("masked", [True, False])
def test_every_scored_row_goes_to_one_rank_with_its_group(masked) -> None:
    whole = everyone()
    if not masked:
        whole = Batch(whole.prompts, whole.responses, whole.groups)
    n = len(whole)
    scored = np.ones(n, bool)
    scored[[3, 20]] = False
    steps = np.array_split(np.arange(9), 2)
    found = {}

    def work(policy) -> None:
        policy.by_group = True
        start, stop = (n * r // RANKS for r in (policy.rank, policy.rank + 1))
        rows = Rows(whole.take(list(range(start, stop))), start, np.asarray(whole.groups))
        of = dealing.deal(policy, rows, scored, steps)
        again = of.gathered(policy, of.rows * 1.5, scored)
        found[policy.rank] = of, again

    run_ranks(RANKS, work, {"p": {"a": 1.0}}, OptimizerConfig())
    deals = [found[rank][0] for rank in range(RANKS)]
    assert all(of.complete for of in deals)
    held = [set(of.batch.groups) for of in deals]
    assert sorted(g for groups in held for g in groups) == list(range(9)), "a group lies on two ranks"
    assert sorted(np.concatenate([of.rows for of in deals])) == np.flatnonzero(scored).tolist()
    for of, again in found.values():
        np.testing.assert_array_equal(of.order, np.concatenate([of.rows for of in deals]))
        np.testing.assert_array_equal(again[scored], np.flatnonzero(scored) * 1.5)
        assert np.isnan(again[~scored]).all()
        for i, row in enumerate(of.rows):
            assert (of.batch.prompts[i], of.batch.responses[i]) == (whole.prompts[row], whole.responses[row])
            assert of.batch.groups[i] == whole.groups[row]
            if masked:
                assert of.batch.masks[i] == whole.masks[row]
        assert masked or of.batch.masks is None


def assigned(lengths: np.ndarray, size: int, ranks: int, *, prompt: int = 10, steps: int = 1, **options):
    """As `assign` gives them for groups of `size` responses, drawn in equal runs; and the tokens of each rank."""
    n = len(lengths)
    ids, home = np.arange(n) // size, np.arange(n) * ranks // n
    prompts, scored = np.full(n, prompt), np.ones(n, bool)
    split = np.array_split(np.arange(n // size), steps)
    owners, complete = dealing.assign(ids, home, prompts, lengths, scored, split, ranks, **options)
    return owners, complete, home


def with_segments(of: Batch) -> Batch:
    """Two later segments for every other response, which begin with its prompt and a part of it."""
    later = [
        tuple(Segment((*prompt, *response[:n], 7, i), (5, 5, i)) for n in (0, 1)) if i % 2 else ()
        for i, (prompt, response) in enumerate(zip(of.prompts, of.responses, strict=True))
    ]
    return Batch(of.prompts, of.responses, of.groups, later=later)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("of", [alike((7, 1, 4)), with_segments(alike((7, 1, 4)))], ids=["answers", "segments"])
def test_a_group_counts_the_tokens_that_its_rows_compute(of: Batch, packed: bool) -> None:
    added = dealing.added_tokens(of, packed)
    for label in range(3):
        group = of.take([i for i, g in enumerate(of.groups) if g == label])
        rows = group.by_segment()[0]
        rows = sharing_beginnings(rows, len(group)) if packed else rows
        planned = layout.plan_rows(rows, packed=packed, tokens=10**6)
        computed = sum(row.length for row in planned) + len(rows)  # and of each row one that is no input
        assert len(group.prompts[0]) + added[np.asarray(of.groups) == label].sum() == computed


@pytest.mark.parametrize(("packed", "held"), [(True, [{3}, {0, 1, 2}]), (False, [{0, 2}, {1, 3}])])
def test_groups_that_share_more_count_less(packed: bool, held: list[set[int]]) -> None:
    """Packed, three groups of 4 equal responses of 30 tokens cost as much as one of 4 different ones of 25."""
    responses = [tuple(range(g, g + 30)) for g in range(3) for _ in range(4)] + [(9 + i,) * 25 for i in range(4)]
    whole = Batch([(7, 8)] * 16, responses, [i // 4 for i in range(16)])
    found = {}

    def work(policy) -> None:
        policy.packed = packed
        start = 8 * policy.rank
        rows = Rows(whole.take(list(range(start, start + 8))), start, np.asarray(whole.groups))
        found[policy.rank] = dealing.deal(policy, rows, np.ones(16, bool), [np.arange(4)])

    run_ranks(2, work, {"p": {"a": 1.0}}, OptimizerConfig())
    assert [set(found[rank].batch.groups) for rank in range(2)] == held


def test_the_longest_group_goes_first() -> None:
    owner, loads = dealing.longest_first(np.asarray([3.0, 9.0, 5.0, 4.0, 4.0]), 2)
    assert owner.tolist() == [1, 0, 1, 1, 0]  # 9 | 5, 9 | 9, a tie to the first 13 | 9, 13 | 12
    assert loads.tolist() == [13.0, 12.0]


def test_each_step_is_balanced() -> None:
    lengths = np.random.default_rng(1).integers(1, 400, 16 * 8)
    owners, complete, _ = assigned(lengths, 8, 4, steps=4)
    assert complete
    for step in range(4):  # four groups: one for each rank
        assert sorted(owners[step * 32 : (step + 1) * 32 : 8].tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize(("ranks", "split_cost"), [(8, 4 / 3), (2, 1.0)])
def test_one_group_stays_on_all_ranks(ranks, split_cost) -> None:
    owners, complete, home = assigned(np.full(64, 100), 64, ranks, split_cost=split_cost)
    assert not complete
    np.testing.assert_array_equal(owners, home)


def test_a_group_that_costs_less_whole_is_dealt_whole() -> None:
    """Three equal groups on two ranks: 2 units of work on the fullest rank, 1.5 where one group is split."""
    lengths = np.full(3 * 8, 100)
    assert assigned(lengths, 8, 2, prompt=1)[1] is True
    assert assigned(lengths, 8, 2, prompt=1, split_cost=1.0)[1] is False


def test_a_rollout_with_whole_groups_on_each_rank_is_complete() -> None:
    lengths = np.full(4 * 8, 100)
    owners, complete, home = assigned(lengths, 8, 4)
    assert complete and (np.bincount(owners) == np.bincount(home)).all()
