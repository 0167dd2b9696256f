"""Every backend's renewed reference: the policy as it was then, kept by checkpoints, gone after a reset."""

import numpy as np
import pytest
import tiny_models
import trainer_backends
from batches import batch, train

PRESENT = trainer_backends.present()
if not PRESENT:
    pytest.skip("no backend of a language model is among the subjects", allow_module_level=True)

OF = batch((3, 2), seed=9)
KINDS = {"full": {}, "lora": {"lora_rank": 2}, "bfloat16": {"dtype": "bfloat16"}}
SLOW = pytest.param("bfloat16", marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.write_model("llama-tied", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def load(backend, folder):
    return lambda **settings: backend.policies.policy(folder, **({"reference": True, "learning_rate": 1e-2} | settings))


@pytest.mark.slow_on("jax")
@pytest.mark.parametrize("kind", ["full", "lora", SLOW])
def test_a_renewed_reference_is_the_policy_of_that_moment(kind: str, load, backend) -> None:
    of_policy = load(**KINDS[kind])
    initial = of_policy.logprobs(OF, reference=True)
    train(of_policy, range(2))
    moved = of_policy.logprobs(OF)
    assert np.abs(moved - initial).max() > 0.1, "the steps changed nothing"
    before = {name: value.copy() for name, value in backend.policies.parameters(of_policy).items()}
    of_policy.renew_reference()
    renewed = of_policy.logprobs(OF, reference=True)
    # A reference in bfloat16 holds its embedding in 16 bits in JAX and MLX; the trained one is cast when it is used.
    np.testing.assert_allclose(renewed, moved, rtol=0, atol=0.05 if kind == "bfloat16" else 1e-6)
    for name, value in backend.policies.parameters(of_policy).items():
        np.testing.assert_array_equal(value, before[name])  # scoring the reference changes nothing
    train(of_policy, range(2, 4))
    np.testing.assert_array_equal(of_policy.logprobs(OF, reference=True), renewed)
    assert np.abs(of_policy.logprobs(OF) - moved).max() > 0.1
    of_policy.renew_reference()  # and again
    np.testing.assert_allclose(
        of_policy.logprobs(OF, reference=True),
        of_policy.logprobs(OF),
        rtol=0,
        atol=0.05 if kind == "bfloat16" else 1e-6,
    )


@pytest.mark.slow_on("jax")
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_checkpoint_keeps_a_renewed_reference(kind: str, load, tmp_path) -> None:
    first = load(**KINDS[kind])
    initial = first.logprobs(OF, reference=True)
    (tmp_path / "early").mkdir()
    first.save(tmp_path / "early")
    train(first, range(1))
    first.renew_reference()
    train(first, range(1, 2))
    renewed, policy = first.logprobs(OF, reference=True), first.logprobs(OF)
    (tmp_path / "late").mkdir()
    first.save(tmp_path / "late")

    second = load(seed=5, **KINDS[kind])
    second.restore(tmp_path / "late")
    np.testing.assert_array_equal(second.logprobs(OF, reference=True), renewed)
    np.testing.assert_array_equal(second.logprobs(OF), policy)
    assert train(second, range(2, 4)) == train(first, range(2, 4))
    np.testing.assert_array_equal(second.logprobs(OF, reference=True), renewed)

    second.restore(tmp_path / "early")
    np.testing.assert_array_equal(second.logprobs(OF, reference=True), initial)
    first.reset()
    np.testing.assert_array_equal(first.logprobs(OF, reference=True), initial)


def test_a_policy_without_a_reference_cannot_renew_it(load) -> None:
    with pytest.raises(RuntimeError, match="was not loaded"):
        load(reference=False).renew_reference()
