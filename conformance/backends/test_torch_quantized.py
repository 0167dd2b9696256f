"""gvpo_torch with bitsandbytes: AdamW's moments in 8 bits, and adapters on a base in 4 bits (QLoRA)."""

import json
import shutil
import sys
from statistics import NormalDist

import batches
import numpy as np
import pytest
import tiny_models
from batches import batch, coefficients_of, step_difference, train
from places import DEVICE
from required import require
from torch_policies import parameters, policy, sample
from torch_processes import run_processes

require(subject="torch")
require("bitsandbytes", subject="torch")
import torch
from gvpo_torch import quantized, update
from gvpo_torch.adapters import without_peft_warnings
from gvpo_torch.model import load_scorer
from live_bytes import LiveBytes
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from gvpo_core.training.config import ConfigError, OptimizerConfig
from gvpo_core.training.policy import Batch
from gvpo_core.training.sampling import Sampling, row_seed

OF = batch((4, 3))
LORA = {"lora_rank": 4, "quantization": "nf4"}
EIGHT = {"name": "adamw_8bit"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with matrices on both sides of 4,096 elements."""
    sizes = {"hidden_size": 64, "intermediate_size": 80, "head_dim": 10}
    return tiny_models.write_model("qwen3", tmp_path_factory.mktemp("qwen3"), spread=0.2, **sizes)


@pytest.fixture(scope="module")
def unpacked(folder, tmp_path_factory):
    """The folder with the weights that NF4 stands for, by NumPy."""
    copy = tmp_path_factory.mktemp("unpacked") / "model"
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors |= {name: nf4(value) for name, value in tensors.items() if "_proj" in name}
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def nf4(weight: np.ndarray) -> np.ndarray:
    """To the nearest of 16 quantiles of a normal distribution, times the largest of 64 (arXiv 2305.14314)."""
    quantiles = lambda count: np.array([NormalDist().inv_cdf(p) for p in np.linspace(0.9677083, 0.5, count)[:-1]])
    levels = np.sort(np.concatenate([quantiles(9), [0.0], -quantiles(8)]))
    levels /= levels.max()
    flat = weight.reshape(-1).astype(np.float64)
    blocks = np.pad(flat, (0, -len(flat) % 64)).reshape(-1, 64)
    scales = np.abs(blocks).max(1, keepdims=True)
    nearest = np.abs(blocks[..., None] / scales[..., None] - levels).argmin(-1)
    return (levels[nearest] * scales).reshape(-1)[: len(flat)].reshape(weight.shape).astype(np.float32)


# -- moments in 8 bits


def test_moments_in_8_bits_take_the_step_of_numpy() -> None:
    """AdamW on moments that are rounded after each step to the nearest level of their map, in blocks of 256."""
    draw = np.random.default_rng(0)
    start, shape = draw.normal(size=(70, 61)), (70, 61)
    p = torch.nn.Parameter(torch.tensor(start, dtype=torch.float32))
    optimizer = update.make_optimizer(
        torch.nn.ParameterList([p]), OptimizerConfig(**EIGHT, weight_decay=0.1, betas=(0.8, 0.95))
    )
    wide = torch.nn.Parameter(p.detach().clone())
    in_float32 = update.make_optimizer(
        torch.nn.ParameterList([wide]), OptimizerConfig(weight_decay=0.1, betas=(0.8, 0.95))
    )
    value, moments = start.reshape(-1), [np.zeros(start.size), np.zeros(start.size)]
    for t in range(1, 5):
        g = draw.normal(size=shape).astype(np.float32)
        p.grad, wide.grad = torch.tensor(g), torch.tensor(g)
        update.step(optimizer, 0.03)
        update.step(in_float32, 0.03)
        g = g.reshape(-1).astype(np.float64)
        first, second = 0.8 * moments[0] + 0.2 * g, 0.95 * moments[1] + 0.05 * g**2
        value = value * (1 - 0.03 * 0.1)
        value = value - 0.03 * first / (1 - 0.8**t) / (np.sqrt(second / (1 - 0.95**t)) + 1e-8)
        state = optimizer.state[p]
        moments = [rounded(m, state[f"qmap{i}"].double().numpy()) for i, m in ((1, first), (2, second))]
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
    apart, rounding = (np.abs(q.detach().double().numpy().reshape(-1) - value) for q in (p, wide))
    assert np.median(apart) < 1e-6  # a moment half way between two levels may go either way
    assert apart.mean() < 0.02 * rounding.mean()


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_head_and_small_tensors_take_the_step_of_float32_moments(tied, tmp_path) -> None:
    """Also rows of tokens that are rare in a batch, whose second moment would be rounded to 0 in 8 bits."""
    made = tiny_models.write_model("llama", tmp_path, hidden_size=64, intermediate_size=80, tie_word_embeddings=tied)
    eight, plain = (policy(made, learning_rate=1e-2, weight_decay=0.1, **kind) for kind in (EIGHT, {}))
    in_float32 = set()
    for t in range(4):
        for of_policy in (eight, plain):
            draw = torch.Generator().manual_seed(t)
            for p in of_policy._named.values():
                scale = (
                    torch.ones(p.shape) if p.ndim < 2 or t % 2 else 10.0 ** -torch.arange(len(p)).remainder(12)[:, None]
                )
                p.grad = (torch.randn(p.shape, generator=draw) * scale).to(p.device)
            update.step(of_policy._optimizer, 1e-2)
    for name, p in eight._named.items():
        if eight._optimizer.state[p]["state1"].dtype == torch.float32:
            in_float32.add(name)
            np.testing.assert_allclose(
                p.detach().cpu().numpy(), plain._named[name].detach().cpu().numpy(), rtol=1e-5, atol=1e-6
            )
    vocabulary = {name for name in eight._named if "embed_tokens" in name or "lm_head" in name}
    small = {name for name, p in eight._named.items() if p.numel() < quantized.SMALLEST}
    assert len(vocabulary) == (1 if tied else 2) and in_float32 == vocabulary | small
    assert len(in_float32) < len(eight._named)


def rounded(moment: np.ndarray, levels: np.ndarray) -> np.ndarray:
    blocks = np.pad(moment, (0, -len(moment) % 256)).reshape(-1, 256)
    scales = np.abs(blocks).max(1, keepdims=True)
    nearest = np.abs(blocks[..., None] / scales[..., None] - levels).argmin(-1)
    return (levels[nearest] * scales).reshape(-1)[: len(moment)]


@pytest.mark.parametrize("kind", [{}, LORA], ids=["full", "nf4"])
def test_a_restored_run_continues_bit_for_bit(kind, folder, tmp_path) -> None:
    settings = EIGHT | kind | {"learning_rate": 1e-2}
    whole = policy(folder, **settings)
    expected = train(whole, range(4))
    first = policy(folder, **settings)
    train(first, range(2))
    first.save(tmp_path)
    second = policy(folder, seed=5, **settings)
    train(second, range(7, 8))
    second.restore(tmp_path)
    assert train(second, range(2, 4)) == expected[2:]
    assert step_difference(parameters(whole), parameters(second)) == 0.0
    kinds = {str(s["state1"].dtype) for s in second._optimizer.state.values()}
    assert kinds == ({"torch.float32"} if kind else {"torch.uint8", "torch.float32"})  # adapters here are small


def test_the_estimate_knows_what_moments_in_8_bits_take(tmp_path) -> None:
    of_policy = policy(tiny_models.write_model("qwen3", tmp_path / "model", intermediate_size=1024), **EIGHT)
    train(of_policy, range(1))
    state = of_policy._optimizer.state.values()
    taken = sum(s[name].nbytes for s in state for name in s if name.startswith(("state", "absmax")))
    facts = of_policy.describe()
    assert facts.memory.moments == taken < 0.4 * 8 * facts.parameters
    assert "bitsandbytes" in facts.versions
    of_policy.save(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    assert file.stat().st_size < 4 * facts.parameters + taken + 20_000


def test_a_checkpoint_of_other_moments_is_refused(folder, tmp_path) -> None:
    of_policy = policy(folder)
    train(of_policy, range(1))
    of_policy.save(tmp_path)
    with pytest.raises(ConfigError, match=r"does not fit the model: it lacks \d+ tensors, the first absmax1"):
        policy(folder, **EIGHT).restore(tmp_path)


@pytest.mark.parametrize("settings", [EIGHT, LORA], ids=["adamw_8bit", "nf4"])
def test_a_missing_package_is_named(settings, folder, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r'cannot be imported .*: pip install "gvpo\[bitsandbytes\]"'):
        policy(folder, **settings)


# -- a base in 4 bits


def test_linear_layers_are_held_in_4_bits(folder) -> None:
    of_policy, plain = policy(folder, **LORA), policy(folder, lora_rank=4)
    layers = quantized.packed_layers(of_policy.scorer.base)
    assert len(layers) == 2 * 7 and all(layer.weight.dtype == torch.uint8 for layer in layers.values())
    weights = sum(layer.shape.numel() for layer in layers.values())
    held = sum(layer.weight.nbytes + layer.absmax.nbytes for layer in layers.values())
    assert held <= 0.57 * weights
    found, wanted = of_policy.describe(), plain.describe()
    assert (found.parameters, found.trainable_parameters) == (wanted.parameters, wanted.trainable_parameters)
    frozen = [p for p in plain.scorer.parameters() if not p.requires_grad]
    assert found.memory.frozen == sum(p.nbytes for p in frozen) - 4 * weights + held


@pytest.mark.parametrize("checkpointing", [False, True])
def test_scores_and_steps_are_those_of_the_unpacked_weights(checkpointing, folder, unpacked) -> None:
    packed = policy(folder, **LORA, **batches.SMOOTH, gradient_checkpointing=checkpointing)
    plain = policy(unpacked, lora_rank=4, **batches.SMOOTH)
    apart = np.abs(policy(folder, lora_rank=4).logprobs(OF) - plain.logprobs(OF)).max()
    assert apart > 0.1, "NF4 changes nothing here"
    steps = []
    for of_policy in (packed, plain):
        scores = [of_policy.logprobs(OF)]
        before = parameters(of_policy)
        for _ in range(2):
            of_policy.update(OF, coefficients_of(OF))
        scores += [of_policy.logprobs(OF), of_policy.logprobs(OF, reference=True)]
        after = parameters(of_policy)
        steps.append((scores, {name: after[name] - before[name] for name in after}))
    np.testing.assert_allclose(steps[0][0], steps[1][0], rtol=0, atol=2e-4)
    assert np.abs(steps[1][0][1] - steps[1][0][0]).max() > 0.01  # the adapters have moved
    np.testing.assert_array_equal(steps[0][0][2], steps[0][0][0])  # the reference is the packed base, adapters off
    assert step_difference(steps[1][1], steps[0][1]) < 1e-4


def test_sampling_sees_the_scored_model(folder, monkeypatch) -> None:
    of_policy = policy(folder, **LORA, learning_rate=0.05)
    train(of_policy, range(2))
    prompts, seeds = [(5, 6, 7), (9,)], [[row_seed(1, i, j) for j in range(2)] for i in range(2)]
    responses, sums = sample(of_policy, prompts, seeds, Sampling(12), monkeypatch)
    pairs = [(p, r.tokens) for p, row in zip(prompts, responses, strict=True) for r in row]
    drawn = Batch([p for p, _ in pairs], [r for _, r in pairs], [0] * len(pairs))
    np.testing.assert_allclose(of_policy.logprobs(drawn), sums, rtol=0, atol=2e-4)


def test_exports_are_the_trained_policy(folder, unpacked, tmp_path) -> None:
    """Merged: the unpacked base with the adapters added. The adapters alone: for the unpacked base."""
    of_policy = policy(folder, **LORA, learning_rate=0.05)
    train(of_policy, range(2))
    wanted = of_policy.logprobs(OF)
    of_policy.export(tmp_path / "merged")
    np.testing.assert_allclose(policy(tmp_path / "merged").logprobs(OF), wanted, rtol=0, atol=2e-4)
    (tmp_path / "adapters").mkdir()
    of_policy.export_adapters(tmp_path / "adapters")
    with without_peft_warnings():
        lm = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(unpacked), tmp_path / "adapters").eval()
    for prompt, response, logprob in zip(OF.prompts, OF.responses, wanted, strict=True):
        with torch.no_grad():
            logits = lm(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert float(logits.gather(1, torch.tensor(response)[:, None]).sum()) == pytest.approx(logprob, abs=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [EIGHT, LORA | {"learning_rate": 0.2}], ids=["adamw_8bit", "nf4"])
def test_two_processes_take_the_step_of_one(kind, folder, tmp_path) -> None:
    """Each with a copy; the workers also save, restore, sample and renew the reference."""
    settings = batches.SMOOTH | {"learning_rate": 0.02, "micro_batch_responses": 2, "strategy": "score"} | kind
    found = []
    for size in (1, 2):
        out = tmp_path / str(size)
        out.mkdir()
        given = json.dumps(settings | {"sharding": "data_parallel"})
        run_processes(size, "torch_rank_worker.py", [str(folder), str(out), given], out)
        found.append(dict(np.load(out / "two.npz")))
    assert step_difference(*found) < 1e-5


@pytest.mark.slow
def test_loading_holds_no_unpacked_model(tmp_path) -> None:
    """Host bytes while reading, packing and checking: a layer's temporaries beside what stays."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 24}
    made = tiny_models.write_model("llama", tmp_path, **sizes)
    whole = (tmp_path / "model.safetensors").stat().st_size
    quantized.library()
    with LiveBytes() as counted:
        scorer = load_scorer(batches.sections(made, "cpu", LORA)[0], torch.device("cpu"), 0)
    kept = quantized.frozen_bytes(scorer) + sum(p.nbytes for p in scorer.parameters() if p.requires_grad)
    assert kept < 0.5 * whole and counted.most < kept + 0.1 * whole


def test_weights_unreadable_in_parts_are_packed_and_logged(folder, tmp_path, caplog) -> None:
    named = tiny_models.changed(folder, tmp_path, transformers_weights="model.safetensors")
    with caplog.at_level("WARNING", "gvpo.torch"):
        scores = policy(named, **LORA).logprobs(OF)
    np.testing.assert_array_equal(scores, policy(folder, **LORA).logprobs(OF))
    assert "the whole model is read before it is packed (config.json names the file of its weights)" in caplog.text


def test_a_checkpoint_belongs_to_its_quantization(folder, tmp_path) -> None:
    policy(folder, **LORA).save(tmp_path)
    with pytest.raises(ConfigError, match="has quantization = nf4; this run has none"):
        policy(folder, lora_rank=4).restore(tmp_path)


def test_a_model_without_linear_layers_is_refused(tmp_path) -> None:
    made = tiny_models.make_model("gpt2", tmp_path)
    with pytest.raises(ConfigError, match="GPT2LMHeadModel has no linear layer that can be held in 4 bits"):
        policy(made, **LORA)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 96), (40, 64), (50, 70), (33, 7), (128, 160), (3, 5)], ids=str)
def test_a_weight_of_any_shape_is_unpacked_right(shape, dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    layer = quantized.Linear4bit(*shape[::-1], bias=False)
    layer.pack(weight)
    right = torch.tensor(nf4(weight.float().numpy())).to(dtype)
    assert float((layer.dense - right).abs().max()) <= (1e-6 if dtype == torch.float32 else 0.02)


def test_weights_that_come_back_wrong_are_refused(folder, monkeypatch) -> None:
    right = quantized._unpacked
    monkeypatch.setattr(quantized, "_unpacked", lambda *given: right(*given).flip(0))
    with pytest.raises(ConfigError, match=rf"does not restore a weight of shape \(40, 64\) on {DEVICE}"):
        policy(folder, **LORA)


def test_experts_stay_as_they_are_and_the_rest_is_packed(tmp_path) -> None:
    made = tiny_models.make_model("qwen3_moe", tmp_path)
    of_policy = policy(made, **LORA)
    names = set(quantized.packed_layers(of_policy.scorer.base))
    assert names and not any("experts" in name or name.endswith(".gate") for name in names)
    train(of_policy, range(1))
