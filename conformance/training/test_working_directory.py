"""A reward in a thread may change the working directory of the run: relative paths hold."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import table_run
import toy_run
from engine_server import Sent, Server
from sampler_runs import short
from table_problem import PROMPTS, REFERENCE, reward, table

from gvpo_core.training import cli, train
from gvpo_core.training.files.disk import anchored
from gvpo_core.training.rewards.calls import Processes
from gvpo_core.training.rewards.log import RewardLog
from gvpo_core.training.run.checkpoint import steps_saved
from gvpo_core.training.samplers import Engine

pytestmark = pytest.mark.core
pytest.importorskip("tyro", reason="the command line's extra is not installed")

REWARD = """
import os
import subprocess
import sys

def reward(completions, answer):
    os.chdir("/")
    return [float(c == a) for c, a in zip(completions, answer)]
"""
ENDING = """
import os
import subprocess
import sys

def reward(completions):
    if "end" in completions:
        os._exit(1)
    return [1.0] * len(completions)
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A config whose paths are all relative to the working directory, which the first call of the reward changes."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(REWARD)
    path = table_run.make(Path("."), steps=4, reward='function = "mine.py:reward"\nisolation = "thread"')
    assert 'folder = "run"' in path.read_text()
    return path


def test_a_run_of_relative_paths_saves_and_resumes(config, tmp_path, monkeypatch, capfd):
    assert cli.main(["train", str(config), "--run.steps", "2", "--optimizer.schedule", "constant"]) == 0
    assert Path.cwd() == Path("/"), "the reward was called in this process"
    printed = capfd.readouterr().out
    assert "gvpo report run\n" in printed and "run/metrics.jsonl" in printed and str(tmp_path) not in printed
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", str(config), "--run.steps", "4", "--optimizer.schedule", "constant"]) == 0
    run = tmp_path / "run"
    assert steps_saved(run / "checkpoints")[0] == 4
    kinds = [json.loads(line)["kind"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert kinds.count("train") == 4 and (run / "report.html").exists()


def test_two_checkpoints_are_evaluated_and_steps_collected(config, tmp_path, monkeypatch, capfd):
    assert cli.main(["train", str(config)]) == 0
    monkeypatch.chdir(tmp_path)
    assert cli.main(["eval", "run", "--compare", "initial"]) == 0
    assert Path.cwd() == Path("/")
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    assert cli.main(["collect", str(config), "out.jsonl"]) == 0
    assert capfd.readouterr().out.endswith("out.jsonl\n")
    assert {json.loads(line)["step"] for line in (tmp_path / "out.jsonl").read_text().splitlines()} == {1, 2, 3, 4}


def test_a_process_that_starts_later_begins_where_the_first_did(tmp_path, monkeypatch):
    """It imports its module by a relative path."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(ENDING)
    call = Processes("r", "mine.py:reward", {}, width=1, memory=0, log=RewardLog())
    try:
        os.chdir("/")
        with pytest.raises(Exception, match="exited with status 1"):
            call(["p"], ["end"], {}, 30.0, float("inf"))
        assert call(["p"], ["a"], {}, 30.0, float("inf")) == [1.0]
    finally:
        call.close()


def test_only_folders_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    assert anchored("model") == str(tmp_path / "model")
    assert anchored("owner/name") == "owner/name" and anchored("") == ""


def test_a_folder_that_the_locale_cannot_name_is_evaluated_by_a_relative_path(tmp_path):
    """The working directory's name is not of the settings, and Python 3.11 opens it all the same."""
    folder = tmp_path / "ü 日本"
    config = table_run.make(folder, steps=1)
    config.write_text(config.read_text().replace(f"{folder}/", "").replace(f'"{folder}"', '"."'))
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for arguments in (["train", config.name], ["eval", "run", "--compare", "initial"]):
        command = [sys.executable, "-m", "gvpo_core.training.cli", *arguments]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr


def test_the_settings_of_a_project_are_not_replaced_by_those_of_the_run(config, tmp_path, capfd):
    """run.folder = "." wrote config.toml anew, with all defaults and without its comments."""
    before = config.read_bytes()
    assert cli.main(["train", str(config), "--run.folder", "."]) == 1
    assert "config.toml does not belong to a run" in capfd.readouterr().err
    assert config.read_bytes() == before and not (tmp_path / "checkpoints").exists()


def test_a_working_directory_that_was_removed_is_one_line(tmp_path, monkeypatch, capfd):
    config = table_run.make(tmp_path, steps=1)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for arguments in (["train", config], ["collect", config, "o.jsonl"], ["eval", "run"], ["export", config, "o"]):
        assert cli.main([str(a) for a in arguments]) == 2
        assert capfd.readouterr().err.startswith("gvpo: the working directory cannot be used")


def test_a_tilde_in_a_path_is_the_home_folder(tmp_path, monkeypatch, capfd):
    """No shell sees what a file says, and bash leaves --run.folder=~/run as it is."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    config = table_run.make(home, steps=1, reward='function = "~/mine.py:reward"')
    (home / "mine.py").write_text(REWARD)
    config.write_text(config.read_text().replace(f"{home}/", "~/"))
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("HOME", str(home))
    assert 'train = "~/train.jsonl"' in config.read_text()
    assert cli.main(["train", str(config), "--run.folder=~/other"]) == 0
    assert (home / "other" / "metrics.jsonl").exists() and not list(elsewhere.iterdir())
    assert cli.main(["train", str(home / "other" / "config.toml")]) == 0
    assert f"gvpo report {home}/other" in capfd.readouterr().out
    assert "~" in (home / "other" / "config.toml").read_text(), "the settings stay as written"


def changing(prompts, completions):
    """A reward that changes the working directory."""
    os.chdir("/")
    return reward(prompts, completions)


def test_the_folder_of_an_engines_weights_holds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = short(tmp_path / "run", 3)
    policy = Sent(table(REFERENCE), config.optimizer)
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    with Server() as server:
        engine = Engine(server.url, "tiny", weights="model", folder="weights", pause=0.001)
        result = train(config, policy, train_rows=rows, rewards={"value": changing}, sampler=engine)
    assert Path.cwd() == Path("/") and result.step == 3, "the reward was called in this process"
    assert server.commands.count("/collective_rpc") == 3, "the weights of each step were loaded"
    assert list((tmp_path / "weights").iterdir()) and not Path("/weights").exists()


def test_the_cache_of_reference_scores_holds(tmp_path, monkeypatch, capsys):
    """The evaluation before the first step changes the directory, and the scores are computed in that step."""

    def scores(prompts, completions):
        os.chdir("/")
        return [0.0] * len(completions)

    monkeypatch.chdir(tmp_path)
    model = toy_run.write_model(tmp_path / "model")
    evaluation = {"every": 1, "responses": 2}
    config = toy_run.config_of(tmp_path / "run", model, data={"reference_cache": "cache"}, evaluation=evaluation)
    recorded = [{"prompt": p, "responses": ["a", "b"], "rewards": [0.0, 1.0]} for p in ("ab", "cd", "ef")]
    toy_run.run(config, recorded, evaluation_rows=[{"prompt": "ab"}], rewards={"value": scores})
    assert Path.cwd() == Path("/"), "the reward was called in this process"
    assert (tmp_path / "cache" / "reference_scores.jsonl").stat().st_size and not Path("/cache").exists()
