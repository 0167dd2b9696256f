"""A model whose head is its embedding, exported with a head of its own: what a running vLLM server reloads."""

import json

import numpy as np
import pytest
import tiny_models
import trainer_backends
from batches import batch, train
from trainer_runs import write_run

from gvpo_core.training import cli

PRESENT = trainer_backends.present()
if not PRESENT:
    pytest.skip("no backend of a language model is among the subjects", allow_module_level=True)


def tensors(folder):
    from safetensors.numpy import load_file

    return {name: array for path in folder.glob("*.safetensors") for name, array in load_file(path).items()}


def config(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.slow_on("jax")
@pytest.mark.parametrize("lora_rank", [0, 3])
def test_the_head_is_the_trained_embedding_and_the_scores_are_equal(backend, lora_rank, tmp_path):
    model = tiny_models.write_model("llama", tmp_path / "model", tie_word_embeddings=True)
    assert "lm_head.weight" not in tensors(model)
    policy = backend.policies.policy(model, learning_rate=0.02, lora_rank=lora_rank)
    train(policy, range(2))
    tied, own = tmp_path / "tied", tmp_path / "own"
    policy.export(tied)
    policy.export(own, own_head=True)
    assert config(tied)["tie_word_embeddings"] and "lm_head.weight" not in tensors(tied)
    head, embedding = (tensors(own)[name] for name in ("lm_head.weight", "model.embed_tokens.weight"))
    assert config(own)["tie_word_embeddings"] is False and np.array_equal(head, embedding)
    assert lora_rank or not np.array_equal(head, tensors(model)["model.embed_tokens.weight"]), "nothing was trained"
    again = backend.policies.policy(own)
    np.testing.assert_allclose(again.logprobs(batch()), policy.logprobs(batch()), atol=1e-4)


def test_a_model_with_a_head_of_its_own_is_exported_as_it_is(backend, tmp_path):
    policy = backend.policies.policy(tiny_models.write_model("llama", tmp_path / "model"))
    policy.export(tmp_path / "plain")
    policy.export(tmp_path / "own", own_head=True)
    plain, own = (tensors(tmp_path / name) for name in ("plain", "own"))
    assert plain.keys() == own.keys() and all(np.array_equal(plain[name], own[name]) for name in plain)
    assert config(tmp_path / "plain") == config(tmp_path / "own")


def test_the_command_writes_it_from_the_settings_of_a_run_to_come(backend, tmp_path, capsys):
    model = tiny_models.write_model("llama", tmp_path / "model", tie_word_embeddings=True)
    settings = write_run(tmp_path, backend, model, steps=1, extra="", model_extra="")
    assert cli.main(["export", str(settings), str(tmp_path / "out"), "--own-head"]) == 0
    head = tensors(tmp_path / "out")["lm_head.weight"]
    assert np.array_equal(head, tensors(model)["model.embed_tokens.weight"]) and not (tmp_path / "run").exists()
    assert cli.main(["export", str(settings), str(tmp_path / "o2"), "--own-head", "--adapters"]) == 2
    assert "adapters have no output layer" in capsys.readouterr().err
