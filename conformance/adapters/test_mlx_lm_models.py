"""Models for mlx-lm: RoPE is the folder's, and the host's version is one that was tried."""

import contextlib
import json
import os

import pytest
import tiny_models
from required import require

if (asked := os.environ.get("GVPO_SUBJECTS")) and "mlx_lm" not in asked.split(","):
    pytest.skip("nox -s mlx_lm runs these", allow_module_level=True)  # mlx-lm is in the MLX backend's environment too
require("mlx_lm", "mlx.core", subject="mlx_lm")

import gvpo_mlx_lm
import mlx.core as mx
import mlx_lm
from gvpo_mlx_lm import ModelError, check_rope, load
from gvpo_mlx_lm.models import mended


@pytest.mark.parametrize("name", ["llama", "llama3", "mistral", "qwen2", "qwen3"])
def test_rope_is_the_folders(name, tmp_path):
    """As transformers 5 saves it, in rope_parameters: mlx_lm.load takes another theta for some, which is refused."""
    theta = {"llama3": 500000.0}.get(name, 700.0)
    parameters = tiny_models.DECODERS[name].get("rope_parameters", {"rope_type": "default"}) | {"rope_theta": theta}
    folder = tiny_models.write_model(name, tmp_path / "model", rope_parameters=parameters)
    assert "rope_theta" not in json.loads((folder / "config.json").read_text())
    model, _ = load(folder)
    check_rope(model, folder)
    plain, _ = mlx_lm.load(str(folder))
    reads_it = name == "qwen3"
    with contextlib.nullcontext() if reads_it else pytest.raises(ModelError, match=r"load it with gvpo_mlx_lm\.load"):
        check_rope(plain, folder)
    if name != "llama3":
        assert model.layers[0].self_attn.rope.base == theta
    ids = mx.array([list(range(1, 60))])
    assert reads_it == (float(mx.abs(model(ids) - plain(ids)).max()) < 1e-6)


def test_a_top_level_theta_is_enough(tmp_path):
    folder = tiny_models.write_model("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"rope_theta": 700}
    (folder / "config.json").write_text(json.dumps(config))
    check_rope(mlx_lm.load(str(folder))[0], folder)


def test_rope_that_mlx_lm_cannot_do_is_refused(tmp_path):
    config = {"rope_type": "yarn", "rope_theta": 700.0, "factor": 2.0}
    with pytest.raises(ModelError, match="phi has no RoPE scaling"):
        mended({"model_type": "phi", "rope_parameters": config})
    with pytest.raises(ModelError, match="rope_type 'longrope': mlx-lm takes the long factors"):
        mended({"model_type": "phi3", "rope_scaling": {"type": "longrope"}})
    with pytest.raises(ModelError, match="qwen2 names no rope_theta"):
        mended({"model_type": "qwen2"})
    assert mended({"model_type": "gpt2"}) == {}
    with pytest.raises(ModelError, match="by layer type, full_attention"):
        mended({"model_type": "llama", "rope_parameters": {"full_attention": config}})


@pytest.mark.parametrize("found", ["0.31.9", "0.33.0"])
def test_other_versions_are_refused(found):
    with pytest.raises(ImportError, match=f"mlx-lm {found} is installed; gvpo_mlx_lm was tried with >=0.32.0,<0.33"):
        gvpo_mlx_lm.HOST.check(found)
