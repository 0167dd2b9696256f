"""What is checked when a model is loaded: that decoding with a cache, and checkpointing, compute what scoring does."""

import functools

import numpy as np
import pytest
import tiny_models
import torch_policies
from batches import batch, coefficients_of, moved, sample_watched, step_difference
from required import require
from torch_policies import policy

require(subject="torch")

import torch
from gvpo_torch import check, generate

from gvpo_core.training.config import ConfigError
from gvpo_core.training.policy import Batch
from gvpo_core.training.sampling import Sampling, row_seed

PROMPTS = [(5, 6, 7), tuple(range(20, 31)), (9, 10, 11, 12, 13)]
SEEDS = [[row_seed(1, i, j) for j in range(2)] for i in range(3)]
SAMPLING = Sampling(max_tokens=7)
OF = batch((4, 3, 2))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tiny_models.made_once(tmp_path_factory)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "falcon_mamba", "falcon_h1", "minimax", "llama4_text"])
def test_samples_are_those_of_the_scored_model_alone_or_in_a_batch(name: str, folders, monkeypatch) -> None:
    of_policy = policy(folders(name))
    together = of_policy.generate(PROMPTS, SEEDS, SAMPLING)
    drawn, seen = sample_watched(of_policy, generate, PROMPTS, SEEDS, SAMPLING, monkeypatch)
    assert drawn == together
    responses = [response.tokens for row in drawn for response in row]
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    np.testing.assert_allclose(of_policy.logprobs(Batch(prompts, responses, [0, 0, 1, 1, 2, 2])), seen, atol=1e-4)


def decoding(monkeypatch, change) -> None:
    """Makes the tiny llama apply `change(hidden, options)` to what it decodes after the prompt."""
    from transformers.models.llama.modeling_llama import LlamaModel

    plain = LlamaModel.forward

    @functools.wraps(plain)
    def forward(self, *args, **options):
        out = plain(self, *args, **options)
        if options.get("use_cache") and options["input_ids"].shape[1] == 1:
            out.last_hidden_state = change(out.last_hidden_state, options)
        return out

    monkeypatch.setattr(LlamaModel, "forward", forward)


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 2}], ids=["full", "lora"])
def test_model_that_decodes_otherwise_than_it_scores_is_refused(settings, folders, monkeypatch) -> None:
    decoding(monkeypatch, lambda hidden, options: hidden * 1.2)
    with pytest.raises(
        ConfigError, match=r"LlamaForCausalLM decodes with a cache differently from scoring: .* by up to"
    ):
        policy(folders("llama"), **settings)


def test_one_token_far_off_in_16_bits_is_refused_and_rounding_is_not(folders, monkeypatch) -> None:
    """The mean alone would let through what happens to one token in ten, as a cap on large logits does."""
    scorer = policy(folders("llama"), lora_rank=2, dtype="bfloat16").scorer
    assert scorer.base.get_output_embeddings().weight.dtype == torch.bfloat16
    plain, rounded, capped = (np.full(40, -3.0) for _ in range(3))
    rounded[::4] += 0.2
    capped[::20] -= 1.5
    assert check._differ(scorer, [rounded], [plain]) is None
    assert np.abs(capped - plain).mean() < 0.1 and check._differ(scorer, [capped], [plain]) == 1.5


def test_model_that_cannot_decode_is_refused_in_one_line(folders, monkeypatch) -> None:
    def fail(hidden, options):
        raise IndexError("list index out of range")

    decoding(monkeypatch, fail)
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM cannot be sampled with a cache: IndexError: list index"):
        policy(folders("llama"))


def test_model_that_padding_disturbs_decodes_prompts_of_one_length_together(folders, monkeypatch) -> None:
    expected = policy(folders("llama")).generate(PROMPTS, SEEDS, SAMPLING)
    padded = []

    def disturbed(hidden, options):
        mask = options["attention_mask"]
        padded.append(mask is not None and not bool(mask.all()))
        return hidden * 1.2 if padded[-1] else hidden

    decoding(monkeypatch, disturbed)
    of_policy = policy(folders("llama"))
    assert any(padded)
    assert of_policy.scorer.same_length
    padded.clear()
    assert of_policy.generate(PROMPTS, SEEDS, SAMPLING) == expected
    assert padded and not any(padded)


def watch_layers(of_policy) -> list[bool]:
    """Whether gradients were on, for each run of the first layer."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layer = next(m for m in of_policy.scorer.modules() if isinstance(m, GradientCheckpointingLayer))
    child = next(iter(layer.children()))
    runs: list[bool] = []
    child.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    return runs


NOISY = ["phimoe", "mixtral", "dbrx", "minimax", "minimax_m2", "opt", "biogpt"]


@pytest.mark.parametrize("name", [*NOISY, "llama", "gemma3_text"])
def test_checkpointing_recomputes_without_the_noise_of_training(name: str, folders) -> None:
    of_policy = policy(folders(name), gradient_checkpointing=True)
    of = batch((4, 3), longest=6)
    before = of_policy.logprobs(of)
    runs = watch_layers(of_policy)
    update = of_policy.update(of, coefficients_of(of))
    assert len(runs) == 2 and all(runs), "the layer was not computed again in the backward pass"
    np.testing.assert_allclose(update.logprobs, before, rtol=0, atol=1e-4)
    assert not any(module.training for module in of_policy.scorer.modules())
    plain, _ = moved(torch_policies, folders(name), OF)
    for _ in range(2):
        checkpointed, _ = moved(torch_policies, folders(name), OF, gradient_checkpointing=True)
        assert step_difference(plain, checkpointed) < 1e-4


def test_checkpointing_that_changes_log_probs_is_refused(folders, monkeypatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    plain = LlamaDecoderLayer.forward

    def forward(self, hidden_states, *args, **options):
        noise = torch.rand_like(hidden_states) if self.training else 0.0
        return plain(self, hidden_states + noise, *args, **options)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    assert policy(folders("llama")).packed
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM with gradient checkpointing differ by up to"):
        policy(folders("llama"), gradient_checkpointing=True)


@pytest.mark.parametrize(("name", "adapted"), [("phimoe", "q_proj"), ("llama4_text", "q_proj"), ("falcon", "dense")])
def test_adapters_leave_routers_alone(name: str, adapted: str, folders) -> None:
    of_policy = policy(folders(name), lora_rank=2, learning_rate=0.1)
    assert any(adapted in parameter for parameter in of_policy._named)
    assert not any("router" in parameter for parameter in of_policy._named)
    before = of_policy.logprobs(OF)
    of_policy.update(OF, coefficients_of(OF))
    assert np.abs(of_policy.logprobs(OF) - before).max() > 1e-3


@pytest.mark.parametrize("name", ["phimoe", "llama4_text"])
def test_adapters_for_a_router_are_refused_by_name(name: str, folders) -> None:
    with pytest.raises(ConfigError, match=r"model\.lora_targets has 'router', a layer of .* that takes no adapter"):
        policy(folders(name), lora_rank=2, lora_targets=("q_proj", "router"))
