"""Damaged and impossible model folders, and hub names without a network: one line from every backend, and soon."""

import json
import re
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from batches import batch

pytest.importorskip("transformers", reason="transformers is not installed")

from gvpo_core.training.config import ConfigError, ModelConfig
from gvpo_core.training.policy import hugging_face

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return tiny_models.write_model("llama", tmp_path_factory.mktemp("sound"))


@pytest.fixture
def refused(backend, sound, tmp_path):
    """(file, what becomes of its bytes) -> the message of the refusal."""

    def refused(file, change) -> str:
        folder = tmp_path / "model"
        shutil.copytree(sound, folder)
        (folder / file).write_bytes(change((folder / file).read_bytes()))
        with pytest.raises(ConfigError) as raised:
            backend.policies.policy(folder)
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 600
        return str(raised.value)

    return refused


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json", "generation_config.json"])
def test_a_git_lfs_pointer_is_named(file, refused):
    assert f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull`" in refused(file, lambda _: POINTER)


@pytest.mark.parametrize("kept", [0, 4, 300, -100])
def test_weights_that_are_cut_are_named(kept, refused):
    assert "model.safetensors cannot be read as safetensors" in refused("model.safetensors", lambda data: data[:kept])


@pytest.mark.parametrize("text", ["", "[]", "3", "{", '{"model_type": 3}', '{"model_type": "no-such-model"}', "\xff"])
def test_a_config_of_something_else_than_a_model_is_refused(text, refused):
    refused("config.json", lambda _: text.encode("latin-1"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("vocab_size", 10**15),
        ("hidden_size", 10**15),
        ("intermediate_size", -1),
        ("num_attention_heads", 0),
        ("num_attention_heads", "4"),
        ("hidden_size", None),
        ("architectures", 3),
        ("eos_token_id", "</s>"),
        ("rope_parameters", 3),
    ],
)
def test_settings_of_a_wrong_type_or_size_are_refused_at_once(name, value, sound, refused):
    def changed(data):
        return json.dumps(json.loads(data) | {name: value}).encode()

    if name == "eos_token_id":
        assert "eos_token_id = '</s>'" in refused("generation_config.json", changed)
    else:
        assert refused("config.json", changed)


def test_a_hub_name_without_a_network_fails_once(monkeypatch, tmp_path):
    import huggingface_hub.constants

    asked = []

    def nothing(host, *_, **__):
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nothing)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for offline, said in ((False, "and the hub cannot be reached: "), (True, "and HF_HUB_OFFLINE is set")):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setenv("HF_HUB_OFFLINE", str(int(offline)))
        for load in (hugging_face.load_tokenizer, hugging_face.located, hugging_face.local_folder):
            with pytest.raises(ConfigError) as raised:
                load(ModelConfig(path="someone/some-model"))
            assert f"model.path 'someone/some-model' is not a folder here, was not downloaded before, {said}" in str(
                raised.value
            )
            assert "\n" not in str(raised.value)


def test_a_hub_name_is_looked_up_once_a_process(monkeypatch, sound):
    asked = []

    def download(name, **options):
        asked.append((name, options["revision"]))
        return str(sound)

    hugging_face._downloaded.cache_clear()
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(hugging_face, "unreachable_for", lambda *_: "")
    config = ModelConfig(path="someone/some-model", revision="main")
    assert hugging_face.load_tokenizer(config).eos_token_id == 0
    assert hugging_face.located(config)["pretrained_model_name_or_path"] == str(sound)
    assert hugging_face.local_folder(config) == sound
    hugging_face._downloaded.cache_clear()
    assert asked == [("someone/some-model", "main")]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("4", "WORLD_SIZE = 4 without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: unset it to train in one process"),
        ("many", "WORLD_SIZE = 'many'; expected a number of processes"),
    ],
)
def test_a_stray_world_size_is_refused_by_torch_and_nothing_to_the_others(value, said, backend, sound, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", value)
    if backend.name != "torch":
        assert backend.policies.policy(sound).world_size == 1
        return
    with pytest.raises(ConfigError, match=re.escape(said)):
        backend.policies.policy(sound)


def test_the_weight_file_that_the_configuration_names_is_read(backend, sound, tmp_path):
    """transformers reads it; gvpo_jax and gvpo_mlx read model.safetensors beside it, of another model."""
    of = batch((2, 2))
    folder = tiny_models.write_model("llama", tmp_path / "model", seed=1)
    shutil.copy(sound / "model.safetensors", folder / "best.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "best.safetensors"}))
    wanted = backend.policies.policy(sound).logprobs(of)
    policy = backend.policies.policy(folder)
    np.testing.assert_array_equal(policy.logprobs(of), wanted)
    policy.export(tmp_path / "exported")
    assert "transformers_weights" not in json.loads((tmp_path / "exported" / "config.json").read_text())
    np.testing.assert_allclose(backend.policies.policy(tmp_path / "exported").logprobs(of), wanted, atol=1e-3)


GPTQ = {"quant_method": "gptq", "bits": 4}
QUANTISED = {
    "a part for text within another": ({"thinker_config": {"text_config": {"quantization_config": GPTQ}}}, "gptq"),
    "a language model by another name": ({"llm_config": {"quantization_config": GPTQ}}, "gptq"),
    "compression of a part": ({"language_config": {"compression_config": {"format": "x"}}}, "compression_config"),
    "fp8 where nothing unpacks it": ({"llm_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
    "bits alone": ({"quantization_bit": 4}, "quantization_bit"),
    "loading alone": ({"load_in_4bit": True}, "load_in_4bit"),
    "another name": ({"quantize_config": GPTQ}, "gptq"),
}


@pytest.mark.parametrize("name", QUANTISED)
def test_settings_of_quantised_weights_are_found_wherever_they_are(name, refused):
    """The weights here are floats: nothing but these settings says that they are not the model's."""
    given, method = QUANTISED[name]
    said = refused("config.json", lambda text: json.dumps(json.loads(text) | given).encode())
    assert f"quantised ({method})" in said


@pytest.mark.parametrize(
    "file", ["hf_quant_config.json", "quantize_config.json", "quant_config.json", "quanto_qmap.json"]
)
def test_a_file_of_a_quantiser_beside_the_weights_is_named(file, backend, sound, tmp_path):
    backend.policies.policy(sound)
    folder = tmp_path / "model"
    shutil.copytree(sound, folder)
    (folder / file).write_text('{"bits": 4}')
    with pytest.raises(ConfigError, match=rf"holds the settings of quantised weights \({file}\)"):
        backend.policies.policy(folder)


def test_settings_of_quantisation_that_say_nothing_are_taken(backend, sound, tmp_path):
    folder = tiny_models.changed(
        sound, tmp_path, quantization_config=None, load_in_4bit=False, vision_config={"quantization_config": {}}
    )
    backend.policies.policy(folder)


def _with_tensor(folder, tmp_path, name, array) -> Path:
    from safetensors.numpy import load_file, save_file

    copy = shutil.copytree(folder, tmp_path / "model")
    save_file(load_file(copy / "model.safetensors") | {name: array}, copy / "model.safetensors", {"format": "pt"})
    return copy


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.out_projector.weight",  # as the name of a part for images is
        "model.layers.1.visual_mlp.up_proj.weight",
        "model.layers.0.mlp.nextn.weight",
        "model.layers.2.mlp.up_proj.weight",  # of a layer that config.json does not have
        "lm_head.bias",
        "score.weight",
        "model.layers.0.self_attn.q_proj.weight_scale_inv",
        "model.layers.0.self_attn.q_proj.weight.absmax",
    ],
)
def test_a_tensor_that_nothing_uses_is_named(name, backend, sound, tmp_path):
    folder = _with_tensor(sound, tmp_path, name, np.ones((4, 4), np.float32))
    with pytest.raises(ConfigError, match=re.escape(name)) as raised:
        backend.policies.policy(folder)
    assert "\n" not in str(raised.value) and "Error:" not in str(raised.value)


def test_weights_of_another_shape_are_named(backend, sound, tmp_path):
    """As a weight packed by bitsandbytes has; transformers prints a table and names nothing in its error."""
    name = "model.layers.0.self_attn.q_proj.weight"
    folder = _with_tensor(sound, tmp_path, name, np.ones((512, 1), np.float32))
    with pytest.raises(ConfigError, match=re.escape(name)) as raised:
        backend.policies.policy(folder)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_named(value, backend, sound, tmp_path):
    """A run that diverged saved them: before, the message was that the model changes its logits."""
    from safetensors.numpy import load_file

    name = "model.layers.1.mlp.up_proj.weight"
    array = load_file(sound / "model.safetensors")[name]
    array[3] = value
    with pytest.raises(ConfigError, match="are not finite: its weights hold NaN or infinity"):
        backend.policies.policy(_with_tensor(sound, tmp_path, name, array))
