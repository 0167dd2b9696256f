"""A teacher with another tokenizer, architecture or backend, through every backend that trains."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import trainer_backends
from trainer_backends import Backend

from gvpo_core.training.config import (
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RolloutConfig,
    RunConfig,
    TeacherConfig,
)
from gvpo_core.training.loop import train
from gvpo_core.training.policy import Batch
from gvpo_core.training.policy.load import load_policy

PRESENT = trainer_backends.present()
if not PRESENT:
    pytest.skip("no backend of a language model is among the subjects", allow_module_level=True)

CHAT = [{"role": "user", "content": "say a"}]
ROWS = [{"prompt": CHAT}, {"prompt": "say b:"}, {"prompt": "say c:"}]


@pytest.fixture(scope="module", params=PRESENT, ids=lambda backend: backend.name)
def backend(request) -> Backend:
    return request.param


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    return tiny_models.write_model("llama", tmp_path_factory.mktemp("student"), spread=0.2)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """Another family, whose tokenizer has other ids and a token for each of three pairs of characters."""
    from tokenizers import Tokenizer

    folder = tiny_models.write_model("qwen2", tmp_path_factory.mktemp("teacher"), seed=1, vocab_size=128)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    special = len(tiny_models.SPECIAL)
    ids = content["model"]["vocab"]
    size = len(ids)
    ids = {token: i if i < special else special + (7 * (i - special)) % (size - special) for token, i in ids.items()}
    pairs = {"ab": size, "th": size + 1, "say": size + 2}
    content["model"]["vocab"] = ids | pairs
    content["pre_tokenizer"]["pattern"] = {"Regex": r"ab|th|say|[\s\S]"}
    for added in content["added_tokens"]:
        added["id"] = ids[added["content"]]
    path.write_text(json.dumps(content))
    tokens = Tokenizer.from_file(str(path)).encode("say that, ab").tokens
    assert tokens == ["say", " ", "th", "a", "t", ",", " ", "ab"], "the teacher reads other tokens"
    return folder


def config_of(folder: Path, backend: Backend, student: Path, teacher: Path, **teaching) -> Config:
    return Config(
        run=RunConfig(folder=str(folder), backend=backend.name, steps=2, show_every=0),
        model=ModelConfig(path=str(student), device="cpu"),
        data=DataConfig(train="given", shuffle=False),
        rollout=RolloutConfig(prompts=3, responses=4, max_tokens=6),
        teacher=TeacherConfig(path=str(teacher), **teaching),
        objective=ObjectiveConfig(beta=1.0, reference="teacher"),
        optimizer=OptimizerConfig(learning_rate=1e-3),
    )


def texts(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]


def test_the_reference_is_what_the_teacher_gives_to_the_text(tmp_path, backend, student, teacher, capsys):
    config = config_of(tmp_path, backend, student, teacher)
    policy = load_policy(config)
    stepped = []
    update = policy.update

    def watched(batch, coefficients, *, scored=None):
        factors = np.zeros(len(batch))

        def seen(values, rows):
            factors[rows] = coefficients(values, rows)
            return factors[rows]

        logprobs = np.asarray(policy.logprobs(batch), np.float64)
        done = update(batch, seen, scored=scored)
        stepped.append((logprobs, factors))
        return done

    policy.update = watched
    train(config, policy, train_rows=ROWS)
    logprobs, factors = stepped[0]
    lines = [line for line in texts(tmp_path) if line["step"] == 1]
    assert len(lines) == 12 == len(factors)
    other = load_policy(replace(config, model=ModelConfig(path=str(teacher), device="cpu")))
    want = []
    for line in lines:
        prompt = ROWS[line["row"]]["prompt"]
        asked = other.encode(prompt)
        (response,) = other.encode_responses(prompt, [line["response"]], [line["finished"]])
        want.append(float(other.logprobs(Batch([asked], [response.tokens], [0]))[0]))
    s = logprobs - np.asarray(want)
    w = -(s - s.reshape(3, 4).mean(axis=1).repeat(4))
    np.testing.assert_allclose(factors, w / (3 * 3), rtol=2e-4, atol=2e-5)
    assert "teacher" in capsys.readouterr().out


def test_the_student_comes_closer_to_its_teacher(tmp_path, backend, student, teacher, capsys):
    """On recorded responses, without a reward."""
    config = config_of(tmp_path, backend, student, teacher)
    config = replace(config, run=replace(config.run, steps=12), optimizer=OptimizerConfig(learning_rate=1e-2))
    rows = [row | {"responses": ["that", "ab", "a cab", "th"]} for row in ROWS]
    train(config, load_policy(config), train_rows=rows)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in records if r["kind"] == "train"]
    assert losses[-1] < 0.2 * losses[0]


def test_a_teacher_without_a_chat_template_is_named(tmp_path, backend, student, teacher):
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in teacher.iterdir():
        if "template" not in path.name:
            (bare / path.name).write_bytes(path.read_bytes())
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    config = config_of(tmp_path / "run", backend, student, bare)
    with pytest.raises(ConfigError, match=r"the tokenizer of .*bare.* has no chat template"):
        train(config, load_policy(config), train_rows=ROWS)
