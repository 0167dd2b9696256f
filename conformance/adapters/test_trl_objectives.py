"""Coefficients of objectives are the gradients of TRL's own losses, in each response's log-probability."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from required import require

require("trl", subject="trl")

import torch
from transformers import BatchEncoding
from trl import DPOTrainer, GRPOTrainer, RLOOTrainer
from trl.experimental.a2po import A2POTrainer, a2po_trainer

import gvpo_core

pytestmark = pytest.mark.filterwarnings("default")  # TRL and transformers warn about each other's names

IDS, LENGTHS = np.repeat([0, 1], 4), np.array([3, 5, 1, 4, 2, 5, 4, 3])
MASK = np.arange(5)[None] < LENGTHS[:, None]
DRAW = np.random.default_rng(3)
NOW, REWARDS = DRAW.normal(-2, 0.5, (8, 5)), DRAW.normal(0, 1, 8)
OLD = NOW + DRAW.normal(0, 0.2, (8, 5))


def of_responses(gradient: torch.Tensor, mask: np.ndarray = MASK) -> np.ndarray:
    """(N,) the factor that every token of a response has. Raises: AssertionError: its tokens have several."""
    rows = [row[counted] for row, counted in zip(gradient.numpy(), mask, strict=True)]
    assert all(np.allclose(row, row[0], rtol=1e-12) for row in rows)
    return np.array([row[0] for row in rows])


def grpo_gradient(now: np.ndarray, old: np.ndarray | None, mask: np.ndarray, advantages: Any, **changes) -> np.ndarray:
    """(N, T) derivative of GRPOTrainer's loss in the tokens' log-probabilities."""
    trainer = MagicMock()
    settings = {
        "beta": 0.0, "off_policy_mask_threshold": None, "epsilon_low": 0.2, "epsilon_high": 0.2,
        "top_entropy_quantile": 1.0, "use_vllm": False, "aux_loss_enabled": False, "_entropy_bonus_enabled": False,
        "current_gradient_accumulation_steps": 1, "tools": None, "use_liger_kernel": False,
    }  # fmt: skip
    for name, value in (settings | changes).items():
        setattr(trainer, name, value)
    trainer.args.delta = None
    return _token_gradient(GRPOTrainer, trainer, now, mask, advantages, old_per_token_logps=old)


def _token_gradient(of: Any, trainer: Any, now: np.ndarray, mask: np.ndarray, advantages: Any, **inputs) -> np.ndarray:
    logprobs = torch.tensor(now, requires_grad=True)
    trainer._get_per_token_logps_and_entropies.return_value = (logprobs, torch.zeros_like(logprobs), None)
    for name in ("gather", "gather_for_metrics"):
        getattr(trainer.accelerator, name).side_effect = lambda x: x
    trainer.accelerator.reduce.side_effect = lambda x, reduction: x
    ids = torch.zeros(mask.shape, dtype=torch.long)
    inputs = {name: None if value is None else torch.tensor(value) for name, value in inputs.items()} | {
        "prompt_ids": ids[:, :1], "prompt_mask": torch.ones_like(ids[:, :1]), "completion_ids": ids,
        "completion_mask": torch.tensor(mask).long(), "advantages": torch.tensor(advantages),
        "num_items_in_batch": torch.tensor(mask.sum()),
    }  # fmt: skip
    of._compute_loss(trainer, None, inputs).backward()
    assert trainer._get_per_token_logps_and_entropies.called
    return logprobs.grad


def sums(values: np.ndarray) -> np.ndarray:
    return np.where(MASK, values, 0.0).sum(axis=1)


@pytest.mark.parametrize("clip", [0.2, 0.05])
def test_gspo_is_trls_sequence_level_loss(clip: float) -> None:
    advantages = gvpo_core.grpo_weights(REWARDS, IDS)
    settings = {"importance_sampling_level": "sequence", "loss_type": "grpo", "epsilon_low": clip, "epsilon_high": clip}
    theirs = of_responses(grpo_gradient(NOW, OLD, MASK, advantages, **settings))
    arrays = (sums(NOW), sums(OLD), sums(OLD), REWARDS, IDS)
    ours = gvpo_core.objective_coefficients("gspo", *arrays, beta=0.0, clip=clip, lengths=LENGTHS)
    assert (ours == 0).any() == (clip == 0.05)  # the tight range clips, the wide one does not
    np.testing.assert_allclose(-theirs, ours, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo"])
def test_with_responses_of_one_token_the_clipped_steps_are_trls(name: str) -> None:
    """TRL's ratios are the tokens'; of one token they are the responses'."""
    advantages = getattr(gvpo_core, f"{name}_weights")(REWARDS, IDS)
    now, old, mask = NOW[:, :1], OLD[:, :1], np.ones((8, 1), bool)
    settings = {"importance_sampling_level": "token", "loss_type": name, "max_completion_length": 1}
    settings |= {"epsilon_low": 0.1, "epsilon_high": 0.1}
    theirs = of_responses(grpo_gradient(now, old, mask, advantages, **settings), mask)
    arrays = (now[:, 0], old[:, 0], old[:, 0], REWARDS, IDS)
    ours = gvpo_core.objective_coefficients(name, *arrays, beta=0.0, clip=0.1)
    assert (ours == 0).any() and (ours != 0).any()
    np.testing.assert_allclose(-theirs, ours, rtol=1e-12, atol=1e-15)


def test_before_the_first_update_dr_grpo_is_trls_without_its_constant() -> None:
    """TRL divides by max_completion_length, whatever the responses' lengths."""
    settings = {"importance_sampling_level": "token", "loss_type": "dr_grpo", "max_completion_length": 64}
    advantages = gvpo_core.dr_grpo_weights(REWARDS, IDS)
    theirs = of_responses(grpo_gradient(NOW, None, MASK, advantages, **settings))
    ours = gvpo_core.objective_coefficients("dr_grpo", sums(NOW), sums(NOW), sums(NOW), REWARDS, IDS, beta=0.0)
    np.testing.assert_allclose(-64 * theirs, ours, rtol=1e-12)


def test_rloo_is_trls_with_ratios_and_clip() -> None:
    trainer = MagicMock()
    trainer.epsilon_low = trainer.epsilon_high = 0.3
    trainer.aux_loss_enabled = False
    advantages = gvpo_core.rloo_weights(REWARDS, IDS)
    theirs = of_responses(_token_gradient(RLOOTrainer, trainer, NOW, MASK, advantages, old_logps=sums(OLD)))
    arrays = (sums(NOW), sums(OLD), sums(OLD), REWARDS, IDS)
    ours = gvpo_core.objective_coefficients("rloo", *arrays, beta=0.0, clip=0.3)
    assert (ours == 0).any() and (ours != 0).any()
    np.testing.assert_allclose(-theirs, ours, rtol=1e-12, atol=1e-15)


def test_a_star_po_is_trls_value_and_regression(monkeypatch) -> None:
    """V of TRL's stage 1 from the responses of pi_ref, the squared residual of its stage 2 on the same responses."""
    beta, ref, now = 0.3, sums(OLD), sums(NOW)
    monkeypatch.setattr(a2po_trainer, "unwrap_model_for_generation", lambda model, _: nullcontext(model))
    monkeypatch.setattr(a2po_trainer, "logger", MagicMock())
    trainer = MagicMock()
    trainer.args = SimpleNamespace(
        beta1=beta, beta2=beta, num_value_samples=4, per_device_train_batch_size=2, max_prompt_length=8,
        filter_all_incorrect=False,
    )  # fmt: skip
    trainer.train_dataset, trainer.eval_dataset = [{"prompt": "first"}, {"prompt": "second"}], None
    trainer.accelerator.prepare.side_effect, trainer.accelerator.device = (lambda x: x), "cpu"
    trainer.processing_class.return_value = BatchEncoding({"input_ids": torch.zeros(2, 1, dtype=torch.long)})
    trainer.ref_model.generate.return_value = torch.zeros(8, 2, dtype=torch.long)
    trainer.processing_class.batch_decode.return_value = ["response"] * 8
    trainer._calculate_rewards.return_value = torch.tensor(REWARDS)
    A2POTrainer._estimate_optimal_values(trainer)
    values = np.array([trainer._optimal_values[prompt] for prompt in ("first", "second")])
    logprobs = torch.tensor(now, requires_grad=True)
    trainer._get_sequence_logps.return_value = logprobs
    inputs = MagicMock()
    given = {"ref_logps": ref, "rewards": REWARDS, "v_star": values[IDS]}
    inputs.__getitem__.side_effect = lambda name: torch.tensor(given[name]) if name in given else MagicMock()
    A2POTrainer.compute_loss(trainer, None, inputs).backward()
    ours = gvpo_core.objective_coefficients("a_star_po", now, ref, ref, REWARDS, IDS, beta=beta)
    np.testing.assert_allclose(-logprobs.grad.numpy() / (2 * beta), ours, rtol=1e-12)


def pair_gradient(loss: str, beta: float, now: np.ndarray, ref: np.ndarray) -> np.ndarray:
    """(2 G,) derivative of DPOTrainer's loss in the chosen responses' and then the rejected ones' log-probabilities."""
    trainer = MagicMock()
    settings = {
        "beta": beta, "loss_types": [loss], "loss_weights": [1.0], "ld_alpha": None, "precompute_ref_logps": True,
        "f_divergence_type": "reverse_kl", "use_weighting": False, "aux_loss_enabled": False, "label_smoothing": 0.0,
    }  # fmt: skip
    for name, value in settings.items():
        setattr(trainer, name, value)
    for name in ("gather", "gather_for_metrics"):
        getattr(trainer.accelerator, name).side_effect = lambda x: x
    trainer.accelerator.device, trainer.model.training = "cpu", False
    logprobs = torch.tensor(now[:, None], requires_grad=True)  # one token a response, after one of the prompt
    nothing = torch.zeros(len(now), 1)
    outputs = SimpleNamespace(log_probs=logprobs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    ids, chosen, rejected = torch.zeros(len(now), 2, dtype=torch.long), *np.split(ref, 2)
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": torch.tensor([[0, 1]] * len(now)),
        "ref_chosen_logps": torch.tensor(chosen), "ref_rejected_logps": torch.tensor(rejected),
    }  # fmt: skip
    DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False).backward()
    return logprobs.grad[:, 0].numpy()


def test_dpo_is_trls() -> None:
    now, ref, rewards, ids = NOW[:, 0], OLD[:, 0], np.repeat([1.0, 0.0], 4), np.tile(np.arange(4), 2)
    ours = gvpo_core.objective_coefficients("dpo", now, ref, None, rewards, ids, beta=0.3)
    np.testing.assert_allclose(-pair_gradient("sigmoid", 0.3, now, ref), ours, rtol=1e-12)


def test_rebel_with_rewards_of_0_and_1_is_trls_ipo() -> None:
    """IPO regresses the difference of s on 1 / (2 tau), REBEL on the difference of rewards / beta: tau = beta / 2."""
    beta, rewards, ids = 0.3, np.repeat([1.0, 0.0], 4), np.tile(np.arange(4), 2)
    now, ref = NOW[:, 0], OLD[:, 0]
    ours = gvpo_core.objective_coefficients("rebel", now, ref, None, rewards, ids, beta=beta)
    np.testing.assert_allclose(-pair_gradient("ipo", beta / 2, now, ref) * beta / 4, ours, rtol=1e-12)
