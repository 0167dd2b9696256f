"""gvpo_mlx beside transformers and gvpo_torch, in one process: the same log-probs, the same step, the same exports."""

import json

import numpy as np
import pytest
import tiny_models
import torch_policies
from batches import batch, coefficients_of, step_difference
from mlx_policies import parameters, policy
from required import require
from smollm2 import smollm2_dir  # noqa: F401 - a fixture

require("mlx.core", "mlx_lm", "torch", "peft", "transformers", subject="parity")

import mlx.core as mx
import torch
from transformers import AutoModelForCausalLM

from gvpo_core.training.policy import Batch

SMOOTH = {"learning_rate": 0.5, "betas": (0.0, 0.0), "eps": 1.0}
OF = batch((4, 3, 2))
YARN = {"rope_type": "yarn", "rope_theta": 700.0, "factor": 4.0, "original_max_position_embeddings": 32}
MADE = {  # beside DECODERS, those that take transformers to be made
    "phi3": {},
    "olmo2": {},
    "smollm3": {},
    "granite": {},
    "qwen3_moe": {},
    "cohere": {},
    "gemma3_text": {"num_hidden_layers": 6},
    "qwen2": {"rope_parameters": {"rope_type": "linear", "rope_theta": 9000.0, "factor": 4.0}},
    "llama": {"rope_parameters": YARN},
}
PLAIN = ("cohere", "gemma3_text")


def own_logprobs(folder, of: Batch) -> np.ndarray:
    """(N,) by transformers' own forward pass in float32, the normaliser in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    with torch.inference_mode():
        for prompt, response in zip(of.prompts, of.responses, strict=True):
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()
            found.append(float(logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()))
    return np.asarray(found)


@pytest.mark.parametrize("name", [*tiny_models.DECODERS, *(f"made-{name}" for name in MADE)])
def test_logprobs_are_transformers_own(name: str, tmp_path) -> None:
    """As transformers 5 saves the folder: RoPE's settings inside `rope_parameters` alone."""
    kind = name.removeprefix("made-")
    if kind == name:
        folder = tiny_models.write_model(name, tmp_path / "model")
    else:
        folder = tiny_models.make_model(kind, tmp_path / "model", **MADE[kind])
    assert "rope_theta" not in json.loads((folder / "config.json").read_text())
    made = policy(folder)
    assert made.packed == (kind not in PLAIN)
    np.testing.assert_allclose(made.logprobs(OF), own_logprobs(folder, OF), rtol=0, atol=1e-3)


@pytest.mark.parametrize("kinds", ["SFSF", "SSSF", "FF", "SSFSSF"])
def test_layers_in_another_pattern_are_transformers_own(kinds: str, tmp_path) -> None:
    """Local and global RoPE by `layer_types`, which is all that transformers 5 saves of the pattern; and the window."""
    layers = [{"S": "sliding_attention", "F": "full_attention"}[kind] for kind in kinds]
    bases = {"sliding_attention": 30.0, "full_attention": 700.0}
    folder = tiny_models.make_model(
        "gemma3_text",
        tmp_path / "model",
        num_hidden_layers=len(kinds),
        layer_types=layers,
        rope_parameters={kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases.items()},
    )
    np.testing.assert_allclose(policy(folder).logprobs(OF), own_logprobs(folder, OF), rtol=0, atol=1e-4)


def mlx_name(name: str) -> str:
    """gvpo_torch's name of a parameter in mlx-lm's model."""
    own = name.removeprefix("base_model.model.")
    for theirs, ours in (("lora_A", "lora_a"), ("lora_B", "lora_b"), ("lora_magnitude_vector", "m")):
        own = own.replace(f".{theirs}.default.weight", f".{ours}")
    return own


def as_mlx(named: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {mlx_name(n): v.T if ".lora_A." in n or ".lora_B." in n else v for n, v in named.items()}


@pytest.mark.parametrize("kind", ["full", "lora", "dora", "adamw"])
@pytest.mark.parametrize("family", ["llama3", "qwen3"])
def test_one_update_is_that_of_gvpo_torch(family: str, kind: str, tmp_path) -> None:
    settings = {
        "full": SMOOTH,
        "lora": SMOOTH | {"lora_rank": 3, "learning_rate": 2.0},
        "dora": SMOOTH | {"lora_rank": 3, "learning_rate": 2.0, "lora_kind": "dora"},
        "adamw": {"learning_rate": 1e-5, "weight_decay": 0.1, "max_gradient_norm": 1.0},
    }[kind]
    folder = tiny_models.write_model(family, tmp_path / "model")
    of_torch, of_mlx = torch_policies.policy(folder, **settings), policy(folder, **settings)
    before = as_mlx(torch_policies.parameters(of_torch))
    assert set(before) == set(of_mlx.scorer.names)
    if "lora_rank" in settings:
        of_mlx.scorer.parameters = [mx.array(before[n].astype(np.float32)) for n in of_mlx.scorer.names]
    ours = parameters(of_mlx)
    updates = [p.update(OF, coefficients_of(OF)) for p in (of_torch, of_mlx)]
    np.testing.assert_allclose(updates[1].logprobs, updates[0].logprobs, rtol=0, atol=1e-4)
    assert updates[1].gradient_norm == pytest.approx(updates[0].gradient_norm, rel=1e-5)
    after, moved = as_mlx(torch_policies.parameters(of_torch)), parameters(of_mlx)
    if kind == "adamw":  # its first step is the sign of the gradient, whose rounding decides where it is near zero
        assert step_difference(after, moved) < 1e-5
        return
    steps = [{n: b[n] - a[n] for n in a} for a, b in ((before, after), (ours, moved))]
    assert max(float(np.abs(d).max()) for d in steps[0].values()) > 1e-3
    assert step_difference(*steps) < 1e-5


@pytest.mark.parametrize("kind", ["full", "lora", "dora", "experts"])
def test_exports_are_read_by_transformers_and_by_mlx_lm(kind: str, tmp_path) -> None:
    from mlx_lm.utils import load_adapters, load_model

    settings = SMOOTH if kind in ("full", "experts") else SMOOTH | {"lora_rank": 3, "learning_rate": 3.0}
    settings |= {"lora_kind": "dora"} if kind == "dora" else {}
    if kind == "experts":
        folder = tiny_models.make_model("qwen3_moe", tmp_path / "model")
    else:
        folder = tiny_models.write_model("llama-tied", tmp_path / "model")
    trained = policy(folder, **settings)
    start = trained.logprobs(OF)
    trained.update(OF, coefficients_of(OF))
    own = trained.logprobs(OF)
    assert np.abs(own - start).max() > 1e-2
    trained.export(tmp_path / "out")
    np.testing.assert_allclose(own_logprobs(tmp_path / "out", OF), own, rtol=0, atol=1e-3)
    of_torch = torch_policies.policy(tmp_path / "out")
    np.testing.assert_allclose(of_torch.logprobs(OF), own, rtol=0, atol=1e-3)

    def by_mlx_lm(lm):  # as mlx-lm alone reads it
        found = []
        for prompt, response in zip(OF.prompts, OF.responses, strict=True):
            logits = lm(mx.array([prompt + response]))[0, len(prompt) - 1 : -1]
            logits = logits - mx.logsumexp(logits, -1, keepdims=True)
            found.append(float(mx.take_along_axis(logits, mx.array(response)[:, None], 1).sum()))
        return found

    np.testing.assert_allclose(by_mlx_lm(load_model(tmp_path / "out")[0]), own, rtol=0, atol=1e-3)
    if kind in ("lora", "dora"):  # the adapters alone, on the folder that was trained
        theta = json.loads((folder / "config.json").read_text())["rope_parameters"]["rope_theta"]
        base, _ = load_model(folder, model_config={"rope_theta": theta})
        adapted = load_adapters(base, str(tmp_path / "out" / "adapters"))
        np.testing.assert_allclose(by_mlx_lm(adapted), own, rtol=0, atol=1e-3)


def test_a_dora_export_of_gvpo_torch_is_the_trained_model(tmp_path) -> None:
    folder = tiny_models.write_model("llama", tmp_path / "model")
    trained = torch_policies.policy(folder, lora_rank=3, lora_kind="dora", **(SMOOTH | {"learning_rate": 3.0}))
    trained.update(OF, coefficients_of(OF))
    trained.export(tmp_path / "out")
    np.testing.assert_allclose(own_logprobs(tmp_path / "out", OF), trained.logprobs(OF), rtol=0, atol=1e-3)


@pytest.mark.slow
def test_smollm2_is_scored_as_by_transformers(smollm2_dir) -> None:  # noqa: F811
    made = policy(smollm2_dir, lora_rank=1)  # no float32 moments of the whole model
    prompt = made.encode("The capital of France is")
    of = Batch([prompt] * 2, [made.encode(text) for text in (" Paris.", " a city")], [0, 0])
    assert made.packed
    np.testing.assert_allclose(made.logprobs(of), own_logprobs(smollm2_dir, of), rtol=0, atol=1e-3)
