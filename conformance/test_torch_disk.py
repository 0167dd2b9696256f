"""Save and restore go on bit for bit, exports load in transformers, and folders that do not fit are named."""

import json
import logging
import shutil

import numpy as np
import pytest
import tiny_models
from torch_policies import batch, coefficients_of, parameters, policy, require, step_difference

require()

import torch
from safetensors.torch import load_file

from gvpo_core.training.config import ConfigError
from gvpo_core.training.sampling import Sampling

KINDS = {"full": {}, "lora": {"lora_rank": 2}, "bfloat16": {"dtype": "bfloat16"}}
FAMILIES = ("llama", "llama-tied-bias", "qwen3", "qwen3_moe", "phi3", "granite")
SETTINGS = {"learning_rate": 1e-3, "warmup": 2, "schedule": "cosine"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.make_model("llama-tied-bias", tmp_path_factory.mktemp("llama"))


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
    other.restore(tmp_path)
    assert step_difference(parameters(policy(folder, lora_rank=2, seed=1)), parameters(other)) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_only_safetensors_and_json_are_written(kind: str, folder, tmp_path) -> None:
    of_policy = policy(folder, **KINDS[kind])
    train(of_policy, range(1))
    of_policy.save(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}
    names = [name for path in tmp_path.glob("*.safetensors") for name in load_file(path)]
    assert len(names) == 3 * len(of_policy._named)
    if kind == "lora":
        assert all("lora_" in name for name in names)


def test_a_checkpoint_larger_than_a_shard_is_split(folder, tmp_path, monkeypatch) -> None:
    from gvpo_torch import checkpoint

    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 20_000)
    of_policy = policy(folder)
    expected = train(of_policy, range(1))
    of_policy.save(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    other = policy(folder)
    other.restore(tmp_path)
    assert step_difference(parameters(of_policy), parameters(other)) == 0.0
    assert train(other, range(1)) != expected


def test_checkpoints_that_do_not_fit_are_named(folder, tmp_path) -> None:
    empty, full, lora = tmp_path / "empty", tmp_path / "full", tmp_path / "lora"
    for path in (empty, full, lora):
        path.mkdir()
    policy(folder).save(full)
    policy(folder, lora_rank=2).save(lora)
    with pytest.raises(ConfigError, match=r"has no state\.json: not a checkpoint"):
        policy(folder).restore(empty)
    with pytest.raises(ConfigError, match="has lora_rank = 2; this run has 0"):
        policy(folder).restore(lora)
    with pytest.raises(ConfigError, match="has lora_alpha = 4; this run has 32"):
        policy(folder, lora_rank=2, lora_alpha=32).restore(lora)
    wider = tiny_models.make_model("llama-tied-bias", tmp_path / "wider", intermediate_size=64)
    with pytest.raises(ConfigError, match=r"has another shape of \d+ tensors, the first parameter\.model\.layers"):
        policy(wider).restore(full)
    deeper = tiny_models.make_model("llama-tied-bias", tmp_path / "deeper", num_hidden_layers=3)
    with pytest.raises(ConfigError, match=r"lacks \d+ tensors, the first parameter\.model\.layers\.2"):
        policy(deeper).restore(full)
    next(full.glob("*.safetensors")).unlink()
    with pytest.raises(ConfigError, match=r"lacks its file state-00001\.safetensors"):
        policy(folder).restore(full)
    (lora / "state.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ConfigError, match="has format 99; this version reads 1"):
        policy(folder, lora_rank=2).restore(lora)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_an_export_loads_and_scores_the_same(name: str, kind: str, tmp_path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = tiny_models.make_model(name, tmp_path / "made")
    of_policy = policy(made, **SETTINGS, **KINDS[kind])
    train(of_policy, range(3))
    before = parameters(of_policy)
    of = batch((3, 2), seed=9)
    expected = of_policy.logprobs(of)
    out = tmp_path / "out"
    of_policy.export(out)
    assert step_difference(before, parameters(of_policy)) == 0.0
    np.testing.assert_array_equal(of_policy.logprobs(of), expected)  # merging left no trace
    np.testing.assert_allclose(policy(out).logprobs(of), expected, rtol=0, atol=1e-4)
    config = json.loads((out / "config.json").read_text())
    source = json.loads((made / "config.json").read_text())
    assert config["rope_theta"] == source["rope_parameters"]["rope_theta"]
    lm = AutoModelForCausalLM.from_pretrained(out)
    assert lm.config.rope_parameters == source["rope_parameters"]
    assert lm.generation_config.eos_token_id == 0
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == of_policy.tokenizer.chat_template
    assert tokenizer("ab")["input_ids"] == list(of_policy.encode("ab"))
    assert {p.suffix for p in out.iterdir()} <= {".json", ".safetensors", ".jinja"}


def test_a_scaled_rope_is_exported_in_the_older_form_too(tmp_path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
    made = tiny_models.make_model("llama", tmp_path / "made", rope_parameters=rope)
    of_policy = policy(made)
    of_policy.export(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == 500.0
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    of = batch((3, 2))
    np.testing.assert_allclose(policy(tmp_path / "out").logprobs(of), of_policy.logprobs(of), rtol=0, atol=1e-5)


def test_bfloat16_exports_bfloat16(folder, tmp_path) -> None:
    policy(folder, dtype="bfloat16").export(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}


# -- folders that cannot be loaded


@pytest.fixture
def broken(folder, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(folder, path)
    return path


def remove(path, *patterns: str) -> None:
    for pattern in patterns:
        for file in path.glob(pattern):
            file.unlink()


def test_no_such_folder(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"model\.path '.*nowhere' is not a folder"):
        policy(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"model\.path is empty"):
        policy("")


def test_no_config(broken) -> None:
    remove(broken, "config.json")
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        policy(broken)


def test_no_tokenizer(broken) -> None:
    remove(broken, "tokenizer*", "*.jinja")
    with pytest.raises(ConfigError, match=r"has no tokenizer: expected one of tokenizer\.json"):
        policy(broken)


def test_no_safetensors(broken) -> None:
    remove(broken, "*.safetensors")
    torch.save({}, broken / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"the model of model\.path .* cannot be loaded: OSError.*safetensors"):
        policy(broken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "perceptive_llama"}, "perceptive_llama"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1.0}}, "spiral"),
        ({"num_hidden_layers": 3}, r"lacks \d+ weights of LlamaForCausalLM, the first model\.layers\.2"),
    ],
)
def test_configurations_nobody_knows(broken, change, message: str) -> None:
    config = json.loads((broken / "config.json").read_text()) | change
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        policy(broken)


def test_messages_without_a_chat_template(broken) -> None:
    remove(broken, "*.jinja")
    of_policy = policy(broken)
    assert of_policy.decode(of_policy.encode("hello you")) == "hello you"
    with pytest.raises(ConfigError, match="has no chat template: give prompts as text"):
        of_policy.encode([{"role": "user", "content": "hello"}])


def test_adapters_that_match_nothing_or_the_head(folder) -> None:
    with pytest.raises(ConfigError, match=r"adapters for \('nothing',\).*cannot be loaded"):
        policy(folder, lora_rank=2, lora_targets=("nothing",))
    with pytest.raises(ConfigError, match=r"has 'lm_head', the head or the embedding .* leave it out"):
        policy(folder, lora_rank=2, lora_targets=("lm_head", "q_proj"))


def test_a_device_that_is_not_there(folder) -> None:
    with pytest.raises(ConfigError, match=r"model\.device is 'cuda:77', which this machine does not have"):
        policy(folder, device="cuda:77")


def test_a_head_that_does_something_unknown_is_refused(folder, monkeypatch) -> None:
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def warped(self, *args, **options):
        out = forward(self, *args, **options)
        out.logits = out.logits * 1.1
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", warped)
    with pytest.raises(ConfigError, match=r"log-probs of LlamaForCausalLM differ .* by up to [\d.]+ nat a token"):
        policy(folder)


def test_packing_that_turns_out_wrong_goes_plain_and_says_so(folder, monkeypatch, caplog) -> None:
    from gvpo_torch import model

    honest = model._attention
    leaky = lambda segments: None if int(segments.max()) > 1 else honest(segments)
    monkeypatch.setattr(model, "_attention", leaky)
    with caplog.at_level(logging.INFO, "gvpo.torch"):
        of_policy = policy(folder)
    assert not of_policy.packed
    assert "plain rows (packed log-probs differ by up to" in caplog.text
    with pytest.raises(ConfigError, match=r"model\.layout is packed, which is not exact"):
        policy(folder, layout="packed")


def test_describe_is_plain(folder) -> None:
    facts = policy(folder, lora_rank=2).describe()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["trainable_parameters"] < facts["parameters"]
    assert set(facts["versions"]) == {"torch", "transformers", "accelerate", "peft"}
