"""The smallest epsilon that the settings take: weights without a gradient stay numbers, on every backend."""

import numpy as np
import tiny_models
from batches import batch, coefficients_of

from gvpo_core.training.config.check import SMALLEST_EPS


def test_weights_without_a_gradient_stay_as_they_are(backend, tmp_path):
    """Embedding rows that are no input have none; with eps = 0 they became NaN."""
    model = tiny_models.write_model("llama", tmp_path / "model")
    policy = backend.policies.policy(model, eps=SMALLEST_EPS, max_gradient_norm=1e-20)
    before = backend.policies.parameters(policy)
    of = batch((2,))
    policy.update(of, coefficients_of(of))
    after = backend.policies.parameters(policy)
    name = "model.embed_tokens.weight"
    still = (before[name] == after[name]).all(axis=1)
    assert 0 < still.sum() < len(still), "the batch has inputs, and not all tokens are among them"
    assert all(np.isfinite(value).all() for value in after.values())
    assert max(np.abs(after[n] - before[n]).max() for n in after) < 1e-2
