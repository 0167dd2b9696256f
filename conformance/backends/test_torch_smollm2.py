"""On the real SmolLM2-135M-Instruct: log-probs are transformers' own, packed and plain, and samples are language."""

import numpy as np
import pytest
from required import require
from smollm2 import smollm2_dir  # noqa: F401 - a fixture
from torch_policies import policy

require(subject="torch")

import torch

from gvpo_core.training.policy import Batch
from gvpo_core.training.sampling import Sampling, row_seed

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
