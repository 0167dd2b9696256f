"""Context tokens in responses (`Batch.masks`): a backend reads them, and scores and trains the policy's own alone."""

import importlib.util

import batches
import numpy as np
import pytest
import tiny_models
import trainer_backends
from batches import SMOOTH, batch, masked, step_difference

from gvpo_core.training.policy import Batch

PRESENT = trainer_backends.present()
if not PRESENT:
    pytest.skip("no backend of a language model is among the subjects", allow_module_level=True)

WHOLE = batch((4, 3, 1, 5))
OF = masked(WHOLE)
KINDS = {
    "full": {},
    "lora": {"lora_rank": 3, "learning_rate": 3.0},
    "dora": {"lora_rank": 3, "learning_rate": 3.0, "lora_kind": "dora"},
}
PAIRS = [(b, kind) for b in PRESENT for kind in KINDS if kind in ("full", *b.lora_kinds)]
SPLITS = {
    "one": {"micro_batch_responses": 1},
    "tokens-30": {"micro_batch_tokens": 30},
    "plain": {"layout": "plain"},
    "score": {"strategy": "score", "micro_batch_responses": 3},
    "checkpointing": {"gradient_checkpointing": True},
}


def own_of(of: Batch) -> list[tuple[bool, ...]]:
    return [mask or (True,) * len(r) for mask, r in zip(of.masks, of.responses, strict=True)]


def as_prefixes(of: Batch, factors: np.ndarray) -> tuple[Batch, np.ndarray, np.ndarray]:
    """Rows without masks, their factors and the row each belongs to, with the same sum of factors * log pi.

    log pi of own tokens a..b-1, given all before them, is log pi of the first b tokens minus that of the first a.
    """
    rows, signed, places = [], [], []
    for i, mask in enumerate(own_of(of)):
        edges = np.flatnonzero(np.diff([0, *mask, 0]))
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            for end, sign in ((stop, 1), (start, -1)):
                if end:
                    rows.append((of.prompts[i], of.responses[i][:end], of.groups[i]))
                    signed.append(sign * factors[i])
                    places.append(i)
    prompts, responses, groups = zip(*rows, strict=True)
    return Batch(prompts, responses, groups), np.asarray(signed), np.asarray(places)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.write_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", params=PAIRS, ids=[f"{b.name}-{kind}" for b, kind in PAIRS])
def take(request, folder):
    backend, kind = request.param

    def moved(of: Batch, *given, **settings):
        return batches.moved(backend.policies, folder, of, *given, **(KINDS[kind] | settings))

    return moved


@pytest.fixture(scope="module")
def step(take):
    return take(OF)


def test_the_batch_has_context_of_every_kind() -> None:
    masks = own_of(OF)
    assert OF.masks[0] is None and all(OF.masks[1]), "without a mask, and with one of all ones"
    assert any(not m[0] for m in masks) and any(not m[-1] for m in masks), "context first, and last"
    assert any("101" in "".join(str(int(mine)) for mine in m) for m in masks), "between two own tokens"
    assert sum(map(sum, masks)) < 0.8 * sum(map(len, masks))


def test_logprobs_are_the_model_s_own_summed_over_own_tokens(backend, folder) -> None:
    of_policy = backend.policies.policy(folder, reference=True)
    expected = []
    for prompt, response, mask in zip(OF.prompts, OF.responses, own_of(OF), strict=True):
        z = backend.policies.logits(of_policy, prompt + response)[len(prompt) - 1 : -1]
        z = z - z.max(1, keepdims=True)
        chosen = z[np.arange(len(response)), response] - np.log(np.exp(z).sum(1))
        expected.append(chosen[list(mask)].sum())
    for reference in (False, True):
        found = of_policy.logprobs(OF, reference=reference)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    assert np.abs(of_policy.logprobs(WHOLE) - expected).max() > 1, "the masks matter"


def test_gradients_are_those_of_own_tokens_in_float64(backend, folder) -> None:
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        pytest.skip("the reference is transformers on PyTorch; the test by prefixes needs neither")
    from torch_policies import reference_gradients

    factors = np.random.default_rng(2).normal(size=len(OF))
    exact = reference_gradients(folder, OF, factors)
    of_policy = backend.policies.policy(folder, **(SMOOTH | {"micro_batch_tokens": 60}))
    update = of_policy.update(OF, lambda logprobs, rows: factors[rows])
    found = backend.policies.first_moments(of_policy)  # with betas (0, 0): the gradient
    assert len(exact) == len(found) == 21
    assert step_difference(exact, found) < 1e-5
    norm = sum(float((g**2).sum()) for g in exact.values()) ** 0.5
    assert update.gradient_norm == pytest.approx(norm, rel=1e-5)
    assert step_difference(exact, reference_gradients(folder, WHOLE, factors)) > 0.1, "the masks matter"


@pytest.mark.slow_on("jax-lora")
def test_the_step_is_that_of_differences_of_prefixes(take) -> None:
    factors = np.random.default_rng(2).normal(size=len(OF))
    step, update = take(OF, lambda logprobs, rows: factors[rows])
    prefixes, signed, places = as_prefixes(OF, factors)
    assert prefixes.masks is None
    other, of_prefixes = take(prefixes, lambda logprobs, rows: signed[rows])
    assert max(float(np.abs(d).max()) for d in step.values()) > 1e-3
    assert step_difference(step, other) < 1e-5
    sums = np.bincount(places, signed / factors[places] * of_prefixes.logprobs, minlength=len(OF))
    np.testing.assert_allclose(update.logprobs, sums, rtol=0, atol=1e-4)


def test_a_mask_of_all_ones_equals_no_mask_bit_for_bit(take) -> None:
    ones = Batch(WHOLE.prompts, WHOLE.responses, WHOLE.groups, [(True,) * len(r) for r in WHOLE.responses])
    moved, update = take(WHOLE)
    other, of_ones = take(ones)
    for name in moved:
        np.testing.assert_array_equal(moved[name], other[name])
    np.testing.assert_array_equal(update.logprobs, of_ones.logprobs)
    assert update.gradient_norm == of_ones.gradient_norm and update.tokens == of_ones.tokens


def test_context_counts_in_the_token_budget(take, step) -> None:
    assert step[1].tokens == take(WHOLE)[1].tokens


@pytest.mark.slow_on("jax")
@pytest.mark.parametrize("split", [s if s == "one" else pytest.param(s, marks=pytest.mark.slow) for s in SPLITS])
def test_the_step_does_not_depend_on_the_split(split: str, take, step) -> None:
    found, other = take(OF, **SPLITS[split])
    assert step_difference(step[0], found) < 1e-5
    np.testing.assert_allclose(other.logprobs, step[1].logprobs, rtol=0, atol=1e-4)


@pytest.mark.skipif("mlx" not in [b.name for b in PRESENT], reason="MLX alone can run compiled or not on CPU")
@pytest.mark.slow
def test_compiled_passes_take_the_same_step(folder) -> None:
    policies = next(b for b in PRESENT if b.name == "mlx").policies
    step, update = batches.moved(policies, folder, OF, compiled=False)
    found, other = batches.moved(policies, folder, OF, compiled=True, strategy="score")
    assert step_difference(step, found) < 1e-5
    np.testing.assert_allclose(other.logprobs, update.logprobs, rtol=0, atol=1e-4)
