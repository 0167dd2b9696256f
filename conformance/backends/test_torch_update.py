"""What only gvpo_torch's step has: dropout to switch off, memory that the system reports."""

import numpy as np
import pytest
import tiny_models
import torch_policies
from batches import SMOOTH, batch, coefficients_of, moved
from required import require
from torch_policies import policy

require(subject="torch")

OF = batch((4, 3, 1, 5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.make_model("llama-tied-bias", tmp_path_factory.mktemp("llama"))


def test_dropout_is_off(tmp_path) -> None:
    made = tiny_models.make_model("gpt2", tmp_path, attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    of_policy = policy(made, gradient_checkpointing=True, **SMOOTH)
    before = of_policy.logprobs(OF)
    update = of_policy.update(OF, coefficients_of(OF))
    np.testing.assert_allclose(update.logprobs, before, rtol=0, atol=1e-4)


def test_peak_memory_is_in_bytes(folder) -> None:
    assert moved(torch_policies, folder, OF)[1].peak_memory > 50e6  # of the whole process
