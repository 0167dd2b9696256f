"""Settings of sliding windows that contradict each other: every backend refuses them, or reads transformers' model."""

import pytest
import tiny_models

from gvpo_core.training.config import ConfigError

SLIDING = ["sliding_attention", "full_attention"]
NO_WINDOW = {
    "null": {"use_sliding_window": True, "sliding_window": None, "layer_types": SLIDING},
    "switched off": {"use_sliding_window": False, "sliding_window": 6, "layer_types": SLIDING},
}


@pytest.mark.parametrize("why", NO_WINDOW)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_sliding_layers_without_a_window_are_refused(family, why, backend, tmp_path):
    """transformers scores no such model; gvpo_jax and gvpo_mlx computed full attention."""
    model = tiny_models.write_model(family, tmp_path / "model")
    backend.policies.policy(model)
    own = {name: value for name, value in NO_WINDOW[why].items() if value is not None}
    folder = tiny_models.changed(model, tmp_path, **own)
    if why == "null":
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_text(text.replace("{", '{"sliding_window": null, ', 1))
    with pytest.raises(ConfigError) as raised:
        backend.policies.policy(folder)
    said = str(raised.value)
    assert "\n" not in said and "sliding_window" in said
    if backend.name != "torch":
        assert "layers of sliding_attention" in said and "give the window, or layer_types" in said


@pytest.mark.parametrize("window", [0, -2])
def test_a_window_below_one_is_refused_by_name(window, backend, tmp_path):
    folder = tiny_models.write_model("mistral", tmp_path / "model", sliding_window=6)
    folder = tiny_models.changed(folder, tmp_path, sliding_window=window)
    with pytest.raises(ConfigError) as raised:
        backend.policies.policy(folder)
    if backend.name != "torch":
        assert f"sliding_window of mistral is {window}; expected at least 1" in str(raised.value)


def test_a_model_that_transformers_takes_for_another_is_that_one(backend, tmp_path):
    """Mistral's settings with layer_types are Ministral's there, whose windows are in some layers."""
    folder = tiny_models.write_model("mistral", tmp_path / "model", sliding_window=6)
    folder = tiny_models.changed(folder, tmp_path, layer_types=SLIDING)
    if backend.name == "torch":
        assert backend.policies.policy(folder).describe().architecture == "MinistralForCausalLM"
        return
    with pytest.raises(ConfigError, match="ministral"):
        backend.policies.policy(folder)
