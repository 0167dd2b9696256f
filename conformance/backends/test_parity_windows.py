"""Which layers have a sliding window: by transformers' reading of config.json, on every backend."""

import json
import shutil

import jax_policies
import mlx_policies
import numpy as np
import pytest
import tiny_models
import torch_policies
from batches import batch
from required import require

require("jax", "optax", "mlx.core", "mlx_lm", "torch", "transformers", subject="parity")

import torch
from transformers import AutoConfig, AutoModelForCausalLM

OF = batch((3,), longest=16)
SLIDING = ["sliding_attention", "full_attention"]
ROPE = {"no_rope_layers": [1, 0]}
READINGS = {
    # transformers takes SmolLM3's layer_types as they are, and makes them where the file has null.
    "smollm3-off": ("smollm3", ROPE, {"use_sliding_window": False, "sliding_window": 6, "layer_types": SLIDING}),
    "smollm3-null": ("smollm3", ROPE, {"use_sliding_window": True, "sliding_window": 6, "layer_types": None}),
    "qwen2-null": (
        "qwen2",
        {},
        {"use_sliding_window": True, "sliding_window": 6, "layer_types": None, "max_window_layers": 0},
    ),
}
BACKENDS = {"jax": jax_policies, "mlx": mlx_policies, "torch": torch_policies}


def transformers_own(folder) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    found = []
    with torch.inference_mode():
        for prompt, response in zip(OF.prompts, OF.responses, strict=True):
            logits = model(torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            found.append(float(logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()))
    return np.asarray(found)


@pytest.mark.slow_on("smollm3-null-jax")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", READINGS)
def test_the_layers_that_transformers_gives_a_window_have_it(name, backend, tmp_path):
    family, made, changes = READINGS[name]
    model = tiny_models.make_model(family, tmp_path / "model", **made)
    folder = shutil.copytree(model, tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    wanted = transformers_own(folder)
    if "sliding_attention" in AutoConfig.from_pretrained(folder).layer_types:  # and that is seen
        assert np.abs(wanted - transformers_own(model)).max() > 0.01
    np.testing.assert_allclose(BACKENDS[backend].policy(folder).logprobs(OF), wanted, rtol=0, atol=1e-3)
