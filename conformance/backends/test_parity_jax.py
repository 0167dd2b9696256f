"""gvpo_jax beside transformers and gvpo_torch, in one process: the same log-probs, the same step, the same exports."""

import numpy as np
import pytest
import tiny_models
import torch_policies
from batches import batch, coefficients_of, step_difference
from jax_policies import parameters, policy
from required import require
from smollm2 import smollm2_dir  # noqa: F401 - a fixture

require("jax", "optax", "orbax.checkpoint", "torch", "peft", "transformers", subject="parity")

import torch
from transformers import AutoModelForCausalLM

from gvpo_core.training.policy import Batch
from gvpo_core.training.sampling import Sampling, row_seed

SMOOTH = {"learning_rate": 0.5, "betas": (0.0, 0.0), "eps": 1.0}
OF = batch((4, 3, 2))
CHANGED = {
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 9000.0, "factor": 4.0}},
    ),
    "llama-bfloat16-file": ("llama-tied", {}),
}


def own_logprobs(folder, of: Batch) -> np.ndarray:
    """(N,) by transformers' own forward pass in float32, the normaliser in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    with torch.inference_mode():
        for prompt, response in zip(of.prompts, of.responses, strict=True):
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()
            found.append(float(logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()))
    return np.asarray(found)


@pytest.mark.slow_on("llama-tied", "llama-biases", "qwen2", "llama-bfloat16-file")
@pytest.mark.parametrize("name", [*tiny_models.DECODERS, *CHANGED])
def test_logprobs_are_transformers_own(name: str, tmp_path) -> None:
    family, changes = CHANGED.get(name, (name, {}))
    write = tiny_models.make_model if changes.get("mlp_bias") else tiny_models.write_model  # which has no such bias
    folder = write(family, tmp_path / "model", **changes)
    if name == "llama-bfloat16-file":
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    own = own_logprobs(folder, OF)
    made = policy(folder)
    assert made.packed == (not name.endswith("-window"))
    np.testing.assert_allclose(made.logprobs(OF), own, rtol=0, atol=1e-4)
    if made.packed:
        made._splitting = type(made._splitting)(False, 4096, 0, 32)
        np.testing.assert_allclose(made.logprobs(OF), own, rtol=0, atol=1e-4)


def own_names(of_torch) -> dict[str, np.ndarray]:
    """The trained parameters of a gvpo_torch policy, under the names of gvpo_jax."""
    named = torch_policies.parameters(of_torch).items()
    return {name.removeprefix("base_model.model.").replace(".default.weight", ""): value for name, value in named}


def adapters_of_torch(of_torch) -> dict[str, np.ndarray]:
    """peft's adapters, stacked as in gvpo_jax."""
    stacked: dict[str, list[np.ndarray]] = {}
    for own, value in own_names(of_torch).items():
        layer = own.split(".")[2]
        stacked.setdefault(own.replace(f".{layer}.", ".*.", 1), []).append(value.astype(np.float32))
    return {name: np.stack(values) for name, values in stacked.items()}


@pytest.mark.slow_on("lora", "llama3-full", "llama3-adamw")
@pytest.mark.parametrize("kind", ["full", "lora", "adamw"])
@pytest.mark.parametrize("family", ["llama3", "qwen3"])
def test_one_update_is_that_of_gvpo_torch(family: str, kind: str, tmp_path) -> None:
    settings = {
        "full": SMOOTH,
        "lora": SMOOTH | {"lora_rank": 3, "learning_rate": 2.0},
        "adamw": {"learning_rate": 1e-5, "weight_decay": 0.1, "max_gradient_norm": 1.0},
    }[kind]
    folder = tiny_models.write_model(family, tmp_path / "model")
    of_torch, of_jax = torch_policies.policy(folder, **settings), policy(folder, **settings)
    if kind == "lora":
        import jax

        given = adapters_of_torch(of_torch)
        assert given.keys() == of_jax.learner.adapters.keys()
        of_jax.learner.adapters = {n: jax.device_put(v, of_jax.learner.adapters[n].sharding) for n, v in given.items()}
    start = parameters(of_jax)
    one, two = (p.update(OF, coefficients_of(OF)) for p in (of_torch, of_jax))
    np.testing.assert_allclose(two.logprobs, one.logprobs, rtol=0, atol=1e-4)
    assert two.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-5)
    wanted, found = own_names(of_torch), parameters(of_jax)
    assert step_difference(wanted, found) < 1e-5
    if kind != "adamw":  # there the sign of a gradient that is all rounding decides a whole step
        moved = [{name: after[name] - start[name] for name in start} for after in (wanted, found)]
        assert step_difference(*moved) < 1e-5


@pytest.mark.slow_on("bfloat16", "lora")
@pytest.mark.parametrize("settings", [{}, {"lora_rank": 3}, {"dtype": "bfloat16"}], ids=["full", "lora", "bfloat16"])
def test_exports_are_read_by_transformers(settings, tmp_path) -> None:
    folder = tiny_models.write_model("llama3", tmp_path / "model")
    of_jax = policy(folder, **(SMOOTH | settings))
    of_jax.update(OF, coefficients_of(OF))
    (tmp_path / "out").mkdir()
    of_jax.export(tmp_path / "out")
    scored = of_jax.logprobs(OF)
    own = own_logprobs(tmp_path / "out", OF)
    np.testing.assert_allclose(own, scored, rtol=0 if not settings.get("dtype") else 0.03, atol=1e-4)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert str(loaded.dtype) == f"torch.{settings.get('dtype', 'float32')}"
    assert loaded.generation_config.eos_token_id == 0
    np.testing.assert_allclose(policy(tmp_path / "out").logprobs(OF), own, rtol=0, atol=1e-4)


def test_both_draw_the_same(tmp_path) -> None:
    folder = tiny_models.write_model("qwen2", tmp_path / "model", spread=0.15)
    prompts, seeds = [(5, 6, 7), tuple(range(20, 32))], [[row_seed(1, i, j) for j in range(3)] for i in range(2)]
    for sampling in (Sampling(12), Sampling(12, temperature=0.0), Sampling(12, 0.7, top_k=9, min_p=0.02, top_p=0.8)):
        one, two = (p.generate(prompts, seeds, sampling) for p in (torch_policies.policy(folder), policy(folder)))
        assert one == two


@pytest.mark.slow
def test_smollm2(smollm2_dir) -> None:  # noqa: F811
    of_jax = policy(smollm2_dir)
    prompts = [
        of_jax.encode([{"role": "user", "content": text}])
        for text in ("What is 3 + 4?", "What is the capital of France?")
    ]
    responses, sampled = of_jax.sample(prompts, [[row_seed(0, i, j) for j in range(3)] for i in range(2)], Sampling(12))
    of = Batch(
        [prompt for prompt in prompts for _ in range(3)],
        [response.tokens for row in responses for response in row],
        [0] * 3 + [1] * 3,
    )
    scored = of_jax.logprobs(of)
    assert of_jax.packed
    np.testing.assert_allclose(scored, own_logprobs(smollm2_dir, of), rtol=0, atol=1e-4)
    np.testing.assert_allclose(scored, np.concatenate(sampled), rtol=0, atol=1e-4)
    answers = of_jax.generate(prompts, [[0], [0]], Sampling(12, temperature=0.0))
    assert "Paris" in of_jax.decode(answers[1][0].tokens)
