"""Settings of config.json that mlx-lm's models drop: made right, or refused by name, and never computed otherwise."""

import json
import shutil

import mlx_policies
import numpy as np
import pytest
import tiny_models
from batches import batch
from required import require

require(subject="mlx")

from gvpo_mlx import rope, settings
from gvpo_mlx.read import arguments as _arguments
from mlx_policies import policy
from safetensors.numpy import load_file, save_file

from gvpo_core.training.config import ConfigError

OF = batch((2,), longest=4)
FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_models.write_model("llama", tmp_path_factory.mktemp("llama"))


def built(kind: str, **given):
    """A model of mlx-lm with random weights, by its own arguments."""
    import importlib

    from transformers import AutoConfig

    module = importlib.import_module(f"mlx_lm.models.{kind}")
    config = AutoConfig.for_model(**(tiny_models.SMALL | {"model_type": kind} | given)).to_dict()
    config |= {"rope_theta": 10000.0}
    return module.Model(module.ModelArgs.from_dict(config | given))


@pytest.mark.parametrize("activation", ["gelu", "relu", "gelu_pytorch_tanh", "tanh"])
def test_another_activation_is_refused(activation: str, llama, tmp_path) -> None:
    with pytest.raises(ConfigError, match=f"activation of llama is '{activation}' by .* and computes silu"):
        policy(tiny_models.changed(llama, tmp_path, hidden_act=activation))


def test_silu_by_another_name_or_by_none(llama, tmp_path) -> None:
    right = policy(llama).logprobs(OF)
    for name in ("swish", None):
        folder = tiny_models.changed(llama, tmp_path, hidden_act=name)
        np.testing.assert_array_equal(policy(folder).logprobs(OF), right)
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("kind", "given", "applied"),
    [
        ("qwen2", {}, "silu"),
        ("phi3", {}, "silu"),
        ("qwen3_moe", {"head_dim": 8, **tiny_models.EXPERTS}, "silu"),
        ("gemma3_text", {"head_dim": 8}, "gelu_pytorch_tanh"),
        ("gpt2", {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64, "n_ctx": 64}, "gelu_pytorch_tanh"),
        ("starcoder2", {}, "gelu"),
        ("nemotron", {"norm_eps": 1e-5, "partial_rotary_factor": 0.5}, "relu2"),
    ],
)
def test_what_a_model_applies_is_found_by_calling_it(kind, given, applied) -> None:
    lm = built(kind, **given)
    before = {name: id(module) for name, module in lm.named_modules()}
    name = {"gpt2": "activation_function", "gemma3_text": "hidden_activation"}.get(kind, "hidden_act")
    settings.check_activation(lm, {"model_type": kind, name: applied})
    with pytest.raises(ConfigError, match=f"{kind} is 'quick_gelu' by .* computes {applied}"):
        settings.check_activation(lm, {"model_type": kind, name: "quick_gelu"})
    assert {name: id(module) for name, module in lm.named_modules()} == before


def test_a_tanh_gelu_is_not_an_exact_one() -> None:
    """2e-3 nat on tiny models: transformers' default for StarCoder 2 is what mlx-lm does not compute."""
    with pytest.raises(ConfigError, match=r"is 'gelu_pytorch_tanh' by .* computes gelu:"):
        settings.check_activation(built("starcoder2"), {"model_type": "starcoder2"})


@pytest.mark.parametrize(
    ("kind", "name", "value", "default"),
    [
        ("olmoe", "clip_qkv", 3.0, "None"),
        ("gemma3_text", "attn_logit_softcapping", 20.0, "None"),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True, "False"),
        ("qwen2_moe", "norm_topk_prob", True, "False"),
        ("mamba", "layer_norm_epsilon", 1e-3, "1e-05"),
        ("qwen3", "attention_bias", True, "False"),
    ],
)
def test_a_setting_that_is_not_read_is_refused(kind, name, value, default) -> None:
    known = _arguments(kind, path="model")
    with pytest.raises(ConfigError, match=f"has {name} = {value}, which mlx-lm's {kind} does not read: .* {default}"):
        settings.check_dropped({"model_type": kind, name: value}, known)
    harmless = {"attention_dropout": 0.3, "initializer_range": 1.0, "use_cache": False, "made_up": 3, "eos_token_id": 7}
    settings.check_dropped({"model_type": kind, **harmless}, known)


def test_sizes_and_infinite_numbers_are_not_settings() -> None:
    """As transformers saves mamba2 and Mixtral: what it derives from other settings stands in the file too."""
    text = json.dumps({"model_type": "mamba2", "time_step_limit": [0.0, {"__float__": "Infinity"}], "chunk_size": 8})
    written = json.loads(text, object_hook=settings.special_floats)
    assert written["time_step_limit"] == [0.0, float("inf")]
    settings.check_dropped(written, _arguments("mamba2", path="model"))
    with pytest.raises(ConfigError, match="time_step_limit"):
        settings.check_dropped(written | {"time_step_limit": [0.1, 0.2]}, {})
    mixtral = {"model_type": "mixtral", "hidden_size": 64, "num_attention_heads": 4, "head_dim": 16}
    settings.check_dropped(mixtral, _arguments("mixtral", path="model"))


@pytest.mark.parametrize("name", sorted(tiny_models.FULL_ATTENTION | tiny_models.OTHERS))
def test_what_transformers_saves_is_taken(name: str, tmp_path) -> None:
    """A whole config.json, with every default in it, asks for nothing that is not read."""
    from transformers import AutoConfig

    own = (tiny_models.FULL_ATTENTION | tiny_models.OTHERS)[name]
    config = AutoConfig.for_model(**(tiny_models.SMALL | {"model_type": name} | own))
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    settings.check_dropped(written, _arguments(config.model_type, path="model"))


def gemma(every: int | None = None, kinds=None):
    layers = kinds or [FULL if (i + 1) % every == 0 else SLIDING for i in range(4)]
    return {"model_type": "gemma3_text", "layer_types": layers, "sliding_window": 8, "num_hidden_layers": len(layers)}


KNOWN = dict.fromkeys(("rope_theta", "rope_local_base_freq", "sliding_window_pattern"))
BY_LAYER = {
    FULL: {"rope_type": "default", "rope_theta": 700.0},
    SLIDING: {"rope_type": "default", "rope_theta": 30.0},
}


@pytest.mark.parametrize("every", [1, 2, 4])
def test_the_pattern_of_layers_is_handed_on(every: int) -> None:
    config = gemma(every) | {"rope_parameters": BY_LAYER}
    given = settings.pattern_of_layers(KNOWN, config)
    assert given == {"sliding_window_pattern": every}
    bases = rope.settings_for(KNOWN, config)
    lm = built("gemma3_text", **config | {"head_dim": 8} | given | bases)
    rope.check(lm, bases, config)
    assert settings.ignored_window(lm, config, "gemma3") is None
    wanted = [700.0 if kind == FULL else 30.0 for kind in config["layer_types"]]
    assert [layer.self_attn.rope.base for layer in lm.layers] == wanted
    usual = built("gemma3_text", **config | {"head_dim": 8} | bases)  # every sixth: what mlx-lm takes by itself
    with pytest.raises(
        ConfigError, match=r"base 30\.0 for gemma3_text; the model asks for default RoPE with theta 700"
    ):
        rope.check(usual, bases, config)
    with pytest.raises(ConfigError, match="has its window in layers 0, 1, 2, 3, and layer_types has it in"):
        settings.ignored_window(usual, config | {"layer_types": [SLIDING, FULL, SLIDING, SLIDING]}, "gemma3")


@pytest.mark.parametrize("kinds", [[FULL, SLIDING], [SLIDING, SLIDING], [SLIDING, FULL, FULL, SLIDING]])
def test_a_pattern_that_mlx_lm_does_not_know_is_refused(kinds) -> None:
    with pytest.raises(ConfigError, match="supports only patterns whose every n-th layer is full_attention"):
        settings.pattern_of_layers(KNOWN, gemma(kinds=kinds))


def test_other_words_for_a_pattern() -> None:
    config = {"model_type": "exaone4", "layer_types": [FULL, SLIDING, FULL]}
    assert settings.pattern_of_layers(KNOWN, config) == {"sliding_window_pattern": "GLG"}
    assert settings.pattern_of_layers({**KNOWN, "layer_types": None}, config) == {}
    assert settings.pattern_of_layers({}, gemma(2)) == {}


def test_a_head_beside_a_tied_one_is_compared(tmp_path) -> None:
    folder = tiny_models.write_model("llama-tied", tmp_path / "model")
    right = policy(folder).logprobs(OF)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    np.testing.assert_array_equal(policy(folder).logprobs(OF), right)
    tensors["lm_head.weight"][3, 1] += 0.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"also has a different lm_head\.weight.* tie_word_embeddings = false"):
        policy(folder)
    untied = policy(tiny_models.changed(folder, tmp_path, tie_word_embeddings=False))
    assert np.abs(untied.logprobs(OF) - right).max() > 1e-3
    np.testing.assert_array_equal(mlx_policies.parameters(untied)["lm_head.weight"], tensors["lm_head.weight"])


@pytest.mark.parametrize(("experts", "normalised"), [(1, True), (1, False), (2, True)])
def test_one_expert_whose_weight_is_not_normalised_is_refused(experts, normalised) -> None:
    """Found by a comparison with PyTorch alone before: 0.2 nat in GLM-4.5, 1.0 in DeepSeek-V3."""
    from mlx_lm.models import deepseek_v3, llama

    config = {"model_type": "deepseek_v3", "num_experts_per_tok": experts, "norm_topk_prob": normalised}
    settings.check_experts(llama.Model.__new__(llama.Model), config)
    model = deepseek_v3.Model.__new__(deepseek_v3.Model)
    if experts == 1 and normalised:
        with pytest.raises(ConfigError, match=r"num_experts_per_tok = 1 and norm_topk_prob, and mlx-lm's deepseek_v3"):
            settings.check_experts(model, config)
    else:
        settings.check_experts(model, config)


@pytest.mark.parametrize(("at_top", "given"), [(None, 0.5), (0.25, 0.5), (1.0, 0.5), (0.5, None)])
def test_the_partial_factor_of_rope_is_taken_before_one_at_the_top(at_top, given) -> None:
    """As transformers takes it; mlx-lm read the other one, which only a comparison with PyTorch could find."""
    rotary = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    config = {"model_type": "phi3", "rope_parameters": rotary, "partial_rotary_factor": at_top}
    known = {"rope_theta": None, "rope_scaling": None, "partial_rotary_factor": None}
    assert rope.settings_for(known, config).get("partial_rotary_factor") == given


def test_a_model_of_mlx_lm_that_exits(llama, tmp_path, capsys) -> None:
    """Its olmo calls exit() where ai2-olmo is missing."""
    with pytest.raises(
        ConfigError, match="of type 'olmo', which mlx-lm cannot load here: To run olmo install ai2-olmo"
    ):
        policy(tiny_models.changed(llama, tmp_path, model_type="olmo"))
    assert capsys.readouterr().out == ""


def test_an_export_names_the_end_tokens(llama, tmp_path) -> None:
    folder = tiny_models.changed(llama, tmp_path, eos_token_id=5)
    (folder / "generation_config.json").unlink()
    made = policy(folder)
    made.export(tmp_path / "out")
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert sorted(found["eos_token_id"]) == made._end == [0, 5]
    assert policy(tmp_path / "out")._end == [0, 5]
