"""Episodes of several segments (`Batch.later`): every backend has one sum and one coefficient for all of an episode."""

import importlib.util

import batches
import numpy as np
import pytest
import tiny_models
import trainer_backends
from batches import SMOOTH, coefficients_of, step_difference

from gvpo_core.training.policy import Batch, Segment, layout

PRESENT = trainer_backends.present()
if not PRESENT:
    pytest.skip("no backend of a language model is among the subjects", allow_module_level=True)

WHOLE = batches.masked(batches.batch((4, 3)))
COUNTS = (0, 2, 0, 1, 0, 0, 2)  # later segments of each response
SPLITS = {
    "one": {"micro_batch_responses": 1},
    "tokens-30": {"micro_batch_tokens": 30},
    "plain": {"layout": "plain"},
    "score": {"strategy": "score", "micro_batch_responses": 3},
    "checkpointing": {"gradient_checkpointing": True, "micro_batch_tokens": 30},
}


def with_segments() -> Batch:
    """Episodes of two and three segments beside those of one, in two groups; some later segments are masked."""
    draw = np.random.default_rng(8)
    ids = lambda low, high: tuple(draw.integers(0, 96, int(draw.integers(low, high))).tolist())
    later = [
        tuple(Segment(ids(4, 14), response, mask) for response, mask in ((ids(2, 9), None),) * (count - 1))
        + ((Segment(ids(4, 14), (5, 6, 7, 0), (True, False, True, True)),) if count else ())
        for count in COUNTS
    ]
    return Batch(WHOLE.prompts, WHOLE.responses, WHOLE.groups, WHOLE.masks, later=later)


OF = with_segments()


def rows_of(of: Batch) -> list[tuple[int, tuple[int, ...], tuple[int, ...], tuple[bool, ...]]]:
    """The episode, prompt, response and mask of every segment, in the order of the episodes."""
    rows = []
    for i in range(len(of)):
        rows.append((i, of.prompts[i], of.responses[i], of.masks[i] or (True,) * len(of.responses[i])))
        rows += [(i, s.prompt, s.response, s.mask or (True,) * len(s.response)) for s in of.later[i]]
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.write_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def step(backend, folder):
    return batches.moved(backend.policies, folder, OF)


def sums_in_float64(backend, of_policy) -> np.ndarray:
    """(N,) log-probabilities of own tokens over all segments, from the backend's logits."""
    sums = np.zeros(len(OF))
    for i, prompt, response, mask in rows_of(OF):
        z = np.asarray(backend.policies.logits(of_policy, prompt + response), np.float64)[len(prompt) - 1 : -1]
        z = z - z.max(1, keepdims=True)
        chosen = z[np.arange(len(response)), response] - np.log(np.exp(z).sum(1))
        sums[i] += chosen[list(mask)].sum()
    return sums


def test_the_batch_has_episodes_of_one_two_and_three_segments_in_a_group() -> None:
    counts = {
        label: sorted(1 + len(s) for s, g in zip(OF.later, OF.groups, strict=True) if g == label) for label in (7, 8)
    }
    assert all(len(set(of_group)) > 1 for of_group in counts.values()), counts
    assert {1, 2, 3} == {n for of_group in counts.values() for n in of_group}
    assert len(rows_of(OF)) == 12 and any(s.mask for segments in OF.later for s in segments)


def test_a_log_prob_is_the_sum_over_own_tokens_of_all_segments(backend, folder) -> None:
    of_policy = backend.policies.policy(folder, reference=True)
    expected = sums_in_float64(backend, of_policy)
    for reference in (False, True):
        found = of_policy.logprobs(OF, reference=reference)
        np.testing.assert_allclose(found, expected, rtol=0, atol=3e-5)
    assert np.abs(of_policy.logprobs(WHOLE) - expected).max() > 1, "the later segments matter"


@pytest.mark.parametrize("strategy", ["group", pytest.param("score", marks=pytest.mark.slow)])
def test_the_gradient_is_that_of_the_sums_in_float64(strategy: str, backend, folder) -> None:
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        pytest.skip("the reference is transformers on PyTorch")
    from torch_policies import reference_gradients

    of_policy = backend.policies.policy(folder, **(SMOOTH | {"micro_batch_tokens": 120, "strategy": strategy}))
    right = sums_in_float64(backend, of_policy)
    factors = coefficients_of(OF)(right, np.arange(len(OF)))
    owners, prompts, responses, masks = zip(*rows_of(OF), strict=True)
    exact = reference_gradients(folder, Batch(prompts, responses, owners, masks), factors[list(owners)])
    asked = []

    def coefficients(logprobs, rows):
        asked.extend(rows.tolist())
        np.testing.assert_allclose(logprobs, right[rows], rtol=0, atol=3e-5)
        return coefficients_of(OF)(logprobs, rows)

    update = of_policy.update(OF, coefficients)
    assert sorted(asked) == list(range(len(OF))), "one coefficient for an episode"
    found = backend.policies.first_moments(of_policy)  # with betas (0, 0): the gradient
    assert step_difference(exact, found) < 1e-5
    np.testing.assert_allclose(update.logprobs, right, rtol=0, atol=3e-5)
    firsts = reference_gradients(folder, WHOLE, factors)
    assert step_difference(exact, firsts) > 0.1, "the later segments matter"


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_the_step_does_not_depend_on_the_split(split: str, backend, folder, step) -> None:
    found, other = batches.moved(backend.policies, folder, OF, **SPLITS[split])
    assert step_difference(step[0], found) < 1e-5
    np.testing.assert_allclose(other.logprobs, step[1].logprobs, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_known_sums_give_the_same_step(backend, folder, step) -> None:
    found, _ = batches.moved(backend.policies, folder, OF, scored=np.asarray(step[1].logprobs, np.float64))
    assert step_difference(step[0], found) < 1e-5


@pytest.mark.slow
def test_episodes_of_one_segment_are_the_batch_without_segments_bit_for_bit(backend, folder) -> None:
    empty = Batch(WHOLE.prompts, WHOLE.responses, WHOLE.groups, WHOLE.masks, later=[()] * len(WHOLE))
    moved, update = batches.moved(backend.policies, folder, WHOLE)
    other, of_empty = batches.moved(backend.policies, folder, empty)
    for name in moved:
        np.testing.assert_array_equal(moved[name], other[name])
    np.testing.assert_array_equal(update.logprobs, of_empty.logprobs)
    assert update.gradient_norm == of_empty.gradient_norm and update.tokens == of_empty.tokens


def test_episodes_of_one_segment_are_the_batch_itself() -> None:
    empty = Batch(WHOLE.prompts, WHOLE.responses, WHOLE.groups, WHOLE.masks, later=[()] * len(WHOLE))
    for of in (WHOLE, empty):
        rows, owners = of.by_segment()
        assert rows is of and owners.tolist() == list(range(len(of)))


def test_segments_of_a_group_with_equal_prompts_share_a_row() -> None:
    later = [(Segment((1, 2, 3), (6, i, 0)),) for i in range(3)] + [(Segment((1, 2, 3), (6, 0)),)]
    batch, owners = Batch([(3, 4)] * 4, [(5, 0)] * 4, [0, 0, 0, 1], later=later).by_segment()
    rows = layout.plan_rows(batch, packed=True, tokens=100)
    held = sorted((row.prompt, sorted(owners[list(row.responses)].tolist())) for row in rows)
    assert held == [((1, 2, 3), [0, 1, 2]), ((1, 2, 3), [3]), ((3, 4), [0, 1, 2]), ((3, 4), [3])]
