"""MLX policies on disk: save and restore go on bit for bit, and folders that do not fit are named."""

import json

import numpy as np
import pytest
import tiny_models
from mlx_policies import parameters, policy, require
from torch_policies import batch, coefficients_of, step_difference

require()

from safetensors.numpy import load_file

from gvpo_core.training.config import ConfigError
from gvpo_core.training.sampling import Sampling

KINDS = {
    "full": {},
    "lora": {"lora_rank": 2},
    "dora": {"lora_rank": 2, "lora_kind": "dora"},
    "bfloat16": {"dtype": "bfloat16"},
}
SETTINGS = {"learning_rate": 1e-3, "warmup": 2, "schedule": "cosine"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.write_model("llama-tied", tmp_path_factory.mktemp("llama"))


def train(of_policy, steps) -> list[object]:
    found = []
    for step in steps:
        of = batch((4, 3), seed=step)
        update = of_policy.update(of, coefficients_of(of))
        found.append((update.logprobs.tolist(), update.gradient_norm, update.learning_rate))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_two_and_two_steps_are_four(kind: str, folder, tmp_path) -> None:
    whole = policy(folder, **SETTINGS, **KINDS[kind])
    expected = train(whole, range(4))
    first = policy(folder, **SETTINGS, **KINDS[kind])
    assert train(first, range(2)) == expected[:2]
    first.save(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}
    assert sum(len(load_file(p)) for p in tmp_path.glob("*.safetensors")) == 3 * len(first.scorer.names)
    second = policy(folder, seed=5, **SETTINGS, **KINDS[kind])
    train(second, range(7, 8))  # whatever it was before
    second.restore(tmp_path)
    assert train(second, range(2, 4)) == expected[2:]
    a, b = parameters(whole), parameters(second)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])
    prompts, seeds = [(5, 6, 7)], [[1, 2, 3]]
    assert whole.generate(prompts, seeds, Sampling(8)) == second.generate(prompts, seeds, Sampling(8))


def test_a_fresh_policy_can_be_saved_and_restored(folder, tmp_path) -> None:
    policy(folder, lora_rank=2, seed=1).save(tmp_path)
    other = policy(folder, lora_rank=2, seed=2)
    train(other, range(1))
    other.restore(tmp_path)
    assert step_difference(parameters(policy(folder, lora_rank=2, seed=1)), parameters(other)) == 0.0
    assert other._optimizer.steps == 0 and not other._optimizer.moments


def test_a_checkpoint_larger_than_a_shard_is_split(folder, tmp_path, monkeypatch) -> None:
    from gvpo_mlx import checkpoint

    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 20_000)
    of_policy = policy(folder)
    train(of_policy, range(1))
    (tmp_path / "state").mkdir()
    of_policy.save(tmp_path / "state")
    assert len(list((tmp_path / "state").glob("*.safetensors"))) > 3
    other = policy(folder)
    other.restore(tmp_path / "state")
    assert step_difference(parameters(of_policy), parameters(other)) == 0.0
    of_policy.export(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {p.name for p in (tmp_path / "out").glob("model-*.safetensors")}
    of = batch((2, 2))
    np.testing.assert_allclose(policy(tmp_path / "out").logprobs(of), of_policy.logprobs(of), rtol=0, atol=1e-5)


def test_what_does_not_fit_is_named(folder, tmp_path) -> None:
    made = policy(folder, lora_rank=2)
    with pytest.raises(ConfigError, match=r"has no state\.json"):
        made.restore(tmp_path)
    made.save(tmp_path)
    for other, message in (
        (policy(folder), "lora_rank = 2; this run has 0"),
        (policy(folder, lora_rank=2, lora_kind="dora"), "lora_kind = lora; this run has dora"),
        (policy(folder, lora_rank=2, lora_targets=("q_proj",)), "lora_targets"),
    ):
        with pytest.raises(ConfigError, match=message):
            other.restore(tmp_path)
    state = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps(state | {"format": 9}))
    with pytest.raises(ConfigError, match="has format 9; this version reads 1"):
        made.restore(tmp_path)
    (tmp_path / "state.json").write_text(json.dumps(state | {"files": ["../state-00001.safetensors"]}))
    with pytest.raises(ConfigError, match="lacks its file"):
        made.restore(tmp_path)


def test_a_checkpoint_of_another_size_is_named(folder, tmp_path) -> None:
    policy(folder).save(tmp_path)
    other = tiny_models.write_model("llama-tied", tmp_path / "other", intermediate_size=56)
    with pytest.raises(ConfigError, match="has another shape of 6 tensors"):
        policy(other).restore(tmp_path)
    deeper = tiny_models.write_model("llama-tied", tmp_path / "deeper", num_hidden_layers=3)
    with pytest.raises(ConfigError, match="lacks 9 tensors"):
        policy(deeper).restore(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_is_the_trained_model(dtype: str, folder, tmp_path) -> None:
    made = policy(folder, dtype=dtype, lora_rank=2, learning_rate=0.02)
    train(made, range(3))
    made.export(tmp_path / "out")
    again = policy(tmp_path / "out", dtype=dtype)
    of = batch((3, 3))
    near = 1e-3 if dtype == "float32" else 0.05 * np.abs(made.logprobs(of)).mean()
    np.testing.assert_allclose(again.logprobs(of), made.logprobs(of), rtol=0, atol=near)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == dtype and "rope_theta" in config
    assert {"tokenizer.json", "generation_config.json", "adapters"} <= {p.name for p in (tmp_path / "out").iterdir()}
