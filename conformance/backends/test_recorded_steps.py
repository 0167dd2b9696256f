"""Recorded groups through every backend: the float64 reference's step, and a run repeated from its completions."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import trainer_backends
from cases import Case
from places import DEVICE, ROOT
from reference import gvpo
from trainer_backends import Backend
from trainer_runs import write_run

from gvpo_core.training import cli
from gvpo_core.training.config import Config, DataConfig, ModelConfig, ObjectiveConfig, RolloutConfig, RunConfig
from gvpo_core.training.loop import train
from gvpo_core.training.policy import Batch
from gvpo_core.training.policy.load import load_policy

PRESENT = trainer_backends.present()
if not PRESENT:
    pytest.skip("no backend of a language model is among the subjects", allow_module_level=True)

BETA = 0.3
CHAT = [{"role": "user", "content": "say a"}]
ROWS = [  # ragged; chat and text; texts and token ids; cut responses; an unscored one; a group with one score
    {"prompt": CHAT, "responses": ["ab", "b", "ccc"], "rewards": [1.0, 0.0, 0.25]},
    {"prompt": "say b:", "responses": ["dd", "e"], "rewards": [0.5, 1.5], "finished": [False, True]},
    {"prompt": "say c:", "responses": ["f", "gg", "h", "ii"], "rewards": [0.0, None, 1.0, 0.0]},
    {"prompt": "say d:", "responses": ["f", "g"], "rewards": [None, 1.0]},
    {"prompt": "say e:", "responses": [[9, 11, 0], [12]], "rewards": [2.0, 1.0]},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_models.write_model("llama", tmp_path_factory.mktemp("model"))


def config_of(folder: Path, backend: Backend, model: Path) -> Config:
    return Config(
        run=RunConfig(folder=str(folder), backend=backend.name, steps=2, show_every=0),
        model=ModelConfig(path=str(model), device=DEVICE, dtype="float32"),
        data=DataConfig(train="given", shuffle=False),
        rollout=RolloutConfig(prompts=4, max_tokens=8),
        objective=ObjectiveConfig(beta=BETA),
    )


def test_the_step_equals_the_float64_reference(tmp_path, backend, model, capsys):
    config = config_of(tmp_path, backend, model)
    policy = load_policy(config)
    stepped: list[tuple[Batch, np.ndarray, np.ndarray, np.ndarray]] = []
    update = policy.update

    def watched(batch, coefficients, *, scored=None):
        logprobs, reference = policy.logprobs(batch), policy.logprobs(batch, reference=True)
        factors = np.zeros(len(batch))

        def seen(values, rows):
            factors[rows] = coefficients(values, rows)
            return factors[rows]

        done = update(batch, seen, scored=scored)
        stepped.append((batch, np.asarray(logprobs, np.float64), np.asarray(reference, np.float64), factors))
        return done

    policy.update = watched
    policy.generate = None  # nothing is sampled
    train(config, policy, train_rows=ROWS)
    assert len(stepped) == 2
    batch = stepped[0][0]
    assert list(map(len, batch.responses))[:3] == [3, 2, 4], "a finished text has its end token"
    closing = batch.responses[0][-1]
    assert closing == batch.responses[1][-1] == 0, "the template's own is the tokenizer's EOS here"
    assert batch.responses[3] == tuple(policy.encode("dd")) and batch.responses[4][-1] == 0
    assert batch.responses[-2:] == [(9, 11, 0), (12,)]
    rewards = np.asarray([1.0, 0.0, 0.25, 0.5, 1.5, 0.0, 1.0, 0.0, 2.0, 1.0])
    groups = np.asarray([0] * 3 + [1] * 2 + [2] * 3 + [3] * 2)
    for batch, logprobs, reference, factors in stepped:
        assert len(batch) == len(rewards)
        case = Case("recorded", logprobs, reference, logprobs, rewards, groups, beta=BETA, num_groups=4)
        np.testing.assert_allclose(factors, gvpo(case)["gvpo_coefficients"], rtol=1e-4, atol=2e-6)
    assert np.abs(stepped[1][1] - stepped[0][1]).max() > 0, "the policy moved"
    assert "1 groups skipped" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow_on("jax")
def test_a_run_fed_from_its_own_completions_takes_the_same_steps(tmp_path, backend, model, capsys):
    config = write_run(tmp_path / "a", backend, model, steps=4, extra="", model_extra="")
    chats = [{"prompt": [{"role": "user", "content": f"say {w}"}]} for w in ("a", "bee", "code")]
    (tmp_path / "a" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    own = (tmp_path / "a" / "reward.py").read_text()
    (tmp_path / "a" / "reward.py").write_text(own.replace("completions]", "(c[0]['content'] for c in completions)]"))
    assert cli.main(["train", str(config)]) == 0
    written = [json.loads(line) for line in (tmp_path / "a" / "run" / "completions.jsonl").read_text().splitlines()]
    assert sum("messages" in row for row in written if row["kind"] == "train") == 4 * 2, "once a group"
    fed = tmp_path / "b.toml"
    text = config.read_text().replace(
        f'train = "{tmp_path}/a/train.jsonl"', f'train = "{tmp_path}/a/run/completions.jsonl"'
    )
    fed.write_text(text.replace(f'folder = "{tmp_path}/a/run"', f'folder = "{tmp_path}/b"'))
    assert cli.main(["train", str(fed)]) == 0
    first, second = (
        [json.loads(line) for line in (tmp_path / f / "metrics.jsonl").read_text().splitlines()] for f in ("a/run", "b")
    )
    first, second = ([r for r in records if r["kind"] == "train"] for records in (first, second))
    assert len(first) == len(second) == 4
    for a, b in zip(first, second, strict=True):
        assert b["tokens/sampled"] == 0 and a["length/mean"] == b["length/mean"] and a["truncated"] == b["truncated"]
        assert a["reward/mean"] == b["reward/mean"]
        for key in ("loss", "gradient_norm", "loss/reward_variance"):
            assert b[key] == pytest.approx(a[key], rel=2e-4), key


@pytest.mark.parametrize("source", ["example", "page"])
def test_the_example_and_the_page_run(source, tmp_path, backend, model, capsys, monkeypatch):
    if backend.name == "jax":
        pytest.skip("its steps are above; here it would only compile other shapes")
    config = ROOT / "examples" / "recorded" / "config.toml"
    options = [
        "--model.path",
        str(model),
        "--model.device",
        DEVICE,
        "--model.dtype",
        "float32",
        "--run.backend",
        backend.name,
    ]
    if source == "page":
        page = (ROOT / "docs" / "recorded.md").read_text(encoding="utf-8")
        [toml], [line] = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("toml", "json"))
        config = tmp_path / "config.toml"
        config.write_text(toml)
        (tmp_path / "groups.jsonl").write_text(line)
        options += ["--data.train", str(tmp_path / "groups.jsonl")]
    monkeypatch.chdir(ROOT)
    options += ["--run.folder", str(tmp_path / "run"), "--run.steps", "4", "--optimizer.learning_rate", "0.003"]
    assert cli.main(["train", str(config), *options]) == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len([r for r in records if r["kind"] == "train"]) == 4
    losses = [r["eval/loss"] for r in records if r["kind"] == "eval"]
    assert not losses or losses[-1] < losses[0]


@pytest.mark.slow
def test_two_processes_end_where_one_does(tmp_path, backend, model, capfd, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    results = []
    for name in ("one", "two"):
        config = write_run(tmp_path / name, backend, model, steps=3, extra="", model_extra="")
        (tmp_path / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[1:4]))
        text = config.read_text().replace(f'evaluation = "{tmp_path}/{name}/train.jsonl"', 'evaluation = ""')
        config.write_text(text.partition("[rewards")[0])
        if name == "one":
            assert cli.main(["train", str(config)]) == 0
        else:
            status, output = backend.two_processes(config)
            assert status == 0, output
        lines = (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()
        results.append([r for line in lines if (r := json.loads(line))["kind"] == "train"])
    for a, b in zip(*results, strict=True):
        for key in ("loss", "gradient_norm", "reward/mean", "log_ratio"):
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-5), key
