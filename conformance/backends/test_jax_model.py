"""What gvpo_jax refuses to load, in one line that names it."""

import json

import numpy as np
import pytest
import tiny_models
from batches import batch
from jax_policies import policy
from required import require

require(subject="jax")

from gvpo_jax import programs
from gvpo_jax.families import read_spec
from safetensors.numpy import load_file, save_file

from gvpo_core.training.config import ConfigError

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rope_theta": 700.0,
}


def test_rope_theta_is_read_from_both_places() -> None:
    for given in ({}, {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 700.0}}):
        spec = read_spec(CONFIG | given)
        np.testing.assert_allclose(spec.ropes[0].frequencies, 700.0 ** (-np.arange(4) / 4), rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel"),
        (
            {"model_type": "mamba", "architectures": None},
            r"model_type mamba\); it knows LlamaForCausalLM.*docs/models.md",
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architecture LlamaForSequenceClassification"),
        (
            {"rope_scaling": {"rope_type": "odd", "factor": 4.0}},
            "rope_type 'odd'; it knows default, linear, llama3, yarn",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}},
            "rope_type llama3 are missing or invalid: 'low_freq_factor'",
        ),
        ({"layer_types": ["linear_attention", "full_attention"]}, "has layers of type linear_attention"),
        ({"attn_logit_softcapping": 50.0}, "has attn_logit_softcapping, which transformers ignores"),
        ({"rope_theta": None}, "has no rope_theta"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 1.0}}, r"\[1.0, 700.0\] rope_theta"),
        ({"hidden_act": "relu2"}, "hidden_act of LlamaForCausalLM is 'relu2'"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised \(gptq\), which gvpo_jax does not read"),
        ({"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_what_is_not_known_is_refused_by_name(change, message) -> None:
    with pytest.raises(ConfigError, match=message):
        read_spec(CONFIG | change)


def test_windows() -> None:
    mistral = CONFIG | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 7}
    assert read_spec(mistral).windows == (7, 7)
    qwen = CONFIG | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "sliding_window": 7}
    far = read_spec(qwen).windows[0]
    assert far > 10**8
    assert read_spec(qwen | {"use_sliding_window": True, "max_window_layers": 1}).windows == (far, 7)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "lacks 1 weights, the first model.layers.1.mlp.up_proj"),
        (lambda t: t.update({"model.odd.weight": np.zeros(3, np.float32)}), "unknown .* the first model.odd.weight"),
        (lambda t: t.update({"model.norm.weight": np.ones(31, np.float32)}), r"has shape \(31,\); config.json says"),
        (
            lambda t: t.update({"model.norm.weight": np.ones(32, np.int8)}),
            "is I8, and so are 1 weights in all; expected one of",
        ),
    ],
)
def test_files_that_do_not_fit(damage, message, tmp_path) -> None:
    folder = tiny_models.write_model("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=message):
        policy(folder)


def test_files_that_are_cut_or_missing(tmp_path) -> None:
    folder = tiny_models.write_model("llama", tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="cannot be read as safetensors: ValueError: the file ends inside"):
        policy(folder)
    path.unlink()
    with pytest.raises(ConfigError, match=r"has no model.safetensors and no"):
        policy(folder)


def test_a_second_file_of_weights_is_not_read(tmp_path) -> None:
    folder = tiny_models.write_model("llama", tmp_path)
    of = batch((2,))
    wanted = policy(folder).logprobs(of)
    tensors = load_file(folder / "model.safetensors")
    for name in ("model_old.safetensors", "old.safetensors"):
        save_file({n: a + 1 for n, a in tensors.items()}, folder / name, metadata={"format": "pt"})
    np.testing.assert_array_equal(policy(folder).logprobs(of), wanted)


def test_a_sampler_that_differs_from_the_forward_pass_is_refused(tmp_path, monkeypatch) -> None:
    from gvpo_jax import generate

    plain = generate.generate

    def off(*arguments, **options):
        responses, sums = plain(*arguments, **options)
        return responses, [[value + 0.1 for value in row] for row in sums]

    folder = tiny_models.write_model("llama", tmp_path)
    policy(folder)
    monkeypatch.setattr(generate, "generate", off)
    with pytest.raises(ConfigError, match="the sampler of LlamaForCausalLM differs from its forward pass by up to 0"):
        policy(folder)


def test_adapters_that_match_nothing(tmp_path) -> None:
    folder = tiny_models.write_model("llama", tmp_path)
    with pytest.raises(ConfigError, match="'wqkv', which match no linear layer: use all-linear or some of down_proj, "):
        policy(folder, lora_rank=2, lora_targets=("q_proj", "wqkv"))
    of_policy = policy(folder, lora_rank=2, lora_targets=("q_proj", "mlp.up_proj"))
    assert {name.split(".")[-2] for name in of_policy.learner.adapters} == {"q_proj", "up_proj"}


def test_settings_of_other_backends_are_refused(tmp_path) -> None:
    folder = tiny_models.write_model("llama", tmp_path)
    with pytest.raises(ConfigError, match="lora_kind is 'dora', a setting of torch and mlx that jax does not have"):
        policy(folder, lora_rank=2, lora_kind="dora")
    with pytest.raises(
        ConfigError, match=r"sharding is 'fsdp', a setting of torch that jax does not have: .*model\.mesh_fsdp"
    ):
        policy(folder, sharding="fsdp")


def test_a_layout_that_is_not_exact(tmp_path) -> None:
    folder = tiny_models.write_model("mistral", tmp_path, sliding_window=6)
    with pytest.raises(
        ConfigError, match="layout is packed, which is not exact for MistralForCausalLM: sliding_window"
    ):
        policy(folder, layout="packed")


def test_a_checkpoint_of_another_kind_of_training(tmp_path) -> None:
    folder = tiny_models.write_model("llama", tmp_path / "model")
    (tmp_path / "state").mkdir()
    policy(folder).save(tmp_path / "state")
    with pytest.raises(ConfigError, match="has lora_rank = 0; this run has 2"):
        policy(folder, lora_rank=2).restore(tmp_path / "state")
    with pytest.raises(ConfigError, match=r"has no state.json"):
        policy(folder).restore(tmp_path)
    state = json.loads((tmp_path / "state" / "state.json").read_text())
    (tmp_path / "state" / "state.json").write_text(json.dumps(state | {"format": 99}))
    with pytest.raises(ConfigError, match="has format 99"):
        policy(folder).restore(tmp_path / "state")


def test_out_of_memory_says_what_to_lower(tmp_path, monkeypatch) -> None:
    import jax

    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.\nmore")

    of, of_policy = batch((3, 3)), policy(tiny_models.write_model("llama", tmp_path))
    of_policy.logprobs(of)
    monkeypatch.setattr(of_policy.programs, "used", dict.fromkeys(of_policy.programs.used, full))
    with pytest.raises(programs.OutOfMemoryError, match=r"lower optimizer.micro_batch_tokens.*allocating 123 bytes"):
        of_policy.logprobs(of)


def test_the_checks_at_load_take_one_program_to_score(tmp_path, monkeypatch) -> None:
    """A program takes most of a tiny model's time to load."""
    compiled, plain = [], programs.compile_program
    monkeypatch.setattr(programs, "_kept", {})
    monkeypatch.setattr(
        programs,
        "compile_program",
        lambda function, *given, **options: compiled.append(function.__name__) or plain(function, *given, **options),
    )
    assert policy(tiny_models.write_model("llama", tmp_path)).packed
    assert sorted(compiled) == ["decode", "prefill", "score_rows"]
