"""Families of gvpo_mlx, made tiny by transformers: log-probs, what is trained, and exports that transformers reads."""

import json

import mlx_policies
import numpy as np
import pytest
import tiny_models
from batches import SMOOTH, batch, coefficients_of
from mlx_families import EXACT, MULTIMODAL, REFUSED
from mlx_policies import policy
from required import require

require("mlx.core", "mlx_lm", "torch", "transformers", subject="parity")

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from gvpo_core.training.config import ConfigError
from gvpo_core.training.sampling import Sampling, row_seed

OF = batch((3, 2), vocabulary=90)


def made(config, kind, folder):
    """Saves a random model of transformers with its tokenizer; what its file gives when it is loaded again."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind.from_config(config)
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if tensor.is_floating_point() and tensor.ndim == 1 and "freq" not in name:
                    tensor.add_(0.1 * torch.randn_like(tensor))
    model.save_pretrained(folder)
    tiny_models.make_tokenizer().save_pretrained(folder)
    return read(kind, folder)


def read(kind, folder):
    model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not {name: found for name, found in info.items() if found}, "transformers left out or made up weights"
    return model.eval()


def scores(model) -> np.ndarray:
    """(N,) float64 by transformers, a row at a time."""
    found = []
    with torch.inference_mode():
        for prompt, response in zip(OF.prompts, OF.responses, strict=True):
            logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            logprobs = logits.double().log_softmax(-1)
            found.append(float(logprobs.gather(1, torch.tensor(response)[:, None]).sum()))
    return np.asarray(found)


def tiny(name: str, own):
    settings = tiny_models.SMALL | {"model_type": name.partition("-")[0], "initializer_range": 0.3} | own
    return AutoConfig.for_model(**settings)


@pytest.mark.slow_on("qwen3_next")
@pytest.mark.parametrize("name", EXACT)
def test_a_family_is_loaded_trained_and_exported_as_transformers_has_it(name: str, tmp_path) -> None:
    config = tiny(name, EXACT[name])
    theirs = made(config, AutoModelForCausalLM, tmp_path / "model")
    ours = policy(tmp_path / "model", **SMOOTH)
    np.testing.assert_allclose(ours.logprobs(OF), scores(theirs), rtol=0, atol=1e-4)
    assert ours.scorer.loaded.compared.startswith("a tiny twin agrees")
    trained = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters() if p.requires_grad)
    assert sum(p.size for p in ours.scorer.parameters) == trained
    before = ours.logprobs(OF)
    ours.update(OF, coefficients_of(OF))
    after = ours.logprobs(OF)
    assert np.abs(after - before).max() > 0.1
    ours.export(tmp_path / "out")
    np.testing.assert_allclose(scores(read(AutoModelForCausalLM, tmp_path / "out")), after, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["mistral-window", "gemma2", "qwen2-window", "gemma3_text"])
def test_samples_beyond_a_window_are_scored_as_they_were_drawn(name: str, tmp_path, monkeypatch) -> None:
    model = made(tiny(name, EXACT[name]), AutoModelForCausalLM, tmp_path / "model")
    prompts = [(5, 6, 7), tuple(range(20, 32))]
    drawn, sums = mlx_policies.sample(
        policy(tmp_path / "model"), prompts, [[row_seed(1, 0, 0)], [row_seed(1, 1, 0)]], Sampling(14), monkeypatch
    )
    responses = [row[0].tokens for row in drawn]
    assert max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True)) > 2 * 6
    found = []
    with torch.inference_mode():
        for prompt, response in zip(prompts, responses, strict=True):
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()
            found.append(float(logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()))
    np.testing.assert_allclose(sums, found, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", MULTIMODAL)
def test_the_text_of_a_multimodal_model_is_trained(name: str, tmp_path) -> None:
    """With every setting in `text_config`, and with those alone that are not transformers' defaults, as on the hub."""
    own = MULTIMODAL[name]
    text = tiny_models.SMALL | {"initializer_range": 0.3} | own["text_config"]
    theirs = made(
        AutoConfig.for_model(name, **(own | {"text_config": text})), AutoModelForImageTextToText, tmp_path / "model"
    )
    right = scores(theirs)
    np.testing.assert_allclose(policy(tmp_path / "model").logprobs(OF), right, rtol=0, atol=1e-4)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    usual = AutoConfig.for_model(config["text_config"]["model_type"]).to_dict()
    lean = {k: v for k, v in config["text_config"].items() if k == "model_type" or "rope" in k or usual.get(k) != v}
    assert len(lean) < len(config["text_config"])
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"text_config": lean}))
    ours = policy(tmp_path / "model", **SMOOTH)
    np.testing.assert_allclose(ours.logprobs(OF), right, rtol=0, atol=1e-4)
    assert not any("vision" in parameter for parameter in ours.scorer.names)
    assert ours.describe().context == 128
    ours.update(OF, coefficients_of(OF))
    ours.export(tmp_path / "out")
    exported = read(AutoModelForImageTextToText, tmp_path / "out")
    np.testing.assert_allclose(scores(exported), ours.logprobs(OF), rtol=0, atol=1e-3)
    before = dict(theirs.named_parameters())
    for parameter, value in exported.named_parameters():
        if "vision" in parameter:
            torch.testing.assert_close(value, before[parameter], rtol=0, atol=0)


@pytest.mark.parametrize(("name", "readable"), [("qwen3_moe", True), ("mixtral", False)])
def test_quantized_experts_are_exported_unpacked(name: str, readable: bool, tmp_path, caplog) -> None:
    """From MLX's own format: one by one where mlx-lm reads those back, and otherwise in that format, with a word."""
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 32, "head_dim": 16}
    made(tiny(name, tiny_models.EXPERTS | sizes), AutoModelForCausalLM, tmp_path / "model")
    mlx_policies.quantize(tmp_path / "model")
    ours = policy(tmp_path / "model", lora_rank=2, lora_targets=("q_proj",), **(SMOOTH | {"learning_rate": 3.0}))
    assert ours.scorer.loaded.compared.startswith("a tiny twin agrees")
    assert any(str(m.weight.dtype) == "mlx.core.uint32" for m in ours.scorer.lm.modules() if "weight" in m)
    start = ours.logprobs(OF)
    ours.update(OF, coefficients_of(OF))
    assert np.abs(ours.logprobs(OF) - start).max() > 1e-3
    ours.export(tmp_path / "out")
    np.testing.assert_allclose(policy(tmp_path / "out").logprobs(OF), ours.logprobs(OF), rtol=0, atol=1e-3)
    assert ("MLX's own format" in caplog.text) != readable
    if readable:
        exported = read(AutoModelForCausalLM, tmp_path / "out")
        np.testing.assert_allclose(scores(exported), ours.logprobs(OF), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", REFUSED)
def test_what_mlx_lm_computes_otherwise_is_refused(name: str, tmp_path) -> None:
    own, reason = REFUSED[name]
    made(tiny(name, own), AutoModelForCausalLM, tmp_path / "model")
    with pytest.raises(ConfigError, match=reason):
        policy(tmp_path / "model")


def test_a_setting_that_is_read_otherwise_shows_in_the_twin(tmp_path, monkeypatch) -> None:
    """mlx-lm takes RoPE for GraniteMoeHybrid where `position_embedding_type` is null: 12 nat a response."""
    from gvpo_mlx import settings, twin

    config = tiny("granitemoehybrid", EXACT["granitemoehybrid-null"])
    made(config, AutoModelForCausalLM, tmp_path / "model")
    twin._difference.cache_clear()
    plain = settings.other_words
    monkeypatch.setattr(settings, "other_words", lambda c: plain(c) and plain(c) | {"position_embedding_type": "rope"})
    with pytest.raises(ConfigError, match="log-probs of a tiny model with its settings differ by up to"):
        policy(tmp_path / "model")
    twin._difference.cache_clear()


def test_a_head_of_its_own_in_a_model_that_mlx_lm_always_ties_is_refused(tmp_path) -> None:
    """Without weights for it transformers starts it at random; with equal ones it trains two matrices, mlx-lm one."""
    folder = tiny_models.make_model("gemma2", tmp_path / "model")
    assert "lm_head" not in policy(folder).scorer.lm
    with pytest.raises(ConfigError, match=r"tie_word_embeddings = false, and mlx-lm's gemma2 always ties its head"):
        policy(tiny_models.changed(folder, tmp_path, tie_word_embeddings=False))
