"""What one framework alone has: jax.vmap, and torch.compile with its default compiler."""

import shutil
from typing import Any

import numpy as np
import pytest
from cases import CASES
from reference import reference
from settings import Setting

import gvpo_core as core

pytestmark = pytest.mark.dtypes("float32")


def _loss(logprobs: Any, ref_logprobs: Any, rewards: Any, group_ids: Any) -> Any:
    return core.gvpo_loss(logprobs, ref_logprobs, rewards, group_ids, beta=0.3, num_groups=5).loss


@pytest.mark.capability("values")
@pytest.mark.modes("eager")
def test_vmap(setting: Setting) -> None:
    """A batch of batches, in jax.vmap, equals a loop."""
    if setting.subject.name != "jax":
        pytest.skip("jax.vmap")
    import jax

    cases = [setting.rounded(c) for c in CASES if c.name in ("even", "ragged", "shuffled")]
    stacked = [
        setting.array(np.stack([getattr(c, name) for c in cases]))
        for name in ("logprobs", "ref_logprobs", "rewards", "group_ids")
    ]
    expected = [reference(c)["gvpo_loss.loss"] for c in cases]
    setting.check("vmap", jax.vmap(_loss)(*stacked), expected)


@pytest.mark.capability("values")
@pytest.mark.modes("compiled")
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # torch 2.13's own, while inductor loads
def test_inductor(setting: Setting) -> None:
    """torch.compile as users call it: value and gradient of the loss, in one graph."""
    if setting.subject.name != "torch":
        pytest.skip("torch's default compiler")
    if shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    import torch

    case = setting.rounded(CASES[1])
    a = setting.arrays(CASES[1])
    x = a["logprobs"].requires_grad_()
    loss = torch.compile(_loss, fullgraph=True)(x, a["ref_logprobs"], a["rewards"], a["group_ids"])
    (gradient,) = torch.autograd.grad(loss, x)
    expected = reference(case)
    setting.check("loss", loss, expected["gvpo_loss.loss"])
    setting.check("d loss", gradient, -2 * 0.3 * expected["gvpo_coefficients"])
