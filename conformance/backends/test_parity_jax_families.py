"""Every family of gvpo_jax beside transformers: log-probs, sampling, a whole step, adapters, exports that reload."""

import decoder_families
import numpy as np
import pytest
from batches import SMOOTH, batch, coefficients_of
from decoder_families import FAMILIES
from jax_policies import policy
from required import require

require("jax", "optax", "orbax.checkpoint", "torch", "transformers", subject="parity")

import torch
from transformers import AutoModelForCausalLM

from gvpo_core.training.config import ConfigError
from gvpo_core.training.policy import Batch
from gvpo_core.training.sampling import Sampling, row_seed

OF = batch((4, 3))
PROMPTS = [(5, 6, 7), tuple(range(20, 32))]
SEEDS = [[row_seed(1, i, j) for j in range(2)] for i in range(2)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name of a family -> its tiny model's folder, made once."""
    made = {}

    def folder(name: str):
        if name not in made:
            made[name] = decoder_families.make(name, tmp_path_factory.mktemp(name) / "model")
        return made[name]

    return folder


def load(folder, dtype=torch.float32):
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **eager)


def logprobs(model, of: Batch) -> torch.Tensor:
    """(N,) by transformers' own forward pass in float32, each row alone, the normaliser in float64."""
    found = []
    for prompt, response in zip(of.prompts, of.responses, strict=True):
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()
        found.append(logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum())
    return torch.stack(found)


def stepped(model) -> dict[str, np.ndarray]:
    """The parameters after one step of SMOOTH, whose AdamW moves each by -lr * g / (|g| + 1)."""
    scored = logprobs(model, OF)
    factors = coefficients_of(OF)(scored.detach().numpy(), np.arange(len(OF)))
    (-(torch.from_numpy(factors) * scored).sum()).backward()
    moved = {}
    for name, p in model.named_parameters():
        g = torch.zeros_like(p) if p.grad is None else p.grad
        moved[name] = (p - SMOOTH["learning_rate"] * g / (g.abs() + 1)).detach().numpy()
    return moved


QUICK = ("gemma3", "glm4", "olmo3")  # these have most structural options among them
quick = pytest.mark.slow_on(*(name for name in FAMILIES if name not in QUICK))


@pytest.mark.slow_on("glm4")
@quick
@pytest.mark.parametrize("name", FAMILIES)
def test_logprobs_are_transformers_own(name: str, folders) -> None:
    of_jax, model = policy(folders(name)), load(folders(name))
    assert of_jax.describe().architecture == type(model).__name__
    with torch.no_grad():
        np.testing.assert_allclose(of_jax.logprobs(OF), logprobs(model, OF).numpy(), rtol=0, atol=1e-4)


@pytest.mark.slow_on("glm4", "olmo3")
@quick
@pytest.mark.parametrize("name", FAMILIES)
def test_sampling_a_step_and_an_export_are_transformers_own(name: str, folders, tmp_path) -> None:
    model = load(folders(name)).train(False)
    of_jax = policy(folders(name), **SMOOTH)
    responses, sums = of_jax.sample(PROMPTS, SEEDS, Sampling(9))
    drawn = [(p, r.tokens, i) for i, (p, row) in enumerate(zip(PROMPTS, responses, strict=True)) for r in row]
    with torch.no_grad():
        own = logprobs(model, Batch(*(list(column) for column in zip(*drawn, strict=True)))).numpy()
    np.testing.assert_allclose(np.concatenate(sums), own, rtol=0, atol=1e-4)
    of_jax.update(OF, coefficients_of(OF))
    of_jax.export(tmp_path / "out")
    # In float64: the rounding of two float32 steps of 0.5 differs by up to 2e-5.
    wanted, reloaded = stepped(load(folders(name), torch.float64).train(False)), load(tmp_path / "out")
    for parameter, value in reloaded.named_parameters():
        np.testing.assert_allclose(value.detach().numpy(), wanted[parameter], rtol=0, atol=2e-5, err_msg=parameter)
    for constant, value in reloaded.named_buffers():
        assert torch.equal(value, dict(model.named_buffers())[constant]), constant
    with torch.no_grad():
        np.testing.assert_allclose(logprobs(reloaded, OF).numpy(), of_jax.logprobs(OF), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["phi3", "gemma4-shared", "qwen3_moe"])
def test_adapters_merge_into_the_export(name: str, folders, tmp_path) -> None:
    of_jax = policy(folders(name), lora_rank=2, **(SMOOTH | {"learning_rate": 2.0}))
    start = of_jax.logprobs(OF)
    of_jax.update(OF, coefficients_of(OF))
    assert all(np.abs(np.asarray(a)).max() > 0 for n, a in of_jax.learner.adapters.items() if n.endswith("lora_B"))
    after = of_jax.logprobs(OF)
    assert np.abs(after - start).max() > 0.01
    of_jax.export(tmp_path / "out")
    with torch.no_grad():
        np.testing.assert_allclose(logprobs(load(tmp_path / "out"), OF).numpy(), after, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rope", ["longrope", "dynamic"])
def test_rows_past_the_length_at_which_rope_changes_are_refused(rope: str, folders, tmp_path) -> None:
    changes = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 700.0, "factor": 2.0}}
    changes |= {"max_position_embeddings": 64}
    name = "phi4" if rope == "longrope" else "llama-yarn"
    folder = folders("phi4") if rope == "longrope" else decoder_families.make(name, tmp_path / "model", **changes)
    of_jax = policy(folder)
    fits = Batch([tuple(range(1, 33))], [tuple(range(40, 72))], [0])
    with torch.no_grad():
        np.testing.assert_allclose(of_jax.logprobs(fits), logprobs(load(folder), fits).numpy(), rtol=0, atol=1e-4)
    long = Batch([tuple(range(1, 34))], [tuple(range(40, 72))], [0])
    for refused in (
        lambda: of_jax.logprobs(long),
        lambda: of_jax.update(long, coefficients_of(long)),
        lambda: of_jax.generate([(1, 2)], [[0]], Sampling(63)),
    ):
        with pytest.raises(ConfigError, match=r"a row has 65 tokens; the rotary embedding of .* longer than 64 tokens"):
            refused()


@pytest.mark.slow_on("gemma3")
@pytest.mark.parametrize("name", ["gemma3", "gemma4"])
def test_the_text_part_of_a_model_of_images_is_trained(name: str, tmp_path) -> None:
    folder = decoder_families.make_with_images(name, tmp_path / "model")
    model = load(folder)
    assert type(model).__name__ == f"{name.title()}ForConditionalGeneration"
    of_jax = policy(folder)
    with torch.no_grad():
        own = logprobs(model, OF).numpy()
    np.testing.assert_allclose(of_jax.logprobs(OF), own, rtol=0, atol=1e-4)
    of_jax.export(tmp_path / "out")
    text = load(tmp_path / "out")
    assert type(text).__name__ == f"{name.title()}ForCausalLM"
    with torch.no_grad():
        np.testing.assert_allclose(logprobs(text, OF).numpy(), own, rtol=0, atol=1e-4)
