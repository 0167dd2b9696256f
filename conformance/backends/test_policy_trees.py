"""Responses that begin alike share those tokens in packed rows; log-probs and steps are those of plain rows."""

import importlib.util

import batches
import numpy as np
import pytest
import tiny_models
import trainer_backends
from batches import SMOOTH, coefficients_of, masked, step_difference
from trainer_backends import Backend
from trees import alike, inputs_of

from gvpo_core.training.policy import Batch, layout

PRESENT = trainer_backends.present()
if not PRESENT:
    pytest.skip("no backend of a language model is among the subjects", allow_module_level=True)

WHOLE = alike((7, 5, 1, 4))
OF = masked(WHOLE)
SPLITS = {
    "one": {"micro_batch_responses": 1},
    "tokens-30": {"micro_batch_tokens": 30},
    "plain": {"layout": "plain"},
    "score": {"strategy": "score", "micro_batch_responses": 3},
    "checkpointing": {"gradient_checkpointing": True, "micro_batch_tokens": 40},
    "lora": {"lora_rank": 3, "learning_rate": 3.0},
}
SLOW = [s if s == "tokens-30" else pytest.param(s, marks=pytest.mark.slow) for s in SPLITS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.write_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def shared(monkeypatch) -> list[int]:
    """The numbers of tokens that rows share, as they are laid out."""
    counts: list[int] = []
    plain = layout.arrays

    def watched(batch, rows):
        counts.extend(sum(row.shared) for row in rows)
        return plain(batch, rows)

    monkeypatch.setattr(layout, "arrays", watched)
    return counts


def test_the_batch_has_every_kind_of_common_beginning() -> None:
    for label in set(OF.groups):
        texts = [text for text, group in zip(OF.responses, OF.groups, strict=True) if group == label]
        if len(texts) > 3:
            assert len(set(texts)) < len(texts), "equal responses"
            assert any(len(a) < len(b) and b[: len(a)] == a for a in texts for b in texts), "one begins another"
            assert any(len(text) == 1 for text in texts)
    rows = [row for row in layout.plan_rows(OF, packed=True, tokens=10**6) if len(row.responses) > 1]
    for row in rows:
        assert inputs_of(OF, row.responses) < 0.8 * sum(len(OF.responses[i]) - 1 for i in row.responses)
    assert any(any(0 < s < len(OF.responses[i]) - 1 for i, s in zip(r.responses, r.shared, strict=True)) for r in rows)


def sums_in_float64(backend: Backend, of_policy, of: Batch) -> np.ndarray:
    """(N,) log-probabilities of own tokens, from the backend's logits of plain rows."""
    sums = np.zeros(len(of))
    for i, (prompt, response) in enumerate(zip(of.prompts, of.responses, strict=True)):
        z = np.asarray(backend.policies.logits(of_policy, prompt + response), np.float64)[len(prompt) - 1 : -1]
        z = z - z.max(1, keepdims=True)
        chosen = z[np.arange(len(response)), response] - np.log(np.exp(z).sum(1))
        own = of.masks[i] if of.masks and of.masks[i] else (True,) * len(response)
        sums[i] = chosen[list(own)].sum()
    return sums


def test_logprobs_of_policy_and_reference_are_those_of_plain_rows(backend, folder, shared) -> None:
    of_policy = backend.policies.policy(folder, reference=True)
    assert of_policy.packed
    expected = sums_in_float64(backend, of_policy, OF)
    for reference in (False, True):
        del shared[:]
        np.testing.assert_allclose(of_policy.logprobs(OF, reference=reference), expected, rtol=0, atol=2e-5)
        assert sum(shared) > 20


def test_the_gradient_is_that_of_plain_rows_in_float64(backend, folder, shared) -> None:
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        pytest.skip("the reference is transformers on PyTorch")
    from torch_policies import reference_gradients

    of_policy = backend.policies.policy(folder, **(SMOOTH | {"micro_batch_tokens": 200}))
    sums = sums_in_float64(backend, of_policy, OF)
    exact = reference_gradients(folder, OF, coefficients_of(OF)(sums, np.arange(len(OF))))
    del shared[:]
    update = of_policy.update(OF, coefficients_of(OF))
    assert sum(shared) > 20
    assert step_difference(exact, backend.policies.first_moments(of_policy)) < 1e-5
    norm = sum(float((g**2).sum()) for g in exact.values()) ** 0.5
    assert update.gradient_norm == pytest.approx(norm, rel=1e-5)
    np.testing.assert_allclose(update.logprobs, sums, rtol=0, atol=2e-5)


@pytest.mark.parametrize("split", SLOW)
def test_the_step_does_not_depend_on_the_split(split: str, backend, folder) -> None:
    whole = {"lora_rank": 3, "learning_rate": 3.0} if split == "lora" else {}
    other = {"layout": "plain"} if split == "lora" else {}
    step, update = batches.moved(backend.policies, folder, OF, **whole)
    found, again = batches.moved(backend.policies, folder, OF, **(SPLITS[split] | other))
    assert step_difference(step, found) < 1e-5
    np.testing.assert_allclose(again.logprobs, update.logprobs, rtol=0, atol=1e-4)


def test_a_model_to_which_shared_beginnings_are_not_exact_takes_plain_rows(backend, folder, monkeypatch) -> None:
    """A fault that only common beginnings show: the check at load has them."""
    plain = layout.arrays

    def spoiled(batch, rows):
        arrays = plain(batch, rows)
        if any(sum(row.shared) for row in rows):
            arrays.last[:] = np.where(arrays.segments > 0, arrays.segments, arrays.last)  # branches do not see
        return arrays

    monkeypatch.setattr(layout, "arrays", spoiled)
    of_policy = backend.policies.policy(folder)
    assert not of_policy.packed and "packed log-probs differ by up to" in of_policy.layout_reason
