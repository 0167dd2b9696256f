"""Later segments that begin with their group's prompt share it in packed rows; every backend takes the same step."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import tiny_models
import trainer_backends
from batches import SMOOTH, coefficients_of, step_difference
from trainer_backends import Backend

from gvpo_core.training.policy import Batch, Segment, base, layout
from gvpo_core.training.policy.segments import sharing_beginnings

PRESENT = trainer_backends.present()
if not PRESENT:
    pytest.skip("no backend of a language model is among the subjects", allow_module_level=True)


def nested(cut: int) -> Batch:
    """Episodes of up to three segments: later ones begin with the prompt without its last `cut` tokens, all but one."""
    draw = np.random.default_rng(3)
    ids = lambda count: tuple(draw.integers(0, 96, count).tolist())
    prompts = [ids(12), ids(9)]
    rows = []
    for group, prompt in enumerate(prompts):
        for i in range(4):
            seen, later = prompt[: len(prompt) - cut], []
            for _ in range((i + group) % 3):
                seen = (*seen, *ids(4))
                later.append(Segment(seen, (*ids(3), 0), (False, True, True, True) if i == 1 else None))
            rows.append((prompt, (*ids(2 + i), 0), group, tuple(later)))
    own_prompts, responses, groups, later = (list(column) for column in zip(*rows, strict=True))
    later[2] = (*later[2][:-1], replace(later[2][-1], prompt=ids(6)))  # of which the template changed the beginning
    return Batch(own_prompts, responses, groups, later=later)


SLOW = [pytest.param(b, marks=pytest.mark.slow) if b.name == "jax" else b for b in PRESENT]  # it compiles 20 s


@pytest.fixture(scope="module", params=SLOW, ids=lambda backend: backend.name)
def backend(request) -> Backend:
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.write_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("cut", [0, 2])
def test_the_step_is_that_of_unpacked_segments_in_float64_with_fewer_tokens(cut, backend, folder, monkeypatch) -> None:
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        pytest.skip("the reference is transformers on PyTorch")
    from torch_policies import reference_gradients

    batch, settings = nested(cut), SMOOTH | {"micro_batch_tokens": 400}
    of_policy = backend.policies.policy(folder, **settings)
    assert of_policy.packed
    rows, owners = batch.by_segment()
    apart = np.bincount(owners, of_policy.logprobs(rows))  # each segment a response of its own
    np.testing.assert_allclose(of_policy.logprobs(batch), apart, rtol=0, atol=3e-5)
    update = of_policy.update(batch, coefficients_of(batch))
    np.testing.assert_allclose(update.logprobs, apart, rtol=0, atol=3e-5)
    factors = coefficients_of(batch)(apart, np.arange(len(batch)))
    exact = reference_gradients(folder, rows, factors[owners])
    assert step_difference(exact, backend.policies.first_moments(of_policy)) < 1e-5
    if backend.name == "torch":  # the others round the lengths of rows up
        monkeypatch.setattr(base, "sharing_beginnings", lambda rows, responses: rows)
        assert (
            update.tokens
            < 0.8 * backend.policies.policy(folder, **settings).update(batch, coefficients_of(batch)).tokens
        )


def mask_of(batch: Batch, i: int) -> tuple[bool, ...]:
    """Of the policy's own tokens, from the first one of the prompt on."""
    own = batch.masks[i] if batch.masks else None
    return (False,) * len(batch.prompts[i]) + (own or (True,) * len(batch.responses[i]))


def planned(batch: Batch) -> int:
    return sum(row.length for row in layout.plan_rows(batch, packed=True, tokens=10**9))


def test_what_is_computed_is_the_same_with_no_more_tokens() -> None:
    draw, fewer = np.random.default_rng(0), 0
    for _ in range(200):
        ids = lambda low, high: tuple(draw.integers(0, 3, int(draw.integers(low, high))).tolist())
        prompts, later = [ids(2, 7), ids(2, 7)], []
        for i in range(6):
            starts = [prompts[i % 2][: int(draw.integers(0, 8))] for _ in range(int(draw.integers(0, 3)))]
            later.append(tuple(Segment((*start, *ids(1, 5)), (1, 2), (False, True)) for start in starts))
        batch = Batch([prompts[i % 2] for i in range(6)], [(1, i, 0) for i in range(6)], [0, 1] * 3, later=later)
        rows, _ = batch.by_segment()
        shared = sharing_beginnings(rows, len(batch))
        for i in range(len(rows)):
            assert shared.prompts[i] + shared.responses[i] == rows.prompts[i] + rows.responses[i]
            assert mask_of(shared, i) == mask_of(rows, i)
        assert list(shared.groups) == list(rows.groups) and planned(shared) <= planned(rows)
        fewer += planned(shared) < planned(rows)
    assert fewer > 100


def test_a_group_without_later_segments_is_left_as_it_is() -> None:
    batch = Batch([(1, 2)] * 3, [(3, 0)] * 3, [0, 0, 0])
    assert sharing_beginnings(batch, 3) is batch
