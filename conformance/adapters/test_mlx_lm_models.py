"""Models for mlx-lm: RoPE is the folder's, and the host's version is one that was tried."""

import contextlib
import json
import os

import pytest
import tiny_models
from required import require

if (asked := os.environ.get("GVPO_SUBJECTS")) and "mlx_lm" not in asked.split(","):
    pytest.skip("GVPO_SUBJECTS does not name mlx_lm: nox -s 'conformance(mlx)' runs these", allow_module_level=True)
require("mlx_lm", "mlx.core", subject="mlx_lm")

import gvpo_mlx_lm
import mlx.core as mx
import mlx_lm
import numpy as np
from gvpo_mlx_lm import ModelError, check_model, check_rope, load
from mlx_lm.tuner.utils import linear_to_lora_layers


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


BEYOND = {
    "longrope": (
        "llama",
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 700.0}},
        "'longrope' of llama is not computed by mlx-lm as transformers does",
    ),
    "dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 700.0, "factor": 2.0}},
        "'dynamic' of llama is not computed by mlx-lm as transformers does",
    ),
    "another activation": ("llama", {"hidden_act": "gelu"}, "the activation of llama is 'gelu' by config.json"),
}


@pytest.mark.parametrize("name", BEYOND)
def test_a_setting_that_mlx_lm_reads_otherwise_is_rejected_by_name(name, tmp_path):
    family, settings, message = BEYOND[name]
    folder = tiny_models.write_model(family, tmp_path / "model")
    plain, _ = mlx_lm.load(str(folder))
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        load(folder)
    with pytest.raises(ModelError, match=message):
        check_model(plain, folder)


def test_yarn_without_truncation_is_computed_as_the_folder_says(tmp_path):
    """mlx-lm drops `truncate = false`: transformers' logits differ from its by up to 8 in this model."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16}
    rope |= {"truncate": False, "beta_fast": 4.0, "beta_slow": 1.0}
    folder = tiny_models.write_model("llama", tmp_path / "model", head_dim=32, rope_parameters=rope)
    plain, _ = mlx_lm.load(str(folder))
    model, _ = load(folder)
    ids = mx.array([list(range(1, 60))])
    assert float(mx.abs(model(ids) - plain(ids)).max()) > 1
    check_model(model, folder)
    with pytest.raises(ModelError, match="RoPE"):
        check_model(plain, folder)


def test_rows_beyond_a_window_score_as_with_the_window(tmp_path):
    """mlx-lm leaves Mistral's window out: by hand, a token sees the `window` tokens up to itself in each layer."""
    folder = tiny_models.write_model("mistral", tmp_path / "model", sliding_window=4)
    ids = mx.array([list(range(1, 25))])
    model, _ = load(folder)
    plain, _ = mlx_lm.load(str(folder), model_config={"rope_theta": model.layers[0].self_attn.rope.base})
    whole, windowed = plain(ids), model(ids)
    assert float(mx.abs(whole - windowed).max()) > 0.1, "the window counts"
    np.testing.assert_allclose(np.array(whole[:, :4]), np.array(windowed[:, :4]), atol=1e-4)
    layers = len(model.layers)
    reach = layers * (4 - 1)  # tokens before the last that can reach it through all layers
    changed = mx.array([[90] * (24 - reach - 1) + list(range(24 - reach, 25))])
    np.testing.assert_allclose(np.array(model(changed)[:, -1]), np.array(windowed[:, -1]), atol=1e-4)
    with pytest.raises(ModelError, match=r"window.*load it with gvpo_mlx_lm\.load"):
        check_model(plain, folder)
    assert check_model(model, folder) is None


def test_a_model_with_adapters_is_compared_without_them(tmp_path):
    folder = tiny_models.write_model("llama", tmp_path / "model")
    model, _ = load(folder)
    model.freeze()
    linear_to_lora_layers(model, 2, {"rank": 3, "scale": 2.0, "dropout": 0.0})
    assert check_model(model, folder) is None
    model.layers[1].self_attn.scale *= 2
    with pytest.raises(
        ModelError, match=r"model\.layers\.1\.self_attn has scale .*, and .*config\.json asks for scale"
    ):
        check_model(model, folder)


@pytest.mark.parametrize("found", ["0.31.9", "0.33.0"])
def test_other_versions_are_refused(found):
    with pytest.raises(ImportError, match=f"mlx-lm {found} is installed; gvpo_mlx_lm was tried with >=0.32.0,<0.33"):
        gvpo_mlx_lm.HOST.check(found)


@pytest.mark.parametrize("wrong", ["no folder", "no config", "another model's"])
def test_adapters_that_do_not_fit_are_named(wrong, tmp_path):
    folder, adapters = tiny_models.write_model("llama", tmp_path / "model"), tmp_path / "adapters"
    if wrong != "no folder":
        adapters.mkdir()
    if wrong == "another model's":
        settings = {"num_layers": 2, "lora_parameters": {"rank": 2, "scale": 1.0, "dropout": 0.0}}
        (adapters / "adapter_config.json").write_text(json.dumps(settings))
        mx.save_safetensors(str(adapters / "adapters.safetensors"), {"model.layers.7.lora_a": mx.zeros((2, 2))})
    with pytest.raises(ModelError, match=r"adapter_path = '.*adapters' does not fit '.*model': "):
        load(folder, adapter_path=str(adapters))
