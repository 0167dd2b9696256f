"""GSPO's coefficients are the gradient of TRL's own sequence-level loss."""

from unittest.mock import MagicMock

import numpy as np
import pytest
from required import require

require("trl", subject="trl")

import torch
from trl import GRPOTrainer

import gvpo_core

pytestmark = pytest.mark.filterwarnings("default")  # TRL and transformers warn about each other's names


def trl_gradient(
    now: torch.Tensor, old: torch.Tensor, mask: torch.Tensor, advantages: torch.Tensor, clip: float
) -> np.ndarray:
    """(N,) derivative of TRL's loss in a response's log-probability, spread over its tokens."""
    now = now.clone().requires_grad_()
    trainer = MagicMock()
    settings = {
        "importance_sampling_level": "sequence", "loss_type": "grpo", "beta": 0.0, "off_policy_mask_threshold": None,
        "epsilon_low": clip, "epsilon_high": clip, "top_entropy_quantile": 1.0, "use_vllm": False,
        "aux_loss_enabled": False, "_entropy_bonus_enabled": False, "current_gradient_accumulation_steps": 1,
        "tools": None, "use_liger_kernel": False,
    }  # fmt: skip
    for name, value in settings.items():
        setattr(trainer, name, value)
    trainer.args.delta = None
    trainer._get_per_token_logps_and_entropies.return_value = (now, torch.zeros_like(now), None)
    trainer.accelerator.gather.side_effect = lambda x: x
    ids = torch.zeros(mask.shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": torch.ones_like(ids[:, :1]), "completion_ids": ids,
        "completion_mask": mask.long(), "advantages": advantages, "old_per_token_logps": old,
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    assert trainer._get_per_token_logps_and_entropies.called
    gradient = now.grad.numpy()
    rows = [gradient[i][m] for i, m in enumerate(mask.numpy())]
    assert all(np.allclose(row, row[0]) for row in rows)  # every token of a response has the same factor
    return np.array([row[0] for row in rows])


@pytest.mark.parametrize("clip", [0.2, 0.05])
def test_gspo_is_trls_sequence_level_loss(clip: float) -> None:
    rng = np.random.default_rng(3)
    lengths = np.array([3, 5, 1, 4, 2, 5, 4, 3])
    mask = np.arange(5)[None] < lengths[:, None]
    now, rewards, ids = rng.normal(-2, 0.5, (8, 5)), rng.normal(0, 1, 8), np.repeat([0, 1], 4)
    old = now + rng.normal(0, 0.2, (8, 5))
    advantages = gvpo_core.grpo_weights(rewards, ids)
    theirs = trl_gradient(*(torch.tensor(x) for x in (now, old, mask, advantages)), clip)
    sums = [np.where(mask, x, 0.0).sum(axis=1) for x in (now, old)]
    ours = gvpo_core.objective_coefficients(
        "gspo", sums[0], sums[1], sums[1], rewards, ids, beta=0.0, clip=clip, lengths=lengths
    )
    assert (ours == 0).any() == (clip == 0.05)  # the tight range clips, the wide one does not
    np.testing.assert_allclose(-theirs, ours, rtol=1e-12, atol=1e-15)
