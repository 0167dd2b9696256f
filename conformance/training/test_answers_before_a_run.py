"""What can be said before a model loads is said then, with names that can be typed as they stand."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import table_run
import toy_run

from gvpo_core.training import cli
from gvpo_core.training.config import ConfigError, RewardConfig
from gvpo_core.training.files.records import cut
from gvpo_core.training.policy import load as loading
from gvpo_core.training.rewards import check_columns, load_rewards
from gvpo_core.training.rewards.worker import math_answers
from gvpo_core.training.run.checkpoint import damage

pytestmark = pytest.mark.core
pytest.importorskip("tyro", reason="the command line's extra is not installed")


@pytest.fixture
def no_model(monkeypatch):
    def load_policy(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(loading, "load_policy", load_policy)


def test_a_step_that_was_not_saved_is_refused_before_the_model_loads(tmp_path, capfd, request):
    config = table_run.make(tmp_path, steps=6)
    assert cli.main(["train", str(config)]) == 0
    capfd.readouterr()
    request.getfixturevalue("no_model")
    assert cli.main(["train", str(config), "--from-step", "3"]) == 1
    assert "has no checkpoint of step 3; saved steps: 4, 6" in capfd.readouterr().err
    fresh = ["--run.folder", str(tmp_path / "fresh"), "--from-step", "3"]
    assert cli.main(["train", str(config), *fresh]) == 1
    assert "has no checkpoint of step 3; saved steps: none" in capfd.readouterr().err
    assert not (tmp_path / "fresh").exists()


def test_the_last_line_of_a_dry_run_starts_the_run(tmp_path, capfd):
    config = table_run.make(tmp_path / "a folder", steps=2)
    options = ["--rollout.responses", "4"]
    assert cli.main(["train", str(config), "--dry-run", *options]) == 0
    said = " ".join(capfd.readouterr().out.split())
    assert f"run it: {shlex.join(['gvpo', 'train', str(config), *options])}; run folder" in said


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (b"{}", "it has no 'step'"),
        (b'{"step": 2}', "it has no 'files'"),
        (b"[]", "its values have other types"),
        (b'{"step": 2, "files": 3}', "does not match"),
        (b"{", "not JSON: Expecting property name"),
    ],
)
def test_a_damaged_manifest_is_described_in_words(content, wrong, tmp_path):
    (tmp_path / "manifest.json").write_bytes(content)
    said = damage(tmp_path)
    assert said.startswith(str(tmp_path / "manifest.json")) and wrong in said
    assert "Error" not in said


@pytest.mark.parametrize(
    ("tail", "said"),
    [
        (b"rubbish\n", "line 2 is not a record (edited or damaged); dropped"),
        (b'{"kind": "train", "st', "line 2 is not a complete record (cut by a kill or a power loss); dropped"),
        (b"\0" * 64, "line 2 is not a complete record (cut by a kill or a power loss); dropped"),
        (b"rubbish\n[1]\n{", "lines 2, 3 are not a record (edited or damaged); dropped"),
    ],
    ids=["a line", "half a line", "a NUL block", "both"],
)
@pytest.mark.parametrize("whole", [True, False], ids=["metrics", "completions"])
def test_only_an_incomplete_last_line_is_blamed_on_a_kill(tail, said, whole, tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = json.dumps({"kind": "train", "step": 1, "time": 0}).encode() + b"\n"
    path.write_bytes(good + tail)
    found = cut(path, 1, parse=whole).odd
    assert f"{path}: {said}" in found
    assert ("cut by a kill" in "".join(found)) == (not tail.endswith(b"\n"))
    assert path.read_bytes() == good


@pytest.mark.parametrize(
    ("name", "value"),
    [("run.folder", "runs/\udcfc"), ("data.train", "\udcff.jsonl"), ("rewards.right.options.hint", "\ud800")],
)
def test_a_setting_that_is_not_a_text_is_refused_by_name(name, value, tmp_path, capfd, no_model):
    config = table_run.make(tmp_path)
    assert cli.main(["train", str(config), f"--{name}", value]) == 2
    assert f"{name} = {value!a}; expected UTF-8 text, so rename it" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def under_ascii(*words):
    """Runs a command as under LC_ALL=C without Python's UTF-8 mode."""
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "gvpo_core.training.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, env=env, timeout=300)


def test_without_utf_8_such_paths_are_named_and_data_is_read(tmp_path):
    config = table_run.make(tmp_path / "fü", steps=2)
    done = under_ascii("train", config)
    said = done.stderr.decode("ascii")
    assert done.returncode == 2 and "Traceback" not in said
    for name in ("run.folder", "model.path", "data.train", "data.evaluation"):
        assert f"{name} = '{tmp_path}/f\\xfc" in said
    assert "expected a name that this process can open; the locale's encoding is ascii: set PYTHONUTF8=1" in said
    plain = table_run.make(tmp_path / "plain", steps=2)
    for path in (plain, plain.parent / "table.json", plain.parent / "train.jsonl"):
        path.write_text(path.read_text().replace("p0", "pü").replace("p\\u00fc", "pü"), encoding="utf-8")
    done = under_ascii("train", plain, "--run.folder", tmp_path / "rün")
    assert done.returncode == 2 and b"expected UTF-8 text; the locale's encoding is ascii" in done.stderr
    done = under_ascii("train", plain)
    assert done.returncode == 0, done.stderr
    assert "pü" in (plain.parent / "run" / "completions.jsonl").read_text(encoding="utf-8")


def test_an_option_that_the_file_lacks_can_be_given_by_its_key(tmp_path, capfd):
    config = table_run.make(tmp_path, steps=1)
    option = "--rewards.right.options.column"
    assert cli.main(["train", str(config), option, "answer"]) == 0
    assert 'column = "answer"' in (tmp_path / "run" / "config.toml").read_text()
    capfd.readouterr()
    assert cli.main(["train", str(config), "--rewards.right.options.colum", "answer"]) == 2
    assert "colum" in capfd.readouterr().err


# function -> options that no call could work with, what is said
USELESS = [
    ("regex_match", {"pattern": "(a"}, "options.pattern = '(a' is not a regular expression: missing ), unterminated"),
    ("regex_match", {"pattern": 5}, "options.pattern = 5 is not a regular expression"),
    ("judge", {"model": "m", "pattern": "*"}, "options.pattern = '*' is not a regular expression"),
    ("judge", {"model": "m", "lowest": 3, "highest": 3}, "options.highest = 3; expected more than options.lowest = 3"),
    ("judge", {"model": "m", "highest": "10"}, "its options cannot be used: '>' not supported between"),
]


@pytest.mark.parametrize("isolation", ["process", "thread"])
@pytest.mark.parametrize(("function", "options", "said"), USELESS)
def test_options_that_no_call_could_use_are_refused_before_the_model_loads(function, options, said, isolation):
    if function == "judge":
        pytest.importorskip("openai", reason="openai is not installed")
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        load_rewards({"r": RewardConfig(function=function, options=options, isolation=isolation)})
    assert str(caught.value).startswith(f"rewards.r.function = {function!r}: ")


def test_a_column_that_only_a_template_names_is_missed_before_the_model_loads():
    pytest.importorskip("openai", reason="openai is not installed")
    options = {"model": "m", "template": "{response} against {gold}, from {lowest}"}
    loaded = load_rewards({"r": RewardConfig(function="judge", options=options, isolation="thread")})
    check_columns(loaded, ["gold"], "the data")
    with pytest.raises(ConfigError, match="the options name the column 'gold', which the data does not have"):
        check_columns(loaded, ["answer"], "the data")


@pytest.mark.parametrize(
    ("function", "package", "extra"), [("judge", "openai", "judge"), ("math_verify", "math_verify", "rewards")]
)
def test_missing_package_of_a_built_in_reward_is_found_before_loading(function, package, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    math_answers.library.cache_clear()
    options = {"model": "m"} if function == "judge" else {}
    with pytest.raises(ConfigError, match=rf'pip install "gvpo\[{extra}\]"'):
        load_rewards({"r": RewardConfig(function=function, options=options, isolation="thread")})


@pytest.mark.parametrize("package", ["tomli_w", "peft"])
def test_a_package_that_the_run_needs_later_is_missed_before_the_model_loads(
    package, tmp_path, capfd, no_model, monkeypatch
):
    """Neither a model is loaded nor a run folder made: both are needed after the model alone."""
    config = table_run.make(tmp_path, steps=2)
    options = ["--run.backend", "torch", "--model.lora-rank", "4"] if package == "peft" else []
    monkeypatch.setattr(loading, "find_spec", lambda name: None if name == package else sys)
    assert cli.main(["train", str(config), *options]) == 2
    extra = "torch" if package == "peft" else "train"
    assert f'{package} is not installed: pip install "gvpo[{extra}]"' in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_train_in_python_makes_no_run_folder_without_the_packages_that_it_needs(tmp_path, monkeypatch):
    config = toy_run.config_of(tmp_path / "run", toy_run.write_model(tmp_path / "model"))
    policy = toy_run.policy(tmp_path / "model", updates=config.updates)
    monkeypatch.setattr(loading, "find_spec", lambda name: None if name == "tomli_w" else sys)
    with pytest.raises(ConfigError, match="tomli_w is not installed"):
        toy_run.run(config, [{"prompt": "a"}], policy, rewards={"r": lambda completions: [0.0] * len(completions)})
    assert not (tmp_path / "run").exists()


def test_a_missing_prompt_column_is_refused_before_a_model_is_loaded(tmp_path, capfd, no_model):
    """Data sets call it question or problem, which is spelt nothing like prompt."""
    config = table_run.make(tmp_path, steps=1)
    rows = tmp_path / "gsm.jsonl"
    rows.write_text('{"question": "p0", "answer": "a"}\n')
    for name in ("train", "evaluation"):
        assert cli.main(["train", str(config), f"--data.{name}", str(rows)]) == 2
        said = capfd.readouterr().err
        assert f"data.{name} row 0 has no column 'prompt'; it has question, answer;" in said
        assert "did you mean data.prompt = 'question'?" in said
