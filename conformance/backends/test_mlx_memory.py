"""The core's estimate of memory from MLX's facts, against what MLX held at most in real runs; and the advice."""

import gc
import io
import json
from dataclasses import replace

import pytest
import tiny_models
from required import require

require(subject="mlx")

import mlx.core as mx
from gvpo_mlx import memory
from gvpo_mlx.model import load_scorer
from mlx_policies import policy

from gvpo_core.training.config import Config, ModelConfig, OptimizerConfig, RolloutConfig, RunConfig
from gvpo_core.training.data import Prompts
from gvpo_core.training.loop import train
from gvpo_core.training.policy.load import load_policy
from gvpo_core.training.policy.memory import advice, estimate_memory
from gvpo_core.training.sources import Sampled
from gvpo_core.training.watch.console import Console
from gvpo_core.training.watch.header import header

PROMPT = 40
RUNS = {  # what it holds at most -> model settings, prompts, responses, tokens a micro-batch
    "activations": ({}, 2, 4, 512),
    "recomputed": ({"gradient_checkpointing": True}, 2, 4, 512),
    "adapters": ({"lora_rank": 2}, 2, 4, 512),
    "cache": ({}, 2, 16, 72),
}


def configured(folder, run, model, prompts=2, responses=4, tokens=512):
    return Config(
        run=RunConfig(folder=str(run), backend="mlx", steps=2, checkpoint_every=0, show_every=0),
        model=ModelConfig(path=str(folder), device="cpu", **model),
        rollout=RolloutConfig(prompts=prompts, responses=responses, max_tokens=16),
        optimizer=OptimizerConfig(micro_batch_tokens=tokens),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "vocab_size": 256}
    return tiny_models.write_model("llama", tmp_path_factory.mktemp("llama"), spread=0.02, **sizes)


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(RUNS))
def test_a_run_holds_about_what_was_estimated(kind: str, folder, tmp_path) -> None:
    config = configured(folder, tmp_path / "run", *RUNS[kind])
    gc.collect()
    before = mx.get_active_memory()
    made = load_policy(config)
    estimated = estimate_memory(made.describe(), config, PROMPT)
    rows = [{"prompt": letter * PROMPT} for letter in "abcd"]
    rewards = {"r": lambda completions, **_: [float(len(c) % 5) for c in completions]}
    mx.reset_peak_memory()
    train(config, made, train_rows=rows, rewards=rewards, console=Console(2, stream=io.StringIO()))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = max(line.get("memory/peak", 0) for line in lines) - before
    learning = estimated.gradients + estimated.activations + estimated.head
    assert (estimated.sampling > learning) == (kind == "cache")
    assert measured == pytest.approx(estimated.peak - estimated.framework, rel=0.3), estimated._asdict()


def test_a_quantized_base_is_counted_by_its_stored_bytes(tmp_path) -> None:
    from mlx_lm.utils import quantize_model

    made = tiny_models.write_model("llama", tmp_path / "model", hidden_size=64, head_dim=16)
    scorer = load_scorer(ModelConfig(path=str(made)), 0)
    whole = memory.held(scorer.lm)
    for layer in scorer.lm.layers:
        layer.self_attn.rope = layer.self_attn.rope.inner
    lm, _ = quantize_model(scorer.lm, dict(scorer.config), group_size=32, bits=4)
    scorer.lm = lm
    lm.freeze()
    scorer.names = []
    facts = memory.facts(scorer, ModelConfig(lora_rank=2), 128, mx.Device(mx.cpu, 0))
    assert whole / 8 < facts.frozen == memory.held(lm) < whole / 3
    assert facts.advice == ""


def test_too_little_memory_is_reported_with_advice(folder, tmp_path, monkeypatch) -> None:
    made = policy(folder)
    config = configured(folder, tmp_path, {})
    said = advice(made.describe(), config)
    for what in ("optimizer.micro_batch_tokens (512)", "gradient_checkpointing", "lora_rank", "4 bits"):
        assert what in said
    source = Sampled(config, Prompts(["p"], [(1,) * PROMPT], [{}], dropped=0), [])
    assert "too much memory" not in header(config, made.describe(), source, None, [])
    facts = made.describe()
    small = header(config, replace(facts, memory=replace(facts.memory, device=2**20)), source, None, [])
    assert small["too much memory"].endswith(f"0.00 GiB available: {said}")
    assert not {"memory", "vocabulary"} & small.keys()
