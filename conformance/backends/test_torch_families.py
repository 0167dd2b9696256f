"""Families of transformers, tiny ones from their own classes, and SmolLM2; docs/models.md lists all families."""

import dataclasses

import families
import family_trial
import numpy as np
import pytest
from required import require
from smollm2 import smollm2_dir  # noqa: F401 - a fixture
from torch_policies import parameters, policy

require(subject="torch")

import torch

from gvpo_core.training.policy import Batch
from gvpo_core.training.sampling import Sampling, row_seed

FAMILIES = ("gemma3", "gemma4", "mistral3", "llama4", "qwen3_5", "falcon_h1", "deepseek_v2", "falcon")
SLOW = ("qwen3_vl", "kimi_k25", "gemma4_text", "llama4_text", "zamba2", "gpt_oss", "phimoe", "granite", "cohere")


@pytest.mark.parametrize("name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_family_is_exact(name: str, tmp_path) -> None:
    made = family_trial.try_make(name, tmp_path)
    for lora_rank in (0, 2):
        assert family_trial.try_backend("torch", tmp_path, made, lora_rank)["state"] == "exact"


def test_only_the_text_model_is_trained(tmp_path) -> None:
    folder = families.make("gemma3", tmp_path)
    for kind in ({}, {"lora_rank": 2}):
        of_policy = policy(folder, **kind)
        assert "vision" in str(list(of_policy.scorer.base.state_dict()))
        assert all("language_model" in name for name in parameters(of_policy))
        facts = of_policy.describe()
        assert facts.trainable_parameters == sum(p.size for p in parameters(of_policy).values())


def test_the_image_processor_is_exported_with_the_model(tmp_path) -> None:
    folder = families.make("gemma3", tmp_path / "made")
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    policy(folder).export(tmp_path / "out")
    assert (tmp_path / "out/preprocessor_config.json").read_text() == '{"image_mean": [0.5]}'
    assert not (tmp_path / "out/processor_config.json").exists()


def test_sizes_and_context_are_those_of_the_text_model(tmp_path) -> None:
    facts = policy(families.make("gemma3", tmp_path)).describe()
    assert facts.context == 128
    sizes = {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "intermediate": 48}
    assert facts.vocabulary == 96
    assert sizes.items() <= dataclasses.asdict(facts.memory).items()


def test_layers_of_several_sizes_count_as_the_largest(tmp_path) -> None:
    shape = policy(families.make("gemma4_text", tmp_path)).describe().memory
    assert shape.layers == 2
    assert shape.head_dim > 8  # Gemma 4's full-attention layers are wider than its others


def test_the_trial_notices_a_wrong_model(tmp_path, monkeypatch) -> None:
    from gvpo_torch import generate

    made = family_trial.try_make("llama", tmp_path)
    trial = lambda: family_trial.try_backend("torch", tmp_path, made, 0)
    assert trial()["state"] == "exact"
    changed = made | {"logprobs": (np.asarray(made["logprobs"]) + 0.01).tolist()}
    assert "0.01 nat apart" in family_trial.try_backend("torch", tmp_path, changed, 0)["reason"]
    assert "gradient norm" in family_trial.try_backend("torch", tmp_path, made | {"norm": 1.0}, 0)["reason"]
    plain = generate.pick
    with monkeypatch.context() as patch:
        patch.setattr(generate, "pick", lambda logits, *rest: plain(logits * 1.1, *rest))
        assert "of the cumulative distribution apart" in trial()["reason"]


QUESTIONS = ["What is 3 + 4?", "What is the capital of France?"]


@pytest.fixture(scope="module")
def sampled(smollm2_dir):  # noqa: F811
    of_policy = policy(smollm2_dir)
    prompts = [of_policy.encode([{"role": "user", "content": text}]) for text in QUESTIONS]
    seeds = [[row_seed(0, i, j) for j in range(3)] for i in range(2)]
    responses = of_policy.generate(prompts, seeds, Sampling(max_tokens=12))
    of = Batch(
        [prompt for prompt in prompts for _ in range(3)],
        [response.tokens for row in responses for response in row],
        [0] * 3 + [1] * 3,
    )
    return of_policy, prompts, seeds, of


@pytest.mark.slow
def test_logprobs_are_transformers_own(sampled) -> None:
    of_policy, _, _, of = sampled
    own = []
    with torch.inference_mode():
        for prompt, response in zip(of.prompts, of.responses, strict=True):
            logits = of_policy.scorer.lm(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            # In float64: over 49,152 logits float32 log_softmax is off by 7e-6 a token, always to the same side.
            own.append(float(logits.double().log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()))
    assert of_policy.packed
    np.testing.assert_allclose(of_policy.logprobs(of), own, rtol=0, atol=1e-4)
    of_policy._splitting = type(of_policy._splitting)(False, 4096, 0, 576)
    np.testing.assert_allclose(of_policy.logprobs(of), own, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_greedy_answers_are_language(sampled) -> None:
    of_policy, prompts, _, _ = sampled
    answers = of_policy.generate(prompts, [[0], [0]], Sampling(max_tokens=12, temperature=0.0))
    texts = [of_policy.decode(row[0].tokens) for row in answers]
    assert "Paris" in texts[1]
    ended = answers[1][0]
    assert ended.finished == (ended.tokens[-1] == of_policy.tokenizer.eos_token_id)


@pytest.mark.slow
def test_alone_and_together_draw_the_same(sampled) -> None:
    of_policy, prompts, seeds, of = sampled
    alone = of_policy.generate(prompts[:1], [seeds[0][1:2]], Sampling(max_tokens=12))
    assert alone[0][0].tokens == of.responses[1]


@pytest.mark.slow
def test_adapters_over_bfloat16_weights_load(smollm2_dir) -> None:  # noqa: F811
    """The load check compares random tokens of 30 nats, of which 16 bits round 1.03 away; it must not be refused."""
    of_policy = policy(smollm2_dir, lora_rank=4, dtype="bfloat16")
    assert of_policy.scorer.base.get_output_embeddings().weight.dtype == torch.bfloat16
    assert of_policy.packed
