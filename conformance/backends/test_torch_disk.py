"""What only gvpo_torch has on disk: shards, every family's export as transformers loads it, models it cannot trust."""

import json
import logging

import numpy as np
import pytest
import tiny_models
from batches import batch, step_difference, train
from required import require
from torch_policies import parameters, policy

require(subject="torch")

from gvpo_core.training.config import ConfigError

KINDS = {"full": {}, "lora": {"lora_rank": 2}}
FAMILIES = ("llama", "llama-tied-bias", "qwen3", "qwen3_moe", "phi3", "granite")
SETTINGS = {"learning_rate": 1e-3, "warmup": 2, "schedule": "cosine"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.make_model("llama-tied-bias", tmp_path_factory.mktemp("llama"))


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


@pytest.mark.parametrize("name", ["llama-tied-bias", "qwen3_moe", "gpt2", "gpt_oss"])
def test_an_export_has_the_tensors_that_transformers_stores(name: str, tmp_path) -> None:
    from safetensors.torch import load_file

    of_policy = policy(tiny_models.make_model(name, tmp_path / "made"))
    of_policy.scorer.base.save_pretrained(tmp_path / "theirs")
    of_policy.export(tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / of / "model.safetensors") for of in ("theirs", "ours"))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert tensor.dtype == ours[key].dtype
        np.testing.assert_array_equal(ours[key], tensor, err_msg=key)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_an_export_holds_a_layer_and_a_file_and_not_the_model(name: str, tmp_path, monkeypatch) -> None:
    from live_bytes import LiveBytes

    from gvpo_core.training.policy import checkpoint

    of_policy = policy(tiny_models.make_model(name, tmp_path / "made", num_hidden_layers=10), dtype="bfloat16")
    model = sum(p.nbytes for p in of_policy.scorer.parameters())  # float32; an export has half of its bytes
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", model // 20)
    with LiveBytes() as live:
        of_policy.export(tmp_path / "out")
    assert live.most <= model + 0.35 * model / 2
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 5
    of = batch((3, 2), seed=9)
    scored = policy(tmp_path / "out", dtype="bfloat16").logprobs(of)
    np.testing.assert_allclose(scored, of_policy.logprobs(of), rtol=0.02, atol=0.5)


def test_a_head_that_does_something_unknown_is_refused(folder, monkeypatch) -> None:
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def warped(self, *args, **options):
        out = forward(self, *args, **options)
        out.logits = out.logits * 1.1
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", warped)
    with pytest.raises(ConfigError, match="logits of LlamaForCausalLM are not its head's products, scaled and capped"):
        policy(folder)


def test_packing_that_turns_out_wrong_goes_plain_and_says_so(folder, monkeypatch, caplog) -> None:
    from gvpo_torch import model

    honest = model._attention
    leaky = lambda segments, last: None if int(segments.max()) > 1 else honest(segments, last)
    monkeypatch.setattr(model, "_attention", leaky)
    with caplog.at_level(logging.INFO, "gvpo.torch"):
        of_policy = policy(folder)
    assert not of_policy.packed
    assert "plain rows (packed log-probs differ by up to" in caplog.text
    with pytest.raises(ConfigError, match=r"model\.layout is packed, which is not exact"):
        policy(folder, layout="packed")
