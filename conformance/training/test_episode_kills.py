"""Runs and collections of episodes that are killed within an episode: they go on and end as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from places import SUPPORT

pytestmark = pytest.mark.core

STEPS = 3


def config_of(folder: Path) -> Path:
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    (folder / "config.toml").write_text(f"""
[run]
folder = "{folder}/run"
backend = "table"
steps = {STEPS}
checkpoint_every = 1
show_every = 0
[model]
path = "{folder}"
[data]
train = "{folder}/rows.jsonl"
[rollout]
prompts = 2
responses = 2
max_tokens = 60
[optimizer]
learning_rate = 0.1
[environment]
path = "{SUPPORT / "odd_environments.py"}:Slow"
max_turns = 3
memory = 0.0
""")
    return folder / "config.toml"


def start(command: str, folder: Path, steps: Path) -> subprocess.Popen:
    """Steps of environments write a line each into `steps`: the id of their process."""
    given = [command, str(folder / "config.toml"), *([str(folder / "out.jsonl")] if command == "collect" else [])]
    path = os.pathsep.join(path for path in sys.path if path)
    return subprocess.Popen(
        [sys.executable, str(SUPPORT / "scripted_command.py"), *given],
        env=os.environ | {"GVPO_TEST_STEPS": str(steps), "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(command: str, folder: Path) -> None:
    process = start(command, folder, folder / "steps")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


def written(command: str, folder: Path) -> list[dict]:
    file = folder / "out.jsonl" if command == "collect" else folder / "run" / "completions.jsonl"
    return [json.loads(line) | {"settings": ""} for line in file.read_text().splitlines()]


@pytest.mark.slow_on("collect")
@pytest.mark.parametrize("command", ["train", "collect"])
def test_a_kill_within_an_episode_costs_the_step_at_hand(command, tmp_path) -> None:
    for name in ("whole", "killed"):
        config_of(tmp_path / name)
    finish(command, tmp_path / "whole")
    steps = (tmp_path / "whole/steps").read_text().splitlines()
    killed = tmp_path / "killed"
    process = start(command, killed, killed / "begun")
    wanted = len(steps) // 2  # in the middle of the second of three steps
    while process.poll() is None and not ((killed / "begun").exists() and _lines(killed / "begun") >= wanted):
        time.sleep(0.001)
    process.kill()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, output
    began = {int(line) for line in (killed / "begun").read_text().splitlines()}
    assert len(began) == 2 and wanted <= _lines(killed / "begun") < len(steps)
    while any(_lives(pid) for pid in began):  # pytest's own limit ends this
        time.sleep(0.01)
    finish(command, killed)
    assert _lines(killed / "steps") < len(steps), "finished steps are not played again"
    assert written(command, killed) == written(command, tmp_path / "whole")
    assert len({json.dumps(row.get("episode") or row["responses"]) for row in written(command, killed)}) > 3
    if command == "train":
        metrics = [
            [json.loads(line) for line in (tmp_path / name / "run/metrics.jsonl").read_text().splitlines()]
            for name in ("whole", "killed")
        ]
        losses = [[r["loss"] for r in of_run if r["kind"] == "train"] for of_run in metrics]
        assert losses[0] == losses[1] and len(losses[0]) == STEPS


def _lines(file: Path) -> int:
    return file.read_text().count("\n")


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
