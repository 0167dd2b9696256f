"""A teacher with another tokenizer, architecture or backend, through every backend that trains."""

import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import trainer_backends
from echo_server import EchoServer
from places import DEVICE
from trainer_backends import Backend
from trainer_runs import write_run

from gvpo_core.training.cli import main
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
from gvpo_core.training.policy.memory import estimate_memory
from gvpo_core.training.samplers import SamplerError
from gvpo_core.training.sampling import TRAIN, row_seed
from gvpo_core.training.teacher import load_teacher

PRESENT = trainer_backends.present()
if not PRESENT:
    pytest.skip("no backend of a language model is among the subjects", allow_module_level=True)

CHAT = [{"role": "user", "content": "say a"}]
ROWS = [{"prompt": CHAT}, {"prompt": "say b:"}, {"prompt": "say c:"}]


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
        model=ModelConfig(path=str(student), device=DEVICE, dtype="float32"),
        data=DataConfig(train="given", shuffle=False),
        rollout=RolloutConfig(prompts=3, responses=4, max_tokens=6),
        teacher=TeacherConfig(path=str(teacher), **({"dtype": "float32"} | teaching)),
        objective=ObjectiveConfig(beta=1.0, reference="teacher"),
        optimizer=OptimizerConfig(learning_rate=1e-3),
    )


def texts(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]


@pytest.mark.slow_on("jax")
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
    other = load_policy(replace(config, model=ModelConfig(path=str(teacher), device=DEVICE, dtype="float32")))
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


@pytest.mark.slow_on("jax")
def test_the_teacher_draws_beside_the_student_in_one_group(tmp_path, backend, student, teacher, scoring, capsys):
    """Two of four responses are the teacher's text, in the student's tokens."""
    config = config_of(tmp_path, backend, student, teacher, dtype="float32")
    rollout = replace(config.rollout, sampler="teacher", own_responses=2)
    config = replace(config, run=replace(config.run, steps=1), rollout=rollout)
    policy = load_policy(config)
    train(config, policy, train_rows=ROWS)
    lines = sorted(texts(tmp_path), key=lambda line: line["group"])  # the policy's own first
    assert [line["group"] for line in lines] == [0] * 4 + [1] * 4 + [2] * 4
    asked = [tuple(scoring.encode(row["prompt"])) for row in ROWS]
    seeds = [[row_seed(config.run.seed, TRAIN, 1, group, i) for i in range(2)] for group in range(3)]
    drawn = [[scoring.decode(r.tokens) for r in many] for many in scoring.generate(asked, seeds, rollout.sampling)]
    for group in range(3):
        mine, theirs = lines[4 * group : 4 * group + 2], lines[4 * group + 2 : 4 * group + 4]
        cut = [policy.decode(policy.encode_responses("", [text], [False])[0].tokens[:6]) for text in drawn[group]]
        assert [line["response"] for line in theirs] == cut != [line["response"] for line in mine]
    (record,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][-1:]
    assert record["responses/lost"] == 0 == record["teacher/unread"] and record["gradient_norm"] > 0
    assert "sampler the teacher, " in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_two_processes_with_a_teacher_that_draws_take_the_steps_of_one(tmp_path, backend, student, teacher):
    """With copies of it; where the ranks may hold it together the run is refused."""
    drawn, norms = [], []
    for name in ("one", "two"):
        taught = f'[teacher]\npath = "{teacher}"\ndtype = "float32"'
        config = write_run(tmp_path / name, backend, student, steps=2, extra=taught, model_extra="")
        text = config.read_text().replace("[rollout]", '[rollout]\nsampler = "teacher"\nown_responses = 2')
        config.write_text(text.replace("[objective]", '[objective]\nreference = "teacher"').replace("every = 5", ""))
        if name == "two":
            status, output = backend.two_processes(config)
            if backend.name != "torch":
                assert status == 2 and "needs a complete teacher on each rank, and the 2 ranks" in output
                return
            assert status == 0, output
        else:
            assert main(["train", str(config)]) == 0
        drawn.append([line["response"] for line in texts(tmp_path / name / "run") if line["kind"] == "train"])
        records = [json.loads(line) for line in (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()]
        norms.append([r["gradient_norm"] for r in records if r["kind"] == "train"])
    assert sorted(drawn[0]) == sorted(drawn[1]) and len(drawn[0]) == 2 * 12
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-4)


@pytest.mark.slow_on("jax")
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


def test_a_teacher_is_held_once_in_its_dtype(tmp_path, backend, student, teacher):
    """Without moments, and the estimate of memory knows it."""
    config = config_of(tmp_path, backend, student, teacher, dtype="bfloat16")
    policy = load_policy(config)
    taught = load_teacher(config, policy)
    facts, scorer = taught.facts, taught.scorer
    size = 2 * facts.parameters
    assert facts.dtype == "bfloat16" and facts.trainable_parameters == 0
    assert backend.policies.held_bytes(scorer) == pytest.approx(size, rel=0.05)  # tables of RoPE
    assert estimate_memory(policy.describe(), config, 8, facts).teacher == pytest.approx(size, rel=0.05)
    batch = Batch([(5, 6, 7), (5, 6, 7)], [(8, 9, 10, 0), (11, 0)], [0, 0])
    plain = load_policy(replace(config, model=ModelConfig(path=str(teacher), device=DEVICE, dtype="float32"))).logprobs(
        batch
    )
    apart = np.abs(scorer.logprobs(batch) - plain).max()
    assert 1e-4 < apart < 0.5
    with pytest.raises(RuntimeError, match="loaded with updates = 0: it scores and samples, and is not trained"):
        scorer.update(batch, lambda logprobs, rows: logprobs)


def served_config(config: Config, server: EchoServer, **teaching) -> Config:
    return replace(
        config, teacher=replace(config.teacher, url=server.url, model=server.name, pause=0.01, tries=3, **teaching)
    )


@pytest.fixture(scope="module")
def scoring(backend, teacher):
    """The teacher as a policy of this backend."""
    return load_policy(
        Config(
            run=RunConfig(backend=backend.name), model=ModelConfig(path=str(teacher), device=DEVICE, dtype="float32")
        )
    )


@pytest.mark.slow_on("jax")
def test_a_teacher_behind_a_url_takes_the_steps_of_a_local_one(
    tmp_path, backend, student, teacher, scoring, capsys, monkeypatch
):
    """Failed requests are repeated; the key is sent and stands in no file."""
    monkeypatch.setenv("TEACHER_KEY", "s3cret-of-teacher")
    local = config_of(tmp_path / "local", backend, student, teacher)
    want = load_policy(local)
    train(local, want, train_rows=ROWS)
    with EchoServer(scoring, "big", faults=[None, 503, "garbage", 429]) as server:
        config = served_config(local, server, api_key="$TEACHER_KEY")
        config = replace(config, run=replace(config.run, folder=str(tmp_path / "served")))
        policy = load_policy(config)
        train(config, policy, train_rows=ROWS)
    assert len(server.asked) == 1 + 2 * 12 + 3, "one check, two steps of 12 responses, three tries again"
    assert all(body["echo"] and body["max_tokens"] == 0 for body in server.asked)
    assert server.keys == {"Bearer s3cret-of-teacher"}
    assert f"big at {server.url}, tokenizer of {teacher}" in " ".join(capsys.readouterr().out.split())
    for file in (tmp_path / "served").rglob("*"):
        assert not file.is_file() or b"s3cret-of-teacher" not in file.read_bytes(), file
    prompts = [policy.encode(row["prompt"]) for row in ROWS]
    batch = Batch(prompts, [(5, 6), (7, 8), (9,)], [0, 1, 2])
    np.testing.assert_allclose(policy.logprobs(batch), want.logprobs(batch), atol=2e-5)
    records = [json.loads(line) for line in (tmp_path / "served" / "metrics.jsonl").read_text().splitlines()]
    assert [(r["teacher/lost"], r["teacher/unread"]) for r in records if r["kind"] == "train"] == [(0, 0)] * 2


@pytest.mark.slow_on("jax")
def test_responses_whose_score_does_not_come_leave_their_group(tmp_path, backend, student, teacher, scoring):
    with EchoServer(scoring, "big", faults=[None, "nan"]) as server:
        config = served_config(config_of(tmp_path, backend, student, teacher), server)
        train(config, load_policy(config), train_rows=ROWS)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    left = [(r["teacher/lost"], r.get("responses/left_out", 0)) for r in records if r["kind"] == "train"]
    assert left == [(1, 1), (0, 0)]


@pytest.mark.parametrize(
    ("faults", "lost", "kind", "message"),
    [
        (
            ["no echo"],
            (),
            ConfigError,
            "teacher.url = .* gives no log-probabilities for 5 tokens: expected one for each",
        ),
        (["bos"], (), ConfigError, r"scored other tokens than it was given .*it adds special tokens"),
        ([404], (), ConfigError, "answers 404"),
        ([], range(1, 100), SamplerError, "the teacher scored none of 12 responses: .*answers 500"),
    ],
)
def test_a_server_that_cannot_score_is_named(tmp_path, backend, student, teacher, scoring, faults, lost, kind, message):
    with EchoServer(scoring, "big", faults=faults, lost=lost) as server:
        config = served_config(config_of(tmp_path, backend, student, teacher), server)
        with pytest.raises(kind, match=message):
            train(config, load_policy(config), train_rows=ROWS)


@pytest.mark.parametrize("steps", [0, 1])
def test_a_signal_while_the_teachers_server_is_away_saves_and_leaves(
    tmp_path, backend, student, teacher, scoring, steps, capsys
):
    """It is waited for, for 600 s: asked to stop, the run leaves the step and keeps the one before."""
    with EchoServer(scoring, "big") as server:
        config = served_config(config_of(tmp_path, backend, student, teacher), server)
        config = replace(config, run=replace(config.run, checkpoint_every=0))
        assert config.teacher.deadline == 600

        def send():
            while len(server.asked) < max(2, 1 + 12 * steps):  # one check, and a step has begun
                time.sleep(0.01)
            server.go()
            time.sleep(1.0)
            os.kill(os.getpid(), signal.SIGTERM)

        policy = load_policy(config)
        thread = threading.Thread(target=send)
        thread.start()
        start = time.monotonic()
        result = train(config, policy, train_rows=ROWS)
        thread.join()
    assert (result.exit_status, result.step) == (143, steps) and time.monotonic() - start < 30
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["kind"] for r in records] == ["train"] * steps + ["event"]
    assert (tmp_path / "checkpoints" / "step-00000001").exists() == bool(steps)
