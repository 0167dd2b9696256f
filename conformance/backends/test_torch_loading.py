"""What gvpo_torch reads from a model's files, and what it refuses because transformers would misread it in silence."""

import json
import shutil

import families
import numpy as np
import pytest
import tiny_models
from batches import batch, train
from required import require
from torch_policies import parameters, policy

require(subject="torch")

import torch
from gvpo_torch.weights import _dequantized, decoder_of
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from gvpo_core.training.config import ConfigError


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_models.make_model("llama", tmp_path_factory.mktemp("llama"))


def edited(folder, tmp_path, change=lambda tensors: None, **settings):
    """A copy of a model's folder with other tensors and settings."""
    copy = tiny_models.changed(folder, tmp_path, **settings)
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "float8_e4m3fn"])
def test_weights_without_scales_are_refused(dtype: str, llama, tmp_path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"

    def quantise(tensors) -> None:
        tensors[name] = (tensors[name] * 100).to(getattr(torch, dtype))

    with pytest.raises(ConfigError, match=rf"{name} is .* cannot be trained"):
        policy(edited(llama, tmp_path, quantise))


def test_weights_with_unknown_scales_are_refused(llama, tmp_path) -> None:
    def scale(tensors) -> None:
        tensors["model.layers.0.self_attn.q_proj.weight_scale"] = torch.ones(1)

    with pytest.raises(ConfigError, match=r"1 weights that LlamaForCausalLM does not use, the first .*weight_scale"):
        policy(edited(llama, tmp_path, scale))


def test_masks_in_old_files_are_not_weights(tmp_path) -> None:
    folder = tiny_models.make_model("gpt2", tmp_path / "gpt2")
    expected = policy(folder).logprobs(batch((2,)))

    def add(tensors) -> None:
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8).tril()
        tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)

    np.testing.assert_array_equal(policy(edited(folder, tmp_path, add)).logprobs(batch((2,))), expected)


@pytest.mark.parametrize("method", ["bitsandbytes", "compressed-tensors", "gptq", "awq", "hqq"])
def test_quantised_models_are_refused_by_name(method: str, llama, tmp_path) -> None:
    settings = {"quant_method": method, "bits": 4, "load_in_4bit": True, "format": "pack-quantized"}
    with pytest.raises(ConfigError, match=f"quantised \\({method}\\), which gvpo_torch does not read"):
        policy(tiny_models.changed(llama, tmp_path, quantization_config=settings))


def test_fp8_is_unpacked_on_every_device() -> None:
    """transformers unpacks it on a CPU whatever the settings say, and on a GPU where they say so."""
    settings = AutoConfig.for_model("llama")
    settings.quantization_config = {"quant_method": "fp8", "weight_block_size": [128, 128], "dequantize": False}
    assert _dequantized(settings, settings.to_dict())["quantization_config"].dequantize is True


@pytest.mark.parametrize(
    ("kind", "nested"), [({}, False), ({"lora_rank": 2}, False), ({}, True)], ids=["full", "lora", "text_config"]
)
def test_fp8_with_scales_is_unpacked_exactly(kind, nested, llama, tmp_path) -> None:
    start = families.make("gemma3", tmp_path / "start") if nested else llama
    plain = edited(start, tmp_path / "plain")
    packed = tmp_path / "packed"
    shutil.copytree(plain, packed)
    tensors, unpacked = load_file(packed / "model.safetensors"), {}
    for name, tensor in list(tensors.items()):
        unpacked[name] = tensor
        if "_proj.weight" in name and "vision" not in name:  # one block of 128 x 128
            scale = tensor.abs().max() / 448
            tensors[name] = (tensor / scale).to(torch.float8_e4m3fn)
            tensors[name + "_scale_inv"] = scale.reshape(1, 1)
            unpacked[name] = tensors[name].float() * scale
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    save_file(unpacked, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((packed / "config.json").read_text())
    part = config["text_config"] if nested else config
    part["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (packed / "config.json").write_text(json.dumps(config))

    of, of_policy = batch((3, 2)), policy(packed, **kind)
    expected = policy(plain, **kind).logprobs(of)
    np.testing.assert_allclose(of_policy.logprobs(of), expected, rtol=0, atol=1e-5)
    assert np.abs(expected - policy(start).logprobs(of)).max() > 1e-3  # the rounding shows
    train(of_policy, range(1))
    of_policy.export(tmp_path / "out")
    assert "quantization_config" not in (tmp_path / "out/config.json").read_text()
    np.testing.assert_allclose(policy(tmp_path / "out").logprobs(of), of_policy.logprobs(of), rtol=0, atol=1e-4)

    del tensors[next(name for name in tensors if name.endswith("up_proj.weight_scale_inv"))]
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.up_proj\.weight is F8_E4M3"):
        policy(packed, **kind)


FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def test_mxfp4_is_unpacked_exactly(tmp_path) -> None:
    plain = tiny_models.make_model("gpt_oss", tmp_path / "plain", intermediate_size=32)
    packed, draw = tmp_path / "packed", np.random.default_rng(0)
    shutil.copytree(plain, packed)
    tensors, unpacked = load_file(packed / "model.safetensors"), {}
    for name, tensor in list(tensors.items()):
        unpacked[name] = tensor
        if name.endswith(("gate_up_proj", "down_proj")):  # (E, in, out): packed as (E, out, blocks of 32 in, 16 bytes)
            experts, inner, outer = tensor.shape
            codes = draw.integers(0, 16, (experts, outer, inner // 32, 32))
            exponents = draw.integers(123, 126, (experts, outer, inner // 32))
            del tensors[name]
            tensors[f"{name}_blocks"] = torch.from_numpy(codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
            tensors[f"{name}_scales"] = torch.from_numpy(exponents).to(torch.uint8)
            values = np.where(codes < 8, 1, -1) * np.take(FP4, codes % 8) * 2.0 ** (exponents[..., None] - 127)
            unpacked[name] = torch.from_numpy(values.reshape(experts, outer, inner)).float().mT.contiguous()
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    save_file(unpacked, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((packed / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (packed / "config.json").write_text(json.dumps(config))
    of = batch((3, 2))
    np.testing.assert_allclose(policy(packed).logprobs(of), policy(plain).logprobs(of), rtol=0, atol=1e-5)


@pytest.mark.parametrize("with_model", [True, False])
def test_an_adapter_in_the_folder_is_refused(with_model: bool, llama, tmp_path) -> None:
    copy = edited(llama, tmp_path)
    (copy / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(llama)}))
    if not with_model:
        (copy / "model.safetensors").unlink()
        (copy / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"holds an adapter .*merge it into its model first"):
        policy(copy)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_head_of_its_own_is_exported_as_untied(name: str, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    made = tiny_models.make_model(name, tmp_path / "made", tie_word_embeddings=False)
    of_policy = policy(edited(made, tmp_path, tie_word_embeddings=True), learning_rate=1e-2)
    assert "lm_head.weight" in parameters(of_policy)
    train(of_policy, range(1))
    of_policy.export(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    np.testing.assert_array_equal(lm.lm_head.weight.detach().double(), parameters(of_policy)["lm_head.weight"])


@pytest.mark.parametrize("kind", [{"dtype": "bfloat16", "lora_rank": 2}, {}], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("lost", ["softcap", "scale"])
def test_a_head_read_wrongly_is_refused_though_logits_are_small(lost: str, kind, tmp_path, monkeypatch) -> None:
    from gvpo_torch import head

    changes = {"softcap": {"final_logit_softcapping": 30.0}, "scale": {"logits_scaling": 1.02}}[lost]
    made = tiny_models.make_model({"softcap": "gemma2", "scale": "granite"}[lost], tmp_path, spread=0.01, **changes)
    assert policy(made, **kind).scorer.head_options[lost] == {"softcap": 30.0, "scale": 1 / 1.02}[lost]
    monkeypatch.setattr(head, "_options", lambda config: {"softcap": None, "scale": 1.0})
    with pytest.raises(ConfigError, match="are not its head's products, scaled and capped"):
        policy(made, **kind)


def test_layers_whose_weight_is_used_outside_of_them_take_no_adapters(tmp_path) -> None:
    import families

    made = families.make("falcon_h1", tmp_path)
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in parameters(policy(made, lora_rank=2))}
    assert {"in_proj", "q_proj", "down_proj"} <= adapted
    assert "out_proj" not in adapted
    with pytest.raises(ConfigError, match=r"out_proj.*FalconH1Mixer uses the weight of out_proj outside of it"):
        policy(made, lora_rank=2, lora_targets=("out_proj",))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_gpt2_exports_its_adapters_merged(kind: str, tmp_path) -> None:
    of, of_policy = batch((3, 2)), policy(tiny_models.make_model("gpt2", tmp_path / "m"), lora_rank=2, lora_kind=kind)
    before = of_policy.logprobs(of)
    train(of_policy, range(3))
    of_policy.export(tmp_path / "out")
    after = of_policy.logprobs(of)
    assert np.abs(after - before).max() > 1e-3
    np.testing.assert_allclose(policy(tmp_path / "out").logprobs(of), after, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "decoder"),
    [
        ("blip-2", "OPTDecoder"),  # of a causal model that another one wraps
        ("llama4_text", "Llama4TextModel"),  # its `get_decoder` gives the model itself
        ("modernbert-decoder", "ModernBertDecoderModel"),  # its attribute "decoder" is the head
        ("gemma3", "Gemma3TextModel"),
    ],
)
def test_the_decoder_is_below_every_head(kind: str, decoder: str) -> None:
    config = families.make_config(kind)
    with torch.device("meta"):
        lm = families.model_class(config).from_config(config)
    assert type(decoder_of(lm)).__name__ == decoder


def test_a_model_without_a_decoder_is_refused() -> None:
    class Model(torch.nn.Module):
        get_decoder = lambda self: self

    with pytest.raises(ConfigError, match="Model has no decoder separate from its head, which is not supported"):
        decoder_of(Model())
