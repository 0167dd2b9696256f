"""Packed rows as trees of common beginnings: what every token sees, and that rows without any are as they were."""

import time
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import alike, branches, inputs_of, without_sharing

from gvpo_core.training.policy import Batch, layout
from gvpo_core.training.policy.prefixes import common
from gvpo_core.training.policy.step import plan_step
from gvpo_core.training.policy.tree import depth_first

pytestmark = pytest.mark.core

tokens = st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple)


@st.composite
def batches(draw, responses=tokens) -> Batch:
    """Up to three groups, of up to seven responses to one or two prompts, some of them masked."""
    prompts, texts, groups, masks = [], [], [], []
    for label in range(draw(st.integers(1, 3))):
        of_group = draw(st.lists(tokens, min_size=1, max_size=2))
        for text in draw(st.lists(responses, min_size=1, max_size=7)):
            prompts.append(draw(st.sampled_from(of_group)))
            texts.append(text)
            groups.append(label)
            mask = draw(st.lists(st.booleans(), min_size=len(text), max_size=len(text)))
            masks.append(tuple(mask) if any(mask) else None)
    return Batch(prompts, texts, groups, masks)


@settings(deadline=None, max_examples=300)
@given(batches(), st.integers(1, 40), st.integers(0, 5), st.sampled_from([0, 1, 64]))
def test_every_predicted_token_sees_its_prompt_and_what_its_response_began_with(of, budget, limit, hidden) -> None:
    rows = layout.plan_rows(of, packed=True, tokens=budget, responses=limit, hidden_size=hidden)
    assert sorted(i for row in rows for i in row.responses) == list(range(len(of)))
    for row in rows:
        assert row.length == len(row.prompt) + inputs_of(of, row.responses)  # every beginning once
        assert row.length <= budget or len(row.responses) == 1
        assert not limit or len(row.responses) <= limit
    arrays = layout.arrays(of, rows)
    width, start = arrays.ids.shape[1], 0
    for i, count in zip(arrays.responses.tolist(), arrays.lengths.tolist(), strict=True):
        own = [n for n, is_own in enumerate(of.masks[i] or [True] * len(of.responses[i])) if is_own]
        assert len(own) == count
        for n, at in zip(own, arrays.own[start : start + count], strict=True):
            b, q = divmod(int(arrays.predict[at]), width)
            seen = [k for k in range(q + 1) if arrays.segments[b, q] <= arrays.last[b, k]]
            assert tuple(arrays.ids[b, seen].tolist()) == of.prompts[i] + of.responses[i][:n]
            assert arrays.positions[b, seen].tolist() == list(range(len(seen)))
            assert int(arrays.targets[at]) == of.responses[i][n]
        start += count
    for b, row in enumerate(rows):
        assert (np.diff(arrays.segments[b, : row.length]) >= 0).all()
        assert (arrays.segments[b, row.length :] == -1).all() and (arrays.last[b, row.length :] == -1).all()


def unlike(of: Batch) -> Batch:
    """The batch with a first token of its own in every response."""
    texts = [(3 + i, *text[1:]) for i, text in enumerate(of.responses)]
    return Batch(of.prompts, texts, of.groups, of.masks)


@pytest.mark.slow
@settings(deadline=None, max_examples=200)
@given(batches().map(unlike), st.integers(1, 40), st.integers(0, 5), st.sampled_from([0, 1, 64]), st.booleans())
def test_responses_without_a_common_beginning_are_packed_as_before(of, budget, limit, hidden, packed) -> None:
    rows = layout.plan_rows(of, packed=packed, tokens=budget, responses=limit, hidden_size=hidden)
    for row in rows:
        lengths = [len(of.responses[i]) for i in row.responses]
        assert lengths == sorted(lengths, reverse=True) and not any(row.shared)
    found, wanted = layout.arrays(of, rows), without_sharing(of, rows)
    for field in fields(found):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(wanted, field.name), field.name)
        assert getattr(found, field.name).dtype == np.int64


@pytest.mark.slow
@settings(deadline=None, max_examples=200)
@given(batches(), st.integers(1, 40))
def test_plain_rows_share_nothing(of, budget) -> None:
    rows = layout.plan_rows(of, packed=False, tokens=budget)
    assert all(len(row.responses) == 1 and row.shared == (0,) for row in rows)
    for field in fields(found := layout.arrays(of, rows)):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(without_sharing(of, rows), field.name))


def test_arrays_by_hand() -> None:
    #  prompt 7 8, then 1-2-3-4, of which 1-2 are a response's inputs, and 1-2-5 another's; 6 stands alone
    of = Batch([(7, 8)] * 4, [(1, 2, 3, 4, 0), (1, 2, 9), (1, 2, 5, 0), (6, 0)], [0] * 4)
    (row,) = layout.plan_rows(of, packed=True, tokens=100)
    assert (row.responses, row.shared, row.length) == ((0, 2, 1, 3), (0, 2, 2, 0), 8)
    arrays = layout.arrays(of, [row])
    assert arrays.ids.tolist() == [[7, 8, 1, 2, 3, 4, 5, 6]]
    assert arrays.positions.tolist() == [[0, 1, 2, 3, 4, 5, 4, 2]]
    assert arrays.segments.tolist() == [[0, 0, 1, 1, 1, 1, 2, 3]]
    assert arrays.last.tolist() == [[3, 3, 2, 2, 1, 1, 2, 3]]
    assert arrays.predict.tolist() == [1, 2, 3, 4, 5, 3, 6, 3, 1, 7]  # no token twice after the same ones
    assert arrays.targets.tolist() == [1, 2, 3, 4, 0, 5, 0, 9, 6, 0]
    assert arrays.own.tolist() == [0, 1, 2, 3, 4, 0, 1, 5, 6, 0, 1, 7, 8, 9]
    assert arrays.lengths.tolist() == [5, 4, 3, 2]


@settings(deadline=None, max_examples=200)
@given(batches())
def test_a_token_that_responses_share_is_predicted_once_with_the_factors_of_all(of) -> None:
    rows = layout.plan_rows(of, packed=True, tokens=10**6)
    arrays = layout.arrays(of, rows)
    values = np.random.default_rng(0).normal(size=len(arrays.targets))
    factors = np.random.default_rng(1).normal(size=len(arrays.responses))
    assert len(set(zip(arrays.predict.tolist(), arrays.targets.tolist(), strict=True))) == len(arrays.targets)
    assert len(arrays.targets) <= sum(inputs_of(of, row.responses) + len(row.responses) for row in rows)
    sums, spread, start = np.zeros(len(factors)), np.zeros(len(values)), 0
    for number, count in enumerate(arrays.lengths):
        for at in arrays.own[start : start + count]:
            sums[number] += values[at]
            spread[at] += factors[number]
        start += count
    np.testing.assert_allclose(arrays.sums(values), sums, rtol=0, atol=1e-12)
    np.testing.assert_allclose(arrays.spread(factors), spread, rtol=0, atol=1e-12)
    parts = arrays.split(values)
    for number, i in enumerate(arrays.responses):
        assert len(parts[i]) == arrays.lengths[number]
        assert parts[i].sum() == pytest.approx(sums[number], abs=1e-12)


def test_a_chain_is_one_branch() -> None:
    """Responses of which each is the beginning of the next, equal ones and one of a single token: no token twice."""
    of = Batch([(7,)] * 5, [(1, 2), (1, 2, 3), (1, 2, 3), (1, 2, 3, 4), (1,)], [0] * 5)
    (row,) = layout.plan_rows(of, packed=True, tokens=100)
    arrays = layout.arrays(of, [row])
    assert arrays.ids.tolist() == [[7, 1, 2, 3]] and arrays.segments.tolist() == [[0, 1, 1, 1]]
    written = layout.Row((7,), (0, 1, 3), 4, (0, 1, 2))  # the shortest first: each continues what is there
    assert layout.arrays(of, [written]).segments.tolist() == [[0, 1, 1, 1]]
    assert layout.arrays(of, [written]).last.tolist() == [[1, 1, 1, 1]]


def test_the_reference_of_branches_is_that_of_arrays() -> None:
    of = alike((9,), longest=6)
    (row,) = layout.plan_rows(of, packed=True, tokens=10**6)
    sizes = [(shared, len(of.responses[i]) - 1 - shared) for i, shared in zip(row.responses, row.shared, strict=True)]
    sizes = [size for size in sizes if size[1]]
    segments, last = branches(len(row.prompt), sizes)
    arrays = layout.arrays(of, [row])
    np.testing.assert_array_equal(arrays.segments[0], segments)
    np.testing.assert_array_equal(arrays.last[0], last)
    assert len(set(map(tuple, sizes))) > 3 and max(shared for shared, _ in sizes) > 0


def test_a_row_of_what_costs_less_holds_whole_branches() -> None:
    """Rows are cut where little is shared: four times four responses of 600 tokens, 550 of them common."""
    draw = np.random.default_rng(0)
    ids = lambda count: tuple(draw.integers(0, 90, count).tolist())
    begun = [ids(550) for _ in range(4)]
    of = Batch([ids(20)] * 16, [begun[i % 4] + ids(50) for i in range(16)], [0] * 16)
    rows = layout.plan_rows(of, packed=True, tokens=10**6, hidden_size=64)
    assert len(rows) > 1
    assert sum(row.length - len(row.prompt) for row in rows) == inputs_of(of, tuple(range(16)))


@pytest.mark.parametrize("common_tokens", [0, 1024, 2047])
def test_the_tree_of_long_responses_is_made_at_once(common_tokens: int) -> None:
    """512 responses of 2,048 tokens: seconds would show in every step."""
    draw = np.random.default_rng(0)
    begun = tuple(draw.integers(0, 150_000, common_tokens).tolist())
    rest = draw.integers(0, 150_000, (512, 2048 - common_tokens)).tolist()
    responses = [begun + tuple(one) for one in rest]
    started = time.perf_counter()
    order = depth_first(responses)
    assert time.perf_counter() - started < 2.0  # 0.1 s where nothing else runs
    assert sum(shared for _, shared in order) >= 511 * common_tokens


@settings(deadline=None, max_examples=200)
@given(tokens, tokens, tokens)
def test_tokens_in_common(a, b, begun) -> None:
    for one, other in ((a, b), (begun + a, begun + b), (begun, begun + b), (begun, begun), (begun, ())):
        n = common(one, other)
        assert one[:n] == other[:n] and (n == min(len(one), len(other)) or one[n] != other[n])


def test_each_group_is_planned_once_where_several_are_held_together(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(layout, "depth_first", lambda responses: calls.append(len(responses)) or depth_first(responses))
    of = alike((4,) * 20, longest=30)
    plan = plan_step(
        of,
        layout.Splitting(True, 25, 0, 0),
        lambda logprobs, rows: np.zeros(len(rows)),
        together=True,
        scored=None,
        score=lambda batch: (np.zeros(len(batch)), 0),
        held=160,
    )
    rounds = [
        {of.groups[i] for micro in of_round for row in micro for i in row.responses} for of_round in plan.deferred
    ]
    several = sum(map(len, rounds))
    assert several >= 10 and max(map(len, rounds)) > 1
    assert len(calls) <= 20 + several  # whether each fits a micro-batch, then its rows
