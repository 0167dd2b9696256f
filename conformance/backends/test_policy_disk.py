"""Every backend's policy on disk: save and restore go on bit for bit, exports are the trained model, and folders
that do not fit or cannot be loaded are named."""

import gc
import json
import pickle
import re
import shutil

import numpy as np
import power_loss
import pytest
import tiny_models
import trainer_backends
from batches import batch, step_difference, train

from gvpo_core.training.config import ConfigError
from gvpo_core.training.config.backends import BACKENDS
from gvpo_core.training.sampling import Sampling

PRESENT = trainer_backends.present()
if not PRESENT:
    pytest.skip("no backend of a language model is among the subjects", allow_module_level=True)

SETTINGS = {"learning_rate": 1e-3, "warmup": 2, "schedule": "cosine"}
KINDS = {
    "full": {},
    "lora": {"lora_rank": 2},
    "dora": {"lora_rank": 2, "lora_kind": "dora"},
    "bfloat16": {"dtype": "bfloat16"},
    "lora-bfloat16": {"lora_rank": 2, "dtype": "bfloat16"},
}


def kinds(*names: str):
    """Runs a test for every backend and those of these kinds of training that it has."""
    pairs = [(b, name) for b in PRESENT for name in names if KINDS[name].get("lora_kind", "lora") in b.lora_kinds]
    slow = {"bfloat16": pytest.mark.slow}
    given = [pytest.param(b, name, id=f"{b.name}-{name}", marks=slow.get(name, ())) for b, name in pairs]
    return pytest.mark.parametrize(("backend", "kind"), given, indirect=["backend"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.write_model("llama-tied", tmp_path_factory.mktemp("llama"), attention_bias=True)


@pytest.fixture
def load(backend):
    return backend.policies.policy


@pytest.fixture
def parameters(backend):
    return backend.policies.parameters


@pytest.fixture
def state(tmp_path):
    (tmp_path / "state").mkdir()
    return tmp_path / "state"


@pytest.mark.slow_on("jax-lora")
@kinds("full", "lora", "dora", "bfloat16")
def test_two_and_two_steps_are_four(kind: str, backend, load, parameters, folder, state) -> None:
    whole = load(folder, **SETTINGS, **KINDS[kind])
    expected = train(whole, range(4))
    first = load(folder, **SETTINGS, **KINDS[kind])
    assert train(first, range(2)) == expected[:2]
    first.save(state)
    assert {path.suffix for path in state.rglob("*") if path.is_file()} <= backend.suffixes
    kept, trained = (sum(a.size for a in arrays.values()) for arrays in (backend.state(state), parameters(first)))
    assert kept - 3 * trained in (0, 1)  # parameters or adapters, and both moments; perhaps a count of steps
    second = load(folder, seed=5, **SETTINGS, **KINDS[kind])
    train(second, range(7, 8))  # whatever it was before
    second.restore(state)
    assert train(second, range(2, 4)) == expected[2:]
    a, b = parameters(whole), parameters(second)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])
    prompts, seeds = [(5, 6, 7)], [[1, 2, 3]]
    assert whole.generate(prompts, seeds, Sampling(8)) == second.generate(prompts, seeds, Sampling(8))


@pytest.mark.slow_on("jax")
def test_a_fresh_policy_can_be_saved_and_restored(load, parameters, folder, state) -> None:
    fresh = load(folder, lora_rank=2, seed=1)
    fresh.save(state)
    other = load(folder, lora_rank=2, seed=2)
    train(other, range(1))
    other.restore(state)
    assert step_difference(parameters(fresh), parameters(other)) == 0.0
    assert train(other, range(2)) == train(fresh, range(2))  # nor moments, nor the number of steps
    assert step_difference(parameters(fresh), parameters(other)) == 0.0


@pytest.mark.slow_on("jax")
def test_checkpoints_that_do_not_fit_are_named(load, folder, tmp_path) -> None:
    full, lora = tmp_path / "full", tmp_path / "lora"
    for path in (full, lora):
        path.mkdir()
    load(folder).save(full)
    load(folder, lora_rank=2).save(lora)
    with pytest.raises(ConfigError, match=r"has no state\.json.*: not a checkpoint of this backend"):
        load(folder).restore(tmp_path)
    with pytest.raises(ConfigError, match="has lora_rank = 2; this run has 0"):
        load(folder).restore(lora)
    with pytest.raises(ConfigError, match="has lora_rank = 0; this run has 2"):
        load(folder, lora_rank=2).restore(full)
    with pytest.raises(ConfigError, match="has lora_alpha = 4; this run has 32"):
        load(folder, lora_rank=2, lora_alpha=32).restore(lora)
    with pytest.raises(ConfigError, match="has lora_targets = "):
        load(folder, lora_rank=2, lora_targets=("q_proj",)).restore(lora)
    qwen = tiny_models.write_model("qwen3", tmp_path / "qwen")
    with pytest.raises(ConfigError, match=r"has architecture = [\w.]+; this run has [\w.]+"):
        load(qwen).restore(full)
    (lora / "state.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ConfigError, match="has format 99; this version reads 1"):
        load(folder, lora_rank=2).restore(lora)


@kinds("dora")
def test_a_checkpoint_of_another_kind_of_adapters_is_named(kind: str, load, folder, tmp_path) -> None:
    for name, wanted in (("lora", "this run has dora"), (kind, "this run has lora")):
        (tmp_path / name).mkdir()
        load(folder, **KINDS[name]).save(tmp_path / name)
        other = load(folder, **KINDS[kind if name == "lora" else "lora"])
        with pytest.raises(ConfigError, match=f"has lora_kind = .*; {wanted}"):
            other.restore(tmp_path / name)


@pytest.mark.slow_on("jax")
def test_a_checkpoint_of_another_size_is_named(load, parameters, folder, state, tmp_path) -> None:
    load(folder).save(state)
    wider = load(tiny_models.write_model("llama-tied", tmp_path / "wider", attention_bias=True, intermediate_size=56))
    before = parameters(wider)
    with pytest.raises(ConfigError, match=r"another shape of 6 tensors, the first parameter\.model\.layers\.0\.mlp"):
        wider.restore(state)
    assert step_difference(before, parameters(wider)) == 0.0
    deeper = tiny_models.write_model("llama-tied", tmp_path / "deeper", attention_bias=True, num_hidden_layers=3)
    with pytest.raises(ConfigError, match=r"lacks 13 tensors, the first parameter\.model\.layers\.2\.input_layernorm"):
        load(deeper).restore(state)
    shallower = tiny_models.write_model("llama-tied", tmp_path / "shallower", attention_bias=True, num_hidden_layers=1)
    with pytest.raises(ConfigError, match=r"also has 13 tensors, the first parameter\.model\.layers\.1\.input"):
        load(shallower).restore(state)


# Orbax leaves its other reads where one fails: collected here, not within another test.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_file_that_cannot_be_read_to_its_end_is_an_error_that_names_it(load, folder, state) -> None:
    """A read that fails between the check of the checkpoint and its use; libraries raise kinds of their own there."""
    policy = load(folder, **SETTINGS)
    policy.save(state)
    largest = max((path for path in state.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    assert largest.stat().st_size > 1000
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)
    before = policy.logprobs(batch((2,)))
    with pytest.raises((ConfigError, OSError), match=re.escape(str(state))):
        policy.restore(state)
    np.testing.assert_array_equal(policy.logprobs(batch((2,))), before)
    gc.collect()


def test_a_checkpoint_without_its_files_is_named(load, folder, state) -> None:
    of_policy = load(folder, lora_rank=2)
    of_policy.save(state)
    listed = json.loads((state / "state.json").read_text())
    if "files" in listed:  # a path out of the folder is followed by nobody
        (state / "state.json").write_text(json.dumps(listed | {"files": ["../" + name for name in listed["files"]]}))
        with pytest.raises(ConfigError, match=r"lacks its file \.\./"):
            of_policy.restore(state)
        (state / "state.json").write_text(json.dumps(listed))
    for path in list(state.iterdir()):
        if path.name != "state.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ConfigError, match=r"lacks its file (state-00001(-of-00001)?\.safetensors|arrays)"):
        of_policy.restore(state)


def dtypes_of(path) -> set[str]:
    """By the header of a safetensors file."""
    raw = path.read_bytes()
    entries = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return {entry["dtype"] for name, entry in entries.items() if name != "__metadata__"}


@pytest.mark.slow_on("jax-bfloat16")
@kinds("full", "lora", "dora", "bfloat16", "lora-bfloat16")
def test_an_export_is_the_trained_model(kind: str, load, parameters, tmp_path) -> None:
    made, out = tiny_models.write_model("llama", tmp_path / "made"), tmp_path / "out"
    settings = KINDS[kind]
    of_policy = load(made, **settings, learning_rate=0.02 if "lora_rank" in settings else 1e-3)
    train(of_policy, range(3))
    before = parameters(of_policy)
    of = batch((3, 3))
    expected = of_policy.logprobs(of)
    of_policy.export(out)
    assert step_difference(before, parameters(of_policy)) == 0.0
    np.testing.assert_array_equal(of_policy.logprobs(of), expected)  # merging left no trace
    dtype = settings.get("dtype", "float32")
    again = load(out, dtype=dtype)
    near = 1e-4 if dtype == "float32" else 0.05 * np.abs(expected).mean()
    np.testing.assert_allclose(again.logprobs(of), expected, rtol=0, atol=near)
    config, source = (json.loads((path / "config.json").read_text()) for path in (out, made))
    assert config["dtype"] == dtype
    assert dtypes_of(out / "model.safetensors") == {"F32" if dtype == "float32" else "BF16"}
    assert config["rope_theta"] == source["rope_parameters"]["rope_theta"] == 700.0
    assert config["rope_parameters"] == source["rope_parameters"]
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 0
    assert again.tokenizer.chat_template == of_policy.tokenizer.chat_template
    assert again.encode("ab") == of_policy.encode("ab")
    files = {p.name for p in out.iterdir() if p.is_file()}
    assert "tokenizer.json" in files
    assert {name.rpartition(".")[2] for name in files} <= {"json", "safetensors", "jinja"}


@kinds("full", "lora")
def test_an_export_outlives_a_power_loss(kind: str, backend, load, folder, tmp_path) -> None:
    of_policy = load(folder, **KINDS[kind])
    disk = power_loss.Disk(tmp_path / "disk")
    (tmp_path / "disk").mkdir()
    with disk.recording():
        of_policy.export(tmp_path / "disk" / "whole")
        if kind == "lora":
            (tmp_path / "disk" / "adapters").mkdir()
            of_policy.export_adapters(tmp_path / "disk" / "adapters")
    there = power_loss.files_of(tmp_path / "disk")
    assert "whole/model.safetensors" in there and "whole/config.json" in there
    for states in disk.states.values():
        lost = sorted(name for name, content in there.items() if states[-1].get(name, "lost") != content)
        assert lost == []


def test_a_scaled_rope_is_exported_in_the_older_form_too(load, tmp_path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
    of_policy = load(tiny_models.write_model("llama", tmp_path / "made", rope_parameters=rope))
    of_policy.export(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == 500.0
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    of = batch((3, 3))
    np.testing.assert_allclose(load(tmp_path / "out").logprobs(of), of_policy.logprobs(of), rtol=0, atol=1e-5)


# -- folders that cannot be loaded


@pytest.fixture
def broken(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "model")


def remove(path, *patterns: str) -> None:
    for pattern in patterns:
        for file in path.glob(pattern):
            file.unlink()


def test_no_such_folder(load, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"model\.path '.*nowhere' is not a folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"model\.path is empty"):
        load("")


def test_no_config(load, broken) -> None:
    remove(broken, "config.json")
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        load(broken)


def test_no_tokenizer(load, broken) -> None:
    remove(broken, "tokenizer*", "*.jinja")
    with pytest.raises(ConfigError, match=r"has no tokenizer: expected one of tokenizer\.json"):
        load(broken)


def test_a_pickle_is_not_read(load, broken) -> None:
    remove(broken, "*.safetensors")
    (broken / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(ConfigError, match=r"model.*safetensors"):
        load(broken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "perceptive_llama"}, "perceptive_llama"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1.0}}, "spiral"),
        ({"num_hidden_layers": 3}, r"lacks 13 weights.* the first model\.layers\.2"),
    ],
    ids=["model_type", "rope_type", "layers"],
)
def test_unknown_configurations_are_refused(load, broken, change, message: str) -> None:
    config = json.loads((broken / "config.json").read_text()) | change
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        load(broken)


def test_messages_without_a_chat_template(load, broken) -> None:
    remove(broken, "*.jinja")
    of_policy = load(broken)
    assert of_policy.decode(of_policy.encode("hello you")) == "hello you"
    with pytest.raises(ConfigError, match="has no chat template: give prompts as text"):
        of_policy.encode([{"role": "user", "content": "hello"}])


@pytest.mark.parametrize("target", ["nothing", "lm_head"])
def test_adapters_that_match_nothing_or_the_head(target: str, load, folder) -> None:
    with pytest.raises(ConfigError, match=target):
        load(folder, lora_rank=2, lora_targets=(target, "q_proj"))


def test_a_device_that_is_not_there(load, folder) -> None:
    with pytest.raises(ConfigError, match=r"model\.device is 'cuda:77', which"):
        load(folder, device="cuda:77")


@pytest.mark.parametrize(("field", "value"), [("sharding", "fsdp"), ("mesh_fsdp", 2), ("mesh_tensor", 2)])
def test_a_setting_of_another_backend_is_refused(field: str, value, backend, load, folder) -> None:
    if field in BACKENDS[backend.name].settings:
        pytest.skip(f"{backend.name} has model.{field}")
    with pytest.raises(ConfigError, match=rf"model\.{field} is .*that {backend.name} does not have"):
        load(folder, **{field: value})


def test_describe_is_plain(load, folder) -> None:
    facts = load(folder, lora_rank=2).describe()
    plain = facts.as_dict()
    assert json.loads(json.dumps(plain)) == plain
    named = "architecture device device_name dtype layout layout_reason ranks parameters trainable_parameters versions"
    assert not set(named.split()) - plain.keys()
    assert 0 < facts.trainable_parameters < facts.parameters
    assert facts.ranks == 1 and "transformers" in facts.versions


def test_a_relative_model_is_exported_after_the_working_directory_changed(load, folder, tmp_path, monkeypatch) -> None:
    """A reward in a thread of this process may change it before `gvpo train` sends the weights to an engine."""
    monkeypatch.chdir(folder.parent)
    policy = load(folder.name, lora_rank=2)
    monkeypatch.chdir(tmp_path)
    policy.export(tmp_path / "out")
    policy.export_adapters(tmp_path / "adapters")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert any((tmp_path / "adapters").glob("*.safetensors"))
    policy.reset()
