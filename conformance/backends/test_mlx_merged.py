"""Adapters on packed weights, merged for an export: the sum is float32, whatever the scales are."""

import numpy as np
import pytest
import tiny_models
from batches import batch, coefficients_of
from mlx_policies import policy, quantize
from required import require

require(subject="mlx")

from safetensors.numpy import load_file

OF = batch((3,))


@pytest.mark.parametrize(
    ("mode", "dtype", "kind"),
    [
        ("mxfp4", "float32", "lora"),
        ("affine", "bfloat16", "lora"),
        ("affine", "bfloat16", "dora"),
        ("affine", "float32", "lora"),
    ],
)
def test_small_changes_of_packed_weights_are_in_the_export(mode, dtype, kind, tmp_path):
    folder = tiny_models.write_model("llama", tmp_path / "model", hidden_size=64, head_dim=16)
    quantize(folder, mode=mode, dtype=dtype)
    ours = policy(folder, lora_rank=2, lora_kind=kind, learning_rate=3e-3)
    packed = ours.scorer.lm.layers[0].self_attn.q_proj.linear
    assert packed.mode == mode and "uint" in str(packed.weight.dtype)
    ours.export(tmp_path / "before")
    start = ours.logprobs(OF)
    for _ in range(2):
        ours.update(OF, coefficients_of(OF))
    ours.export(tmp_path / "out")
    assert np.abs(ours.logprobs(OF) - start).max() > 1e-3
    np.testing.assert_allclose(policy(tmp_path / "out").logprobs(OF), ours.logprobs(OF), rtol=0, atol=1e-4)
    name = "model.layers.0.self_attn.q_proj.weight"
    before, after = (load_file(tmp_path / which / "model.safetensors")[name] for which in ("before", "out"))
    changed = np.abs(after - before)
    assert 0 < changed.max() < 0.05 and (changed > 0).mean() > 0.95  # in bfloat16 many of them round to nothing
