"""How gvpo_jax fills its rows: little padding, few shapes, the same on every process; no prompt sees another."""

from dataclasses import replace

import numpy as np
import pytest
import tiny_models
from batches import batch
from jax_policies import policy
from required import require

require(subject="jax")

from gvpo_jax import mesh, rows

from gvpo_core.training.policy import Batch, layout

SHARDS, TOKENS = 4, 512


def ragged(step: int, prompts: int = 16, responses: int = 8) -> Batch:
    """Prompts of 16 to 64 tokens, responses of 1 to 256, their lengths log-normal."""
    draw = np.random.default_rng(step)
    given = [tuple(draw.integers(1, 96, int(n)).tolist()) for n in draw.integers(16, 65, prompts)]
    lengths = np.minimum(256, np.exp(draw.normal(4.3, 0.7, prompts * responses))).astype(int) + 1
    drawn = [tuple(draw.integers(1, 96, int(n)).tolist()) for n in lengths]
    groups = [i // responses for i in range(prompts * responses)]
    return Batch([given[g] for g in groups], drawn, groups)


def plan(of: Batch, splitting: rows.ShardSplitting, units: list[rows.Unit], monkeypatch) -> list[rows.Rows]:
    monkeypatch.setattr(mesh, "batch_shards", lambda over: splitting.shards)
    return rows.plan(of, units, splitting, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("packed", [True, False])
def test_rows_are_full_and_have_few_shapes(packed: bool, monkeypatch) -> None:
    splitting = rows.ShardSplitting(packed, TOKENS, 0, 64, None, SHARDS)
    shapes = set()
    for step in range(15):
        of = ragged(step)
        planned = plan(of, splitting, splitting.rows(of), monkeypatch)
        real = sum(row.length for (row,) in splitting.rows(of))
        assert real <= sum(p.arrays["ids"].size for p in planned) <= 1.3 * real
        shapes |= {p.shape for p in planned}
        for p in planned:
            assert p.shape[0] * p.shape[1] <= SHARDS * TOKENS and p.shape[0] % SHARDS == 0
        found = np.sort(np.concatenate([p.source.responses for p in planned if p.source]))
        np.testing.assert_array_equal(found, np.arange(len(of)))
    assert len(shapes) <= 2


def test_a_known_shape_is_taken_where_it_costs_little_more() -> None:
    splitting = rows.ShardSplitting(True, TOKENS, 0, 0)
    many, one = (1, 128, 128), (1, 512, 512)
    assert splitting.settled(many, {many: 2}) == many and splitting.shapes == [many]
    assert splitting.settled(one, {one: 1, many: 4}) == one, "four cost more than a quarter more: another shape"
    close = (1, 256, 256)
    assert splitting.settled(close, {close: 1, one: 1, many: 2}) == many, "the first of those that cost little more"
    assert splitting.settled(close, {close: 1}) == close, "of the known shapes none holds the rows"
    assert splitting.shapes == [many, one, close]


def test_a_plan_does_not_depend_on_plans_after_it(monkeypatch) -> None:
    """A run that resumes knows the shapes of its last checkpoint, and may know some of later plans: the same plans."""
    splitting = rows.ShardSplitting(True, 8 * TOKENS, 0, 64, None, SHARDS)
    plans = []
    for prompts in (1, 16, 2, 8):
        of = ragged(7, prompts)
        known = list(splitting.shapes)
        planned = plan(of, splitting, splitting.rows(of), monkeypatch)
        plans.append((of, known, [p.shape for p in planned]))
    assert len(splitting.shapes) > 1
    for of, known, shapes in plans:
        for before in (known, splitting.shapes):
            again = replace(splitting, shapes=list(before))
            assert [p.shape for p in plan(of, again, again.rows(of), monkeypatch)] == shapes


def test_whole_groups_are_in_one_micro_batch(monkeypatch) -> None:
    of = ragged(3)
    splitting = rows.ShardSplitting(True, TOKENS, 0, 0, None, 2)
    units, rest = splitting.groups(of)
    assert units and rest
    planned = plan(of, splitting, units, monkeypatch)
    assert len(planned) > 1
    where = {int(i): number for number, p in enumerate(planned) if p.source for i in p.source.responses}
    assert sorted([*where, *rest]) == list(range(len(of)))
    for label in set(of.groups):
        assert len({where.get(i) for i in range(len(of)) if of.groups[i] == label}) == 1


def test_a_row_beyond_the_budget_is_a_batch_of_its_own(monkeypatch) -> None:
    of = Batch([(5,) * 90, (6,) * 10, (7,) * 12], [(1,) * 31, (2,) * 5, (3,) * 9], [0, 1, 2])
    splitting = rows.ShardSplitting(True, 64, 0, 0, None, 1)
    planned = plan(of, splitting, splitting.rows(of), monkeypatch)
    assert [p.shape[:2] for p in planned] == [(1, 128), (1, 64)] or [p.shape[:2] for p in planned] == [
        (1, 128),
        (2, 32),
    ]
    assert [sorted(p.source.responses.tolist()) for p in planned if p.source] == [[0], [1, 2]]


def test_every_token_is_where_its_logprob_is_read(monkeypatch) -> None:
    of = ragged(1, prompts=5, responses=3)
    splitting = rows.ShardSplitting(True, TOKENS, 0, 64, None, 2)
    seen = 0
    for p in plan(of, splitting, splitting.rows(of), monkeypatch):
        ids, segments, positions = (p.arrays[name] for name in ("ids", "segments", "positions"))
        assert p.source is not None
        row, slot = p.places
        at = p.arrays["predict"][row, slot]
        start = 0
        for i, count in zip(p.source.responses, p.source.lengths, strict=True):
            mine = p.source.own[start : start + count]
            start += count
            assert tuple(p.arrays["targets"][row[mine], slot[mine]].tolist()) == of.responses[i]
            inputs = ids[row[mine], at[mine]].tolist()
            assert inputs == [of.prompts[i][-1], *of.responses[i][:-1]]
            places = positions[row[mine], at[mine]]
            np.testing.assert_array_equal(places, len(of.prompts[i]) - 1 + np.arange(count))
            own = segments[row[mine], at[mine]]
            prompt = ids[row[mine][0]][segments[row[mine][0]] == own[0]]
            assert tuple(prompt.tolist()) == of.prompts[i] and (own[1:] > own[0]).all()
            seen += 1
    assert seen == len(of)


def test_prompts_that_share_a_row_do_not_see_each_other(tmp_path) -> None:
    of = batch((4, 3, 1, 5))
    of_policy = policy(tiny_models.write_model("qwen3", tmp_path))
    planned = rows.plan(of, of_policy._splitting.rows(of), of_policy._splitting, of_policy.mesh)
    prompts = [(np.diff(p.arrays["positions"], axis=1) < 0) & (np.diff(p.arrays["last"], axis=1) > 0) for p in planned]
    assert max(starts.sum(1).max() for starts in prompts) >= 1  # a row holds several prompts
    alone = np.concatenate([of_policy.logprobs(of.take([i])) for i in range(len(of))])
    np.testing.assert_allclose(of_policy.logprobs(of), alone, rtol=0, atol=2e-5)


def test_a_row_may_predict_more_tokens_than_it_holds(tmp_path) -> None:
    """Responses of one token are read at the prompt's last one: it has a target for each of them."""
    of_policy = policy(tiny_models.write_model("llama", tmp_path / "model"), micro_batch_tokens=64)
    prompts = [(5, 6, 7), (20, 21)]
    of = Batch([prompts[i // 40] for i in range(80)], [(i,) for i in range(10, 90)], [i // 40 for i in range(80)])
    assert of_policy.packed, "each row holds a prompt with all its responses"
    alone = [float(of_policy.logprobs(of.take([i]))[0]) for i in (0, 39, 40, 79)]
    np.testing.assert_allclose(of_policy.logprobs(of)[[0, 39, 40, 79]], alone, rtol=0, atol=1e-5)


def test_an_idle_process_takes_the_shapes_of_the_others(monkeypatch) -> None:
    """What one process lacks it fills with rows that predict nothing."""
    of = ragged(2)
    splitting = rows.ShardSplitting(True, TOKENS, 0, 64, None, SHARDS)
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(rows.ranks, "most", lambda *counts: asked.append(counts) or counts)
    busy = plan(of, splitting, splitting.rows(of), monkeypatch)
    answers = list(asked)
    monkeypatch.setattr(
        rows.ranks, "most", lambda *counts: tuple(max(pair) for pair in zip(counts, answers.pop(0), strict=True))
    )
    idle = plan(of.take([]), splitting, [], monkeypatch)
    assert [p.shape for p in idle] == [p.shape for p in busy]
    assert all(p.source is None and not p.arrays["targets"].any() for p in idle)


def test_a_batch_without_rows_makes_no_micro_batch(monkeypatch) -> None:
    splitting = rows.ShardSplitting(True, TOKENS, 0, 64, None, SHARDS)
    assert plan(Batch([], [], []), splitting, [], monkeypatch) == []
    assert isinstance(splitting, layout.Splitting)
