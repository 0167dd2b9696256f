"""What only gvpo_torch's step has: dropout and padding rows to switch off, exact norms on CPU, reported memory."""

import numpy as np
import pytest
import tiny_models
import torch_policies
from batches import SMOOTH, batch, coefficients_of, moved
from required import require
from torch_policies import policy, reference_gradients

require(subject="torch")

import torch
from gvpo_torch import generate, model, precision, update

from gvpo_core.training.config import ConfigError, ModelConfig
from gvpo_core.training.policy import Batch
from gvpo_core.training.sampling import Sampling

OF = batch((4, 3, 1, 5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.make_model("llama-tied-bias", tmp_path_factory.mktemp("llama"))


def test_dropout_is_off(tmp_path) -> None:
    made = tiny_models.make_model("gpt2", tmp_path, attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    of_policy = policy(made, gradient_checkpointing=True, **SMOOTH)
    before = of_policy.logprobs(OF)
    stepped = of_policy.update(OF, coefficients_of(OF))
    np.testing.assert_allclose(stepped.logprobs, before, rtol=0, atol=1e-4)


@pytest.mark.parametrize("wanted", [False, True])
def test_deterministic_kernels_are_asked_for_in_scores_and_updates_alone(wanted, folder, monkeypatch) -> None:
    of_policy, asked, plain = policy(folder, deterministic=wanted, strategy="score", **SMOOTH), [], model.score
    backward = update.Backward.backward
    spied = lambda own: lambda *given: asked.append(torch.are_deterministic_algorithms_enabled()) or own(*given)
    monkeypatch.setattr(model, "score", spied(plain))
    monkeypatch.setattr(update.Backward, "backward", spied(backward))
    of_policy.update(OF, coefficients_of(OF))
    assert set(asked) == {wanted} and len(asked) > 2 and not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize(
    ("settings", "inside"),
    [
        ({"dtype": "bfloat16"}, "high"),
        ({"dtype": "bfloat16", "lora_rank": 2}, "high"),
        ({"dtype": "bfloat16", "tf32": False}, "highest"),
        ({"dtype": "float32"}, "highest"),
    ],
    ids=str,
)
def test_products_that_stay_float32_take_tf32_in_passes_alone(settings, inside, folder, monkeypatch) -> None:
    """In samples, scores and updates, as on CUDA; what the process had is put back, after an error too."""
    monkeypatch.setattr(precision, "_HAVE_TENSOR_FLOAT", ("cpu",))
    of_policy, seen = policy(folder, strategy="score", **SMOOTH, **settings), []
    spied = lambda own: lambda *given, **o: seen.append(torch.get_float32_matmul_precision()) or own(*given, **o)
    monkeypatch.setattr(model, "score", spied(model.score))
    monkeypatch.setattr(generate, "_prefill", spied(generate._prefill))
    monkeypatch.setattr(update.Backward, "backward", spied(update.Backward.backward))
    for passes in (
        lambda: of_policy.generate([(5, 6)], [[1]], Sampling(2)),
        lambda: of_policy.logprobs(OF),
        lambda: of_policy.update(OF, coefficients_of(OF)),
    ):
        seen.clear()
        passes()
        assert seen and set(seen) == {inside} and torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(ZeroDivisionError):
        of_policy.update(OF, lambda logprobs, rows: 1 / 0)
    assert torch.get_float32_matmul_precision() == "highest"


def test_newer_settings_of_the_process_stand(folder, monkeypatch) -> None:
    monkeypatch.setattr(precision, "_HAVE_TENSOR_FLOAT", ("cpu",))

    def refuses() -> str:
        raise RuntimeError("you have used mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuses)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", None)
    with precision.tensor_float(ModelConfig(dtype="bfloat16"), torch.device("cpu")):
        pass


def test_an_operation_without_a_deterministic_kernel_is_named(folder, monkeypatch) -> None:
    of_policy = policy(folder, deterministic=True, **SMOOTH)
    monkeypatch.setattr(update.Backward, "deferred", lambda *given: torch.zeros(2).put_(torch.tensor(0), torch.ones(1)))
    with pytest.raises(ConfigError, match=r"model\.deterministic = true: put_ does not have a deterministic"):
        of_policy.update(OF, coefficients_of(OF))
    assert not torch.are_deterministic_algorithms_enabled()


def test_peak_memory_is_in_bytes(folder) -> None:
    assert moved(torch_policies, folder, OF)[1].peak_memory > 50e6  # of the whole process


def test_norm_of_a_large_gradient_is_right() -> None:
    parameter = torch.nn.Parameter(torch.empty(49_152, 576))
    row = torch.randn(1000, 576, generator=torch.Generator().manual_seed(0))
    parameter.grad = row.repeat(50, 1)[:49_152].contiguous()
    exact = float(np.sqrt(sum(float((part.double() ** 2).sum()) for part in parameter.grad.split(1000))))
    assert abs(float(torch.linalg.vector_norm(parameter.grad)) / exact - 1) > 1e-3, "torch's own is right here"
    norm = update.clip([("large", parameter)], 0.5)
    assert norm == pytest.approx(exact, rel=1e-6)
    left = np.sqrt(sum(float((part.double() ** 2).sum()) for part in parameter.grad.split(1000)))
    assert left == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (1024,), (1030, 3)])
def test_norm_of_any_shape_is_right(shape, dtype) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    (found,) = update.sums_of_squares([values])
    assert found == pytest.approx(float((values.double() ** 2).sum()), rel=1e-6)


def test_gradient_within_the_limit_stays_as_it_is() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([0.3, 0.0, 0.4])
    assert update.clip([("small", parameter)], 0.6) == pytest.approx(0.5)
    assert parameter.grad.tolist() == torch.tensor([0.3, 0.0, 0.4]).tolist()


@pytest.mark.parametrize("pad", [0, 5])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "opt"])
def test_padding_ids_embedding_is_trained_as_any_other(name: str, pad: int, tmp_path) -> None:
    made = tiny_models.make_model(name, tmp_path, pad_token_id=pad, tie_word_embeddings=False)
    of = batch((3, 2))
    of = Batch([(*prompt, pad, 7) for prompt in of.prompts], of.responses, of.groups)  # the id as an ordinary input
    factors = np.random.default_rng(3).normal(size=len(of))
    of_policy = policy(made, reference=True)
    for scorer in (of_policy.scorer, of_policy._reference.model):
        assert not [m for m in scorer.modules() if getattr(m, "padding_idx", None) is not None and hasattr(m, "weight")]
    norm = of_policy.update(of, lambda logprobs, rows: factors[rows]).gradient_norm
    exact = reference_gradients(made, of, factors)
    embedding = next(value for key, value in exact.items() if "embed_tokens" in key)
    assert np.linalg.norm(embedding[pad]) > 0.01 * np.linalg.norm(embedding)
    assert norm == pytest.approx(np.sqrt(sum(float((g**2).sum()) for g in exact.values())), rel=1e-4)
