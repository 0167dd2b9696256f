"""A reward in a thread may change the working directory of the run: relative paths hold."""

import json
import os
from pathlib import Path

import pytest
import table_run

from gvpo_core.training import cli
from gvpo_core.training.files.disk import anchored
from gvpo_core.training.rewards.calls import Processes
from gvpo_core.training.rewards.log import RewardLog
from gvpo_core.training.run.checkpoint import steps_saved

pytestmark = pytest.mark.core
pytest.importorskip("tyro", reason="the command line's extra is not installed")

REWARD = """
import os

def reward(completions, answer):
    os.chdir("/")
    return [float(c == a) for c, a in zip(completions, answer)]
"""
ENDING = """
import os

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
