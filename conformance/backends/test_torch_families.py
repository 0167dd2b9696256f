"""Families of transformers, made tiny from their own classes, with gvpo_torch; docs/models.md lists all of them."""

import dataclasses

import families
import family_trial
import numpy as np
import pytest
from required import require
from torch_policies import parameters, policy

require(subject="torch")

FAMILIES = ("gemma3", "gemma4", "mistral3", "llama4", "qwen3_5", "falcon_h1", "deepseek_v2", "falcon")
SLOW = ("qwen3_vl", "kimi_k25", "gemma4_text", "llama4_text", "zamba2", "gpt_oss", "phimoe", "granite", "cohere")


@pytest.mark.parametrize("name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_family_is_exact(name: str, tmp_path) -> None:
    made = family_trial.try_make(name, tmp_path)
    for lora_rank in (0, 2):
        assert family_trial.try_backend("torch", tmp_path, made, lora_rank)["state"] == "exact"


def test_only_the_text_model_is_trained(tmp_path) -> None:
    folder = families.make("gemma3", tmp_path)
    for kind in ({}, {"lora_rank": 2}):
        of_policy = policy(folder, **kind)
        assert "vision" in str(list(of_policy.scorer.base.state_dict()))
        assert all("language_model" in name for name in parameters(of_policy))
        facts = of_policy.describe()
        assert facts.trainable_parameters == sum(p.size for p in parameters(of_policy).values())


def test_the_image_processor_is_exported_with_the_model(tmp_path) -> None:
    folder = families.make("gemma3", tmp_path / "made")
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    policy(folder).export(tmp_path / "out")
    assert (tmp_path / "out/preprocessor_config.json").read_text() == '{"image_mean": [0.5]}'
    assert not (tmp_path / "out/processor_config.json").exists()


def test_sizes_and_context_are_those_of_the_text_model(tmp_path) -> None:
    facts = policy(families.make("gemma3", tmp_path)).describe()
    assert facts.context == 128
    sizes = {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "intermediate": 48}
    assert facts.vocabulary == 96
    assert sizes.items() <= dataclasses.asdict(facts.memory).items()


def test_layers_of_several_sizes_count_as_the_largest(tmp_path) -> None:
    shape = policy(families.make("gemma4_text", tmp_path)).describe().memory
    assert shape.layers == 2
    assert shape.head_dim > 8  # Gemma 4's full-attention layers are wider than its others


def test_the_trial_notices_a_wrong_model(tmp_path, monkeypatch) -> None:
    from gvpo_torch import generate

    made = family_trial.try_make("llama", tmp_path)
    trial = lambda: family_trial.try_backend("torch", tmp_path, made, 0)
    assert trial()["state"] == "exact"
    changed = made | {"logprobs": (np.asarray(made["logprobs"]) + 0.01).tolist()}
    assert "0.01 nat apart" in family_trial.try_backend("torch", tmp_path, changed, 0)["reason"]
    assert "gradient norm" in family_trial.try_backend("torch", tmp_path, made | {"norm": 1.0}, 0)["reason"]
    plain = generate.pick
    with monkeypatch.context() as patch:
        patch.setattr(generate, "pick", lambda logits, *rest: plain(logits * 1.1, *rest))
        assert "of the cumulative distribution apart" in trial()["reason"]
