"""What MLX loads: RoPE wherever it stands, quantized folders, adapters; and what is refused, by name."""

import json
import logging
import shutil

import numpy as np
import pytest
import tiny_models
from batches import batch, coefficients_of
from mlx_policies import parameters, policy, quantize
from places import ROOT
from required import require

require(subject="mlx")

import mlx.core as mx
import mlx.nn as nn
from gvpo_mlx import memory, rope

from gvpo_core.training.config import ConfigError

OF = batch((3, 2))
ROPE = {"rope_type": "default", "rope_theta": 700.0}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_models.write_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, llama):
    """The same model as mlx-lm's own converter quantizes it."""
    return quantize(tiny_models.write_model("llama", tmp_path_factory.mktemp("wide"), hidden_size=64, head_dim=16))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_rope_is_read_wherever_it_stands(family: str, tmp_path) -> None:
    folder = tiny_models.write_model(family, tmp_path / "model", rope_parameters=ROPE)
    nested = policy(folder).logprobs(OF)
    top = tiny_models.changed(folder, tmp_path, rope_parameters=None, rope_theta=700.0)
    np.testing.assert_array_equal(policy(top).logprobs(OF), nested)
    shutil.rmtree(top)
    other = tiny_models.changed(folder, tmp_path, rope_parameters=ROPE | {"rope_theta": 9000.0})
    assert np.abs(policy(other).logprobs(OF) - nested).max() > 0.01


def test_a_quantized_folder_only_scores_without_adapters(quantized) -> None:
    """As a teacher is loaded: with updates = 0 it needs no adapters, and its base is held as in the folder."""
    scorer, adapted = policy(quantized, updates=0), policy(quantized, lora_rank=2)
    np.testing.assert_allclose(scorer.logprobs(OF), adapted.logprobs(OF), rtol=0, atol=1e-5)
    facts = scorer.describe()
    assert facts.trainable_parameters == 0 and facts.memory.frozen == memory.held(scorer.scorer.lm)
    assert facts.memory.frozen < 3 * facts.parameters  # the embedding and head of this model are a part of it
    with pytest.raises(ConfigError, match="is quantized, and its quantized weights cannot be trained"):
        policy(quantized)


def test_mlx_lm_alone_ignores_it(llama) -> None:
    """The trap that rope.py is for: it goes when mlx-lm reads `rope_parameters` everywhere."""
    from mlx_lm.utils import load_model

    lm, _ = load_model(llama)
    assert lm.layers[0].self_attn.rope.base == 10000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}, "'longrope'"),
        ({"rope_type": "dynamic", "factor": 2.0}, "'dynamic'"),
        ({"rope_type": "spiral"}, "'spiral'"),
        ({"rope_type": "yarn", "factor": 2.0, "stretched": False}, "stretched = False"),
    ],
)
def test_rope_that_mlx_lm_computes_otherwise_is_refused(settings, message) -> None:
    known = dict.fromkeys(("rope_theta", "rope_scaling"))
    config = {"model_type": "llama", "rope_parameters": {"rope_theta": 700.0} | settings}
    with pytest.raises(ConfigError, match=message):
        rope.settings_for(known, config)


def test_zeros_of_yarn_are_what_transformers_takes_for_them() -> None:
    """Its defaults for a beta of 0, and for both of mscale where one is 0 or missing; mlx-lm computes with each."""
    known = dict.fromkeys(("rope_theta", "rope_scaling"))
    yarn = {"rope_type": "yarn", "rope_theta": 700.0, "factor": 2.0, "original_max_position_embeddings": 32}
    odd = {"truncate": True, "attention_factor": None, "beta_fast": 0, "mscale": 0.5, "mscale_all_dim": 0}
    given = rope.settings_for(known, {"model_type": "llama", "rope_parameters": yarn | odd})["rope_scaling"]
    assert not {"beta_fast", "mscale", "mscale_all_dim"} & given.keys() and given["factor"] == 2.0
    both = {"mscale": 0.5, "mscale_all_dim": 0.7}
    given = rope.settings_for(known, {"model_type": "llama", "rope_parameters": yarn | both})["rope_scaling"]
    assert (given["mscale"], given["mscale_all_dim"]) == (0.5, 0.7)


def test_rope_that_a_model_of_mlx_lm_cannot_be_given_is_refused() -> None:
    config = {"model_type": "strange", "rope_parameters": ROPE}
    with pytest.raises(ConfigError, match=r"strange takes no rope_theta.*700"):
        rope.settings_for({}, config)
    by_layer = {"model_type": "strange", "rope_parameters": {"full_attention": ROPE, "chunked_attention": ROPE}}
    with pytest.raises(ConfigError, match="by kind of layer"):
        rope.settings_for({"rope_theta": None}, by_layer)
    assert rope.settings_for({"rope_parameters": None}, by_layer) == {}
    lm = nn.Module()
    lm.rope = nn.RoPE(8, base=10000.0)
    with pytest.raises(ConfigError, match=r"base 10000\.0 for strange"):
        rope.check(lm, {"rope_theta": 700.0}, config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "strange"}, "type 'strange', which mlx-lm does not have"),
        ({"model_type": None}, "no model_type"),
        (
            {"num_hidden_layers": 3},
            "lacks 9 weights of mlx-lm's llama, the first model.layers.2",
        ),
    ],
)
def test_what_is_not_a_model_of_mlx_lm_is_named(settings, message, llama, tmp_path) -> None:
    with pytest.raises(ConfigError, match=message):
        policy(tiny_models.changed(llama, tmp_path, **settings))


def test_no_weights_and_no_such_layout(llama, tmp_path) -> None:
    folder = tiny_models.changed(llama, tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"has no model\.safetensors and no model\.safetensors\.index\.json"):
        policy(folder)
    with pytest.raises(ConfigError, match="sharding is 'fsdp'"):
        policy(llama, sharding="fsdp")


def test_a_quantized_model_is_not_trained_in_full(quantized) -> None:
    with pytest.raises(ConfigError, match=r"is quantized.*set model.lora_rank"):
        policy(quantized)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_on_a_quantized_model(kind: str, quantized, tmp_path) -> None:
    made = policy(quantized, lora_rank=4, lora_kind=kind, learning_rate=0.05)
    packed = {n: np.array(m.weight) for n, m in made.scorer.lm.named_modules() if "scales" in m}
    assert packed and all(w.dtype == np.uint32 for w in packed.values())
    assert made.describe().parameters > 2 * sum(w.size for w in packed.values())
    first = made.logprobs(OF)
    np.testing.assert_allclose(made.logprobs(OF, reference=True), first, rtol=0, atol=1e-4)
    signs = np.where(np.arange(len(OF)) % 2, 1.0, -1.0)
    for _ in range(4):
        made.update(OF, lambda logprobs, rows: signs[rows])
    assert ((made.logprobs(OF) - first) * signs).mean() > 0.1
    np.testing.assert_array_equal(made.logprobs(OF, reference=True), policy(quantized, lora_rank=4).logprobs(OF))
    for name, module in made.scorer.lm.named_modules():
        if name in packed:
            np.testing.assert_array_equal(np.array(module.weight), packed[name])
    made.export(tmp_path / "out")  # unpacked: as exact as the trained one, and read by transformers
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization" not in config and config["rope_theta"] == 700.0
    np.testing.assert_allclose(policy(tmp_path / "out").logprobs(OF), made.logprobs(OF), rtol=0, atol=1e-3)


def test_targets_of_adapters(llama) -> None:
    made = policy(llama, lora_rank=2, lora_targets=("q_proj", "mlp.up_proj"))
    assert {name.split(".", 3)[3] for name in parameters(made)} == {
        f"{layer}.lora_{which}" for layer in ("self_attn.q_proj", "mlp.up_proj") for which in "ab"
    }
    with pytest.raises(ConfigError, match=r"'lm_head', which is not a linear layer of .*; it has mlp.down"):
        policy(llama, lora_rank=2, lora_targets=("lm_head",))


def test_the_log_says_what_runs_where(llama, caplog) -> None:
    with caplog.at_level(logging.INFO, "gvpo.mlx"):
        made = policy(llama, reference=True)
    assert "MLX runs on Device(cpu, 0)" in caplog.text and "packed rows" in caplog.text
    facts = made.describe()
    assert facts.device == "cpu" and facts.parameters == facts.trainable_parameters > 0
    assert facts.versions["mlx-lm"]


def test_factors_that_do_not_arrive_are_noticed(llama, monkeypatch) -> None:
    """strategy = "group" writes them into MLX's memory: where that were a copy, the step would be zero."""
    from types import SimpleNamespace

    from gvpo_mlx import update

    made = policy(llama)
    copying = SimpleNamespace(**(vars(np) | {"array": lambda a, copy=True: np.asarray(a).copy()}))
    monkeypatch.setattr(update, "np", copying)
    with pytest.raises(RuntimeError, match=r'shares? an array.*strategy = "score"'):
        made.update(OF, coefficients_of(OF))


def test_the_wired_limit_is_raised_on_metal_alone(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(mx, "set_wired_limit", calls.append)
    memory.allow_wired(mx.Device(mx.cpu, 0))
    assert not calls
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda device: {"max_recommended_working_set_size": 7.0})
    memory.allow_wired(mx.Device(mx.gpu, 0))
    assert calls == [7]


def test_the_laptop_config_is_one() -> None:
    from gvpo_core.training.config.check import check_config
    from gvpo_core.training.config.file import read_config

    config = read_config(ROOT / "examples" / "mlx_laptop.toml")
    check_config(config)
    assert config.run.backend == "mlx" and config.model.lora_rank and "4bit" in config.model.path
