"""rollout.sampler, [engine] and evaluation.sampler: what they mean, where they are used, and what is refused."""

import json
import os
import signal
from dataclasses import replace

import pytest
import table_run
from engine_server import Server
from table_problem import PROMPTS, REFERENCE, reward, settings, table

from gvpo_core.training.cli import main
from gvpo_core.training.config import ConfigError, EngineConfig
from gvpo_core.training.config.file import read_config
from gvpo_core.training.loop import train
from gvpo_core.training.policy.load import load_policy
from gvpo_core.training.policy.table import TablePolicy
from gvpo_core.training.rewards import RewardError

pytestmark = pytest.mark.core

ENGINE = """
[engine]
url = "URL"
model = "tiny"
pause = 0.001
api_key = "$ENGINE_KEY"
"""
OWN = '''
import os
from gvpo_core.training.policy.table import TablePolicy

class Sampler:
    """A copy of the policy; says in a file what is called."""

    def __init__(self, config, policy):
        self.config, self.policy = config, policy
        self.say("open")

    def say(self, word):
        with open(os.path.join(os.path.dirname(__file__), "said.txt"), "a") as file:
            file.write(word + "\\n")

    def refresh(self, policy, version):
        self.say(f"refresh {version}")

    def generate(self, prompts, seeds, sampling):
        self.say(f"generate {sampling.temperature:g}")
        return self.policy.generate(prompts, seeds, sampling)

    def close(self):
        self.say("close")

def nothing():
    return None

def other(url):
    return Sampler(None, None)
'''


def made(folder, *, sampler, steps=3, extra="", evaluation=""):
    """A run on disk with this rollout.sampler."""
    config = table_run.make(folder, steps=steps, extra=extra)
    text = config.read_text().replace("[rollout]", f'[rollout]\nsampler = "{sampler}"')
    config.write_text(text.replace("[evaluation]", f"[evaluation]\n{evaluation}"))
    (folder / "sampler.py").write_text(OWN)
    return config


def own(folder, **options):
    return made(folder, sampler=f"{folder}/sampler.py:Sampler", **options)


def said(folder):
    return (folder / "said.txt").read_text().split("\n")[:-1]


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("ENGINE_KEY", "hush-93")
    with Server() as started:
        yield started


@pytest.fixture
def engine(tmp_path, server):
    config = made(tmp_path, sampler="engine", extra=ENGINE.replace("URL", server.url))
    server.policy = load_policy(read_config(config))
    return config


def test_an_engine_of_the_settings_draws_the_responses(engine, server, tmp_path, capsys):
    assert main(["train", str(engine)]) == 0
    assert len(server.asked) == 3 * 2 and set(server.keys) == {"Bearer hush-93"}
    output = capsys.readouterr().out
    assert f"tiny at {server.url}, its own weights" in output
    saved = read_config(tmp_path / "run" / "config.toml")
    assert saved.rollout.sampler == "engine" and saved.engine == read_config(engine).engine
    assert saved.engine.api_key == "$ENGINE_KEY"
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"hush-93" not in path.read_bytes(), path
    assert "hush-93" not in output


def test_a_dry_run_and_a_collection_use_the_engine(engine, server, tmp_path, capsys):
    assert main(["train", str(engine), "--dry-run"]) == 0
    assert len(server.asked) == 2
    assert main(["collect", str(engine), str(tmp_path / "out.jsonl")]) == 0
    assert len(server.asked) == 2 + 3 * 2
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [len(row["rewards"]) for row in rows] == [6] * 6


def test_a_collection_continues_after_a_step_that_lost_a_group(engine, server, tmp_path, capsys):
    server.faults = [404]
    out = tmp_path / "out.jsonl"
    assert main(["collect", str(engine), str(out), "--run.steps", "2"]) == 0
    assert len(out.read_text().splitlines()) == 3 and len(server.asked) == 4
    out.rename(tmp_path / "out.jsonl.partial")
    assert main(["collect", str(engine), str(out), "--run.steps", "3"]) == 0
    assert len(out.read_text().splitlines()) == 5 and len(server.asked) == 6
    assert main(["collect", str(engine), str(tmp_path / "other.jsonl")]) == 0
    (tmp_path / "other.jsonl").rename(tmp_path / "other.jsonl.partial")
    assert main(["collect", str(engine), str(tmp_path / "other.jsonl"), "--engine.tokens", "text"]) == 2
    assert "was started with other settings" in capsys.readouterr().err


def test_a_resumed_run_may_ask_another_address_but_not_for_other_weights(engine, server, capsys):
    assert main(["train", str(engine), "--run.steps", "2", "--optimizer.schedule", "constant"]) == 0
    changed = [str(engine), "--optimizer.schedule", "constant"]
    assert main(["train", *changed, "--engine.url", "http://localhost:1", "--engine.deadline", "1"]) == 1
    assert "the sampler gave none of 12 responses; http://localhost:1" in capsys.readouterr().err  # it was asked
    assert main(["train", *changed, "--engine.weights", "model", "--engine.folder", "w"]) == 2
    assert "engine.weights: 'kept' -> 'model'" in capsys.readouterr().err


SAMPLER = '[rollout]\nsampler = "engine"\n'
SET = SAMPLER + '[engine]\nurl = "http://h"\nmodel = "m"\n'


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        (
            '[rollout]\nsampler = "engin"',
            "expected 'policy', 'engine', 'teacher' or file.py:Sampler; did you mean 'engine'?",
        ),
        (
            '[rollout]\nsampler = "vllm"',
            "rollout.sampler = 'vllm'; expected 'policy', 'engine', 'teacher' or file.py:Sampler",
        ),
        (SAMPLER + '[engine]\nmodel = "m"', "engine.url = ''; expected http://HOST:PORT"),
        (SAMPLER + '[engine]\nmodel = "m"\nurl = "localhost:80"', "engine.url = 'localhost:80'; expected http://HOST"),
        (SAMPLER + '[engine]\nmodel = "m"\nurl = "http://h:x"', "engine.url = 'http://h:x'; expected http://HOST"),
        (SAMPLER + '[engine]\nmodel = "m"\nurl = "http://me:sk-1234@h"', "engine.url holds a user name or password"),
        (SAMPLER + '[engine]\nurl = "http://h"', "engine.model = ''; expected the name"),
        ('[engine]\nurl = "http://h"\nmodel = "m"', "engine.url is set, and rollout.sampler = 'policy' uses no engine"),
        ('[engine]\nurll = "http://h"', "unknown field engine.urll; did you mean engine.url?"),
        ('[engine]\nconcurrency = "many"', "engine.concurrency = 'many'; expected int"),
        ('[engine]\nweights = "all"', "engine.weights = 'all'; expected one of 'kept', 'adapters', 'model'"),
        ('[rollout]\nsampler = "a.py:S"\nsource = "recorded"', "rollout.source = 'recorded' draws nothing"),
        ('[evaluation]\nsampler = "engine"', "evaluation.sampler = 'engine'; expected one of 'policy', 'rollout'"),
        (SET + '[evaluation]\nsampler = "rollout"', "the engine's own weights would be evaluated"),
        (
            SET + 'weights = "model"',
            "engine.weights = 'model' and folder = ''; expected adapters or model, and a folder",
        ),
        (SET + 'weights = "adapters"\nfolder = "w"', "model.lora_rank = 0: there are no adapters"),
        (
            SET + 'weights = "adapters"\nfolder = "w"\n[model]\nlora_rank = 4\nlora_kind = "dora"',
            "the engine loads no DoRA",
        ),
        (SET + 'omit = ["seed"]', "engine.omit = 'seed'; expected names among max_tokens, top_p"),
        (SET + "[engine.fields]\nmax_tokens = 3", "engine.fields.max_tokens is set by the run itself"),
        (SET + 'tokens = "text"\ngap_tolerance = 0.1', "text has no log-probabilities to compare"),
        (SET + "tries = 0", "engine.tries = 0; expected 1"),
        (SET + "gap_tolerance = 0.0", "engine.gap_tolerance = 0.0; expected a number above 0"),
        (
            SET + 'api_key = "sk-12345678"',
            "engine.api_key is not '$NAME'; expected the name of the environment variable",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(lines, wanted, tmp_path):
    path = tmp_path / "config.toml"
    model = '[model]\npath = "m"\n'
    need = '[data]\ntrain = "t.jsonl"\n[rewards.r]\nfunction = "exact_match"\n'
    path.write_text(need + (lines.replace("[model]\n", model) if "[model]" in lines else model + lines) + "\n")
    with pytest.raises(ConfigError) as error:
        read_config(path)
    (line,) = str(error.value).split("\n")
    assert wanted in line and "sk-1234" not in line


def test_a_key_that_is_not_set_is_named_before_the_model_loads(engine, server, monkeypatch, capsys, caplog):
    monkeypatch.delenv("ENGINE_KEY")
    assert main(["train", str(engine)]) == 2
    assert (
        "engine.api_key = '$ENGINE_KEY': the environment has no variable ENGINE_KEY; set it" in capsys.readouterr().err
    )
    assert not server.asked and "loading" not in caplog.text


def test_the_help_explains_the_engine(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    output = capsys.readouterr().out
    assert "--engine.url" in output and "--rollout.sampler" in output and "--evaluation.sampler" in output


def test_a_sampler_of_your_own_is_opened_once_and_closed_at_the_end(tmp_path, capsys):
    assert main(["train", str(own(tmp_path))]) == 0
    words = said(tmp_path)
    assert words == ["open", *(w for v in range(3) for w in (f"refresh {v}", "generate 1")), "close"]
    assert "sampler" in capsys.readouterr().out


def test_the_sampler_is_closed_after_an_error(tmp_path, capsys):
    policy = load_policy(read_config(config := own(tmp_path)))

    def fails(completions):
        raise ValueError("no")

    with pytest.raises(RewardError):
        train(read_config(config), policy, rewards={"right": fails})
    assert said(tmp_path)[0] == "open" and said(tmp_path)[-1] == "close"


def test_the_sampler_is_closed_after_a_signal(tmp_path, capsys):
    policy, config = load_policy(read_config(path := own(tmp_path))), read_config(path)

    def stops(completions):
        os.kill(os.getpid(), signal.SIGTERM)
        return [float(len(c)) for c in completions]

    config = replace(config, data=replace(config.data, evaluation=""))
    assert train(config, policy, rewards={"right": stops}).exit_status == 143
    assert said(tmp_path) == ["open", "refresh 0", "generate 1", "close"]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("sampler.py:Missing", "has no function Missing"),
        ("gone.py:Sampler", "there is no file"),
        ("sampler.py:other", "has other arguments (missing a required argument: 'url'); expected other()"),
        ("sampler.py:nothing", "gave a NoneType without a method generate"),
    ],
)
def test_a_sampler_that_cannot_be_made_is_refused_by_name(name, wanted, tmp_path, capsys):
    assert main(["train", str(made(tmp_path, sampler=f"{tmp_path}/{name}"))]) == 2
    error = capsys.readouterr().err
    assert wanted in error and "rollout.sampler = " in error and "Traceback" not in error
    assert not (tmp_path / "said.txt").exists()


def test_a_misspelt_sampler_is_named_once(tmp_path, capsys):
    assert main(["train", str(made(tmp_path, sampler="techer"))]) == 2
    error = capsys.readouterr().err
    assert "did you mean 'teacher'?" in error and error.count("techer") == 1


def test_two_samplers_are_refused(tmp_path):
    config = read_config(own(tmp_path))
    with pytest.raises(ConfigError, match=r"given in Python, and rollout\.sampler = .* names one as well"):
        train(config, load_policy(config), sampler=TablePolicy(table(REFERENCE)))


def test_recorded_responses_and_an_engine_are_refused(tmp_path):
    config = settings(tmp_path)
    rollout, engine = replace(config.rollout, sampler="engine"), EngineConfig("http://localhost:1", "tiny")
    rows = [{"prompt": PROMPTS[0], "responses": ["a", "b"], "rewards": [0.0, 1.0]}]
    with pytest.raises(ConfigError, match=r"leave the sampler \(rollout.sampler\) out"):
        policy = TablePolicy(table(REFERENCE), config.optimizer)
        train(replace(config, rollout=rollout, engine=engine), policy, train_rows=rows, rewards={"value": reward})


def test_the_rollouts_sampler_evaluates_with_the_weights_of_the_step(tmp_path, capsys):
    config = own(tmp_path, evaluation='sampler = "rollout"\nresponses = 2')
    assert main(["train", str(config)]) == 0
    evaluation = lambda version: [f"refresh {version}", "generate 0"]
    step = lambda version: [f"refresh {version}", "generate 1"]
    assert said(tmp_path) == ["open", *evaluation(0), *step(0), *step(1), *step(2), *evaluation(3), "close"]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["eval/lost"] for r in records if r["kind"] == "eval"] == [0, 0]
    (tmp_path / "said.txt").unlink()
    assert main(["eval", str(tmp_path / "run")]) == 0
    assert said(tmp_path) == ["open", *evaluation(0), "close"]


def test_an_evaluation_by_the_rollouts_sampler_needs_one(tmp_path, capsys):
    config = table_run.make(tmp_path, steps=1)
    assert main(["train", str(config), "--evaluation.sampler", "rollout"]) == 2
    assert "evaluation.sampler = 'rollout', and the policy draws its responses itself" in capsys.readouterr().err


def test_the_policy_evaluates_where_nothing_else_is_asked_for(tmp_path, capsys):
    assert main(["train", str(own(tmp_path))]) == 0
    assert "generate 0" not in said(tmp_path)
    (tmp_path / "said.txt").unlink()
    assert main(["eval", str(tmp_path / "run")]) == 0
    assert not (tmp_path / "said.txt").exists()


def test_a_sampler_without_refresh_does_not_evaluate(tmp_path):
    config = settings(tmp_path)
    config = replace(config, evaluation=replace(config.evaluation, sampler="rollout"))
    config = replace(config, rollout=replace(config.rollout, sampler=f"{tmp_path}/fixed.py:Fixed"))
    (tmp_path / "fixed.py").write_text(
        "class Fixed:\n    def generate(self, prompts, seeds, sampling):\n        pass\n"
    )
    with pytest.raises(ConfigError, match="has no method refresh"):
        policy = TablePolicy(table(REFERENCE), config.optimizer)
        train(config, policy, train_rows=[{"prompt": p} for p in PROMPTS], rewards={"value": reward})


def test_a_collection_refreshes_one_version(tmp_path, capsys):
    assert main(["collect", str(own(tmp_path)), str(tmp_path / "out.jsonl")]) == 0
    assert said(tmp_path) == ["open", *["refresh 0", "generate 1"] * 3, "close"]


def test_changed_code_of_the_sampler_is_noted(tmp_path, capsys):
    config = own(tmp_path)
    assert main(["train", str(config), "--run.steps", "2", "--optimizer.schedule", "constant"]) == 0
    (tmp_path / "sampler.py").write_text(OWN + "\n# changed\n")
    assert main(["train", str(config), "--run.steps", "3", "--optimizer.schedule", "constant"]) == 0
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert any("sampler.name" in line for line in environment["starts"][-1]["changed"])
