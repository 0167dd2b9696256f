"""With theta = theta_old the step's gradient is that of TRL's RLOOTrainer, KL (k1) in the reward and no normalisation.

TRL's advantage is k / (k - 1) (r_i - mean r) with r = R - beta s, its loss the mean over the N = G k responses:
(1 / G k) k / (k - 1) w_i = w_i / ((k - 1) G), which is `gvpo_coefficients` itself. So the constant between them is 1.
"""

from typing import Any

import numpy as np
import pytest
import tiny_models
from required import require
from torch_policies import policy

require("trl", "datasets", subject="trl")

import torch

from gvpo_core import gvpo_coefficients
from gvpo_core.training.policy import Batch

GROUPS, K, BETA = 3, 4, 0.2
CONSTANT = 1.0  # of TRL's gradient, to be ours


@pytest.fixture(scope="module")
def moved_policy(tmp_path_factory):
    """A policy that has moved from its reference, its folder, and the reference's folder."""
    initial = tiny_models.make_model("llama", tmp_path_factory.mktemp("initial"))
    of_policy = policy(initial, reference=True, learning_rate=2e-2)
    draw = np.random.default_rng(3)
    prompts = [tuple(draw.integers(1, 96, n).tolist()) for n in (4, 9, 6)]
    rows = [
        (prompt, (*draw.integers(1, 96, int(draw.integers(1, 8))).tolist(), 0), label)
        for label, prompt in enumerate(prompts)
        for _ in range(K)
    ]
    of = Batch(*(list(x) for x in zip(*rows, strict=True)))
    of_policy.update(of, lambda logprobs, chosen: draw.normal(size=len(chosen)))
    current = tmp_path_factory.mktemp("current")
    of_policy.export(current)
    return of_policy, current, initial, of, draw.normal(size=len(of))


def ours(folder, of: Batch, rewards: np.ndarray, ref_logprobs: np.ndarray) -> dict[str, np.ndarray]:
    of_policy = policy(folder, learning_rate=1e-9, betas=(0.0, 0.0), eps=1.0)  # then exp_avg is the gradient

    def coefficients(logprobs: np.ndarray, rows: np.ndarray) -> np.ndarray:
        ids = np.unique(np.asarray(of.groups)[rows], return_inverse=True)[1]
        share = (ids.max() + 1) / GROUPS  # of the groups, where a call holds only some
        return share * gvpo_coefficients(logprobs, ref_logprobs[rows], rewards[rows], ids, beta=BETA)

    of_policy.update(of, coefficients)
    state = of_policy._optimizer.state
    return {name: state[p]["exp_avg"].double().numpy() for name, p in of_policy._named.items()}


def trls(folder, initial, of: Batch, rewards: np.ndarray, out) -> dict[str, np.ndarray]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import RLOOConfig, RLOOTrainer

    arguments = RLOOConfig(
        output_dir=str(out),
        beta=BETA,
        normalize_advantages=False,
        num_generations=K,
        per_device_train_batch_size=len(of),
        max_completion_length=16,
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_dropout=True,
    )
    trainer: Any = RLOOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=lambda completions, **_: rewards.tolist(),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": [str(label) for label in of.groups]}),
        processing_class=tiny_models.make_tokenizer(),
    )
    start = AutoModelForCausalLM.from_pretrained(initial, dtype=torch.float32)
    trainer.ref_model.load_state_dict(start.state_dict())
    prompts, responses = [list(p) for p in of.prompts], [list(r) for r in of.responses]
    trainer._generate = lambda _: (prompts, responses, [str(r) for r in responses])
    trainer.model.train()
    inputs = trainer._generate_and_score_completions([{"prompt": str(label)} for label in of.groups])
    assert float(inputs["advantages"].abs().min()) > 0
    trainer._compute_loss(trainer.model, inputs).backward()
    return {name: p.grad.double().numpy() for name, p in trainer.model.named_parameters()}


@pytest.mark.filterwarnings("default")  # TRL and transformers warn about each other's names
def test_gradient_equals_rloo_trainer(moved_policy, tmp_path) -> None:
    of_policy, current, initial, of, rewards = moved_policy
    ref_logprobs = of_policy.logprobs(of, reference=True)
    assert np.abs(of_policy.logprobs(of) - ref_logprobs).min() > 1e-3
    mine = ours(current, of, rewards, ref_logprobs)
    theirs = trls(current, initial, of, rewards, tmp_path)
    assert mine.keys() == theirs.keys()
    for name, gradient in mine.items():
        scale = max(float(np.abs(gradient).max()), 1e-3)
        np.testing.assert_allclose(CONSTANT * theirs[name], gradient, rtol=0, atol=1e-4 * scale, err_msg=name)
