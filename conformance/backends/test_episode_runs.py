"""Episodes through every backend: a real tiny model plays, trains on its own tokens, resumes and trains on a record."""

import contextlib
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import decoder_families
import families
import numpy as np
import pytest
import tiny_models
import trainer_backends
from places import DEVICE, SUPPORT
from trainer_backends import Backend

from gvpo_core.training import cli
from gvpo_core.training.config import (
    Config,
    DataConfig,
    EnvironmentConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    RunConfig,
)
from gvpo_core.training.loop import train
from gvpo_core.training.policy.load import load_policy
from gvpo_core.training.watch.console import Console

PRESENT = trainer_backends.present()
if not PRESENT:
    pytest.skip("no backend of a language model is among the subjects", allow_module_level=True)

ENDS = [0, *range(50, 90)]  # so many ids end a turn that a random model takes several turns


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tiny_models.write_model("llama", tmp_path_factory.mktemp("model"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ENDS}))
    return folder


@pytest.fixture(scope="module")
def rewriting(model, tmp_path_factory) -> Path:
    """The model with a chat template that leaves out the first letter of the assistant's earlier turns."""
    folder = tmp_path_factory.mktemp("rewriting") / "model"
    shutil.copytree(model, folder)
    shown = "{{ m['content'][1:] if m['role'] == 'assistant' else m['content'] }}"
    template = (folder / "chat_template.jinja").read_text()
    assert "{{ m['content'] }}" in template
    (folder / "chat_template.jinja").write_text(template.replace("{{ m['content'] }}", shown))
    return folder


def run(folder: Path, backend: Backend, model: Path, *, steps: int = 2, train_file: str = "given"):
    """Plays and trains; the policy, its batches, and the steps' records."""
    config = Config(
        run=RunConfig(folder=str(folder), backend=backend.name, steps=steps, checkpoint_every=1, show_every=0),
        model=ModelConfig(path=str(model), device=DEVICE, dtype="float32"),
        data=DataConfig(train=train_file, shuffle=False),
        rollout=RolloutConfig(prompts=2, responses=4, max_tokens=60),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        environment=EnvironmentConfig(
            path=f"{SUPPORT / 'episode_games.py'}:Guess", max_turns=3, turn_tokens=12, workers=1, memory=0.0
        ),
    )
    recorded = train_file != "given"
    config = replace(config, environment=EnvironmentConfig()) if recorded else config
    policy, batches = load_policy(config), []
    update = policy.update
    policy.update = lambda batch, *given, **options: batches.append(batch) or update(batch, *given, **options)
    rows = None if recorded else [{"secret": 3}, {"secret": 7}]
    rewards = None if recorded else {"short": lambda completions: [-0.05 * len(c[0]["content"]) for c in completions]}
    train(config, policy, train_rows=rows, rewards=rewards, console=Console(steps, stream=io.StringIO()))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return policy, batches, [r for line in lines if (r := json.loads(line))["kind"] == "train"]


@pytest.mark.slow_on("jax")
def test_a_model_plays_trains_resumes_and_trains_on_its_record(backend, model, tmp_path) -> None:
    policy, batches, whole = run(tmp_path / "whole", backend, model)
    batch = batches[0]
    masks = [m for m in batch.masks if m is not None]
    assert masks and whole[0]["turns/max"] == 3, "several turns"
    for response, mask in zip(batch.responses, batch.masks, strict=True):
        for place, mine in enumerate(mask or ()):
            if not mine and mask[place - 1]:
                assert response[place - 1] in ENDS, "context begins after a turn's end"
    assert whole[0]["length/mean"] < whole[0]["length/context"]
    assert whole[0]["kl"] == pytest.approx(0, abs=1e-4) and abs(whole[1]["kl"]) > 1e-4
    own = sum(sum(m) if m else len(r) for m, r in zip(batch.masks, batch.responses, strict=True))
    assert whole[0]["tokens/sampled"] == own
    run(tmp_path / "parts", backend, model, steps=1)
    resumed, _, parts = run(tmp_path / "parts", backend, model)
    left_out = (
        "time",
        "seconds",
        "share",
        "memory",
        "tokens_per_second",
        "machine",
        "episodes/seconds",
        "reward_seconds",
    )
    kept = [{k: v for k, v in r.items() if not k.startswith((*left_out, "policy/"))} for r in (*whole, *parts)]
    assert kept[:2] == kept[2:], "bit for bit"
    for name, value in backend.policies.parameters(policy).items():
        np.testing.assert_array_equal(value, backend.policies.parameters(resumed)[name])
    _, again, fed = run(tmp_path / "fed", backend, model, train_file=str(tmp_path / "whole/completions.jsonl"))
    assert again[0].responses == batch.responses and again[0].masks == batch.masks and again[0].prompts == batch.prompts
    for a, b in zip(whole, fed, strict=True):
        for key in ("loss", "gradient_norm"):
            assert b[key] == pytest.approx(a[key], rel=2e-4), key


@pytest.mark.slow_on("jax", "mlx")
def test_segments_of_a_model_s_episodes_are_trained_on_and_read_back(backend, rewriting, tmp_path) -> None:
    _, batches, whole = run(tmp_path / "whole", backend, rewriting)
    counts = [1 + len(segments) for segments in batches[0].later]
    assert {*counts} >= {1, 2, 3} and whole[0]["episodes/segments"] == pytest.approx(np.mean(counts))
    assert whole[0]["kl"] == pytest.approx(0, abs=1e-4) and abs(whole[1]["kl"]) > 1e-4
    _, again, fed = run(tmp_path / "fed", backend, rewriting, train_file=str(tmp_path / "whole/completions.jsonl"))
    assert again[0] == batches[0]
    for a, b in zip(whole, fed, strict=True):
        for key in ("loss", "gradient_norm", "length/mean"):
            assert b[key] == pytest.approx(a[key], rel=2e-4), key


REUSING = [backend for backend in PRESENT if backend.name in ("torch", "jax", "mlx")]


@pytest.mark.slow_on("jax")
@pytest.mark.parametrize("backend", REUSING, ids=lambda backend: backend.name)
@pytest.mark.parametrize("kind", ["model", "rewriting"])
def test_later_turns_compute_what_is_new_and_say_the_same(backend, kind, request, tmp_path, monkeypatch) -> None:
    model = request.getfixturevalue(kind)
    policy, _, [record] = run(tmp_path / "reusing", backend, model, steps=1)
    assert record["episodes/reused"] > record["episodes/prefilled"] / 4
    monkeypatch.setattr(type(policy), "reusing_prefixes", lambda self: contextlib.nullcontext())
    _, _, [anew] = run(tmp_path / "anew", backend, model, steps=1)
    assert "episodes/reused" not in anew
    said = [(tmp_path / name / "completions.jsonl").read_text() for name in ("reusing", "anew")]
    assert said[0] == said[1] and '"turns": 3' in said[0]


@pytest.mark.parametrize("backend", [b for b in PRESENT if b.name == "torch"], ids=lambda backend: backend.name)
@pytest.mark.parametrize(
    "family", ["gemma3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma4", "qwen3_5"))]
)
def test_a_checkpoint_of_text_and_images_plays_with_its_text(backend, family, tmp_path) -> None:
    model = families.make(family, tmp_path / "model")
    if family == "qwen3_5":
        model = decoder_families.make_qwen_with_images(
            tmp_path / "both", json.loads((model / "config.json").read_text())
        )
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": ENDS}))
    _, batches, [first, second] = run(tmp_path / "run", backend, model)
    assert "vision" in (model / "config.json").read_text() and first["turns/max"] == 3
    assert any(mask is not None for mask in batches[0].masks) and "episodes/reused" not in first
    assert first["kl"] == pytest.approx(0, abs=1e-4) and abs(second["kl"]) > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "rewriting"])
def test_two_processes_play_and_end_as_one_does(backend, kind, request, tmp_path) -> None:
    model = request.getfixturevalue(kind)
    (tmp_path / "rows.jsonl").write_text('{"secret": 3}\n{"secret": 7}\n{"secret": 5}\n')
    records = {}
    for processes in (1, 2):
        config = tmp_path / f"{processes}.toml"
        config.write_text(f"""
[run]
folder = "{tmp_path}/{processes}"
backend = "{backend.name}"
steps = 2
show_every = 0
[model]
path = "{model}"
device = "{DEVICE}"
[data]
train = "{tmp_path}/rows.jsonl"
[rollout]
prompts = 3
responses = 5
max_tokens = 60
[optimizer]
learning_rate = 1e-3
[environment]
path = "{SUPPORT / "episode_games.py"}:Guess"
max_turns = 3
turn_tokens = 3
workers = 1
memory = 0.0
""")
        if processes == 1:
            assert cli.main(["train", str(config)]) == 0
        else:
            status, output = backend.two_processes(config)
            assert status == 0, output[-3000:]
        for name in ("completions", "metrics"):
            lines = (tmp_path / f"{processes}/{name}.jsonl").read_text().splitlines()
            records[processes, name] = [json.loads(line) for line in lines]
    one, two = records[1, "completions"], records[2, "completions"]
    assert [c["episode"] for c in one] == [c["episode"] for c in two] and len(one) == 30
    assert kind == "model" or any(len(c.get("response_segments", ())) > 1 for c in one)
    assert len({c["turns"] for c in one}) > 1, "the ranks draw unequal numbers of turns"
    for a, b in zip(records[1, "metrics"], records[2, "metrics"], strict=True):
        for key in ("loss", "gradient_norm", "kl", "turns/mean", "episodes/tokens"):
            assert a.get(key) == pytest.approx(b.get(key), rel=2e-4, abs=1e-6), key
    assert records[1, "metrics"][0]["gradient_norm"] > 0
