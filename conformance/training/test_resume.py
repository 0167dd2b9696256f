"""Killed at any moment, a run goes on from its last good checkpoint and ends where an unbroken run ends."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import killing
import numpy as np
import pytest
import table_run

from gvpo_core.training import cli
from gvpo_core.training.run.checkpoint import (
    CheckpointError,
    begin_checkpoint,
    commit_checkpoint,
    damage,
    newest_checkpoint,
    steps_saved,
)

pytestmark = pytest.mark.core

pytest.importorskip("tyro", reason="the command line's extra is not installed")


@pytest.fixture(autouse=True)
def _unbuffered(monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")


def final_table(folder: Path, steps: int) -> np.ndarray:
    with np.load(folder / "checkpoints" / f"step-{steps:08d}" / "policy" / "table.npz") as saved:
        return saved["logits"]


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path):
    killing.finish(table_run.make(tmp_path / "whole", steps=150))
    config = table_run.make(tmp_path / "killed", steps=150)
    run = tmp_path / "killed" / "run"
    hit = killing.kill_and_resume(config, run, killing.Spawned, kills=20, seed=0, longest=0.3)
    assert hit["saving"] >= 3, hit
    assert hit["running"] >= 3, hit
    whole, killed = (tmp_path / name / "run" for name in ("whole", "killed"))
    np.testing.assert_array_equal(final_table(killed, 150), final_table(whole, 150))
    assert killing.lasting(killed) == killing.lasting(whole)
    assert (killed / "completions.jsonl").read_bytes() == (whole / "completions.jsonl").read_bytes()
    assert "resume" in killing.events(killed)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_saves_and_leaves(number, status, tmp_path):
    config = table_run.make(tmp_path, steps=100_000)
    config.write_text(config.read_text().replace("checkpoint_every = 2", "checkpoint_every = 0\nkeep_best = false"))
    process = killing.start(config)
    time.sleep(0.2)
    for line in process.stdout:
        if line.split()[:1] == ["20"]:
            break
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == status, output
    assert "Stopping after this step" in output
    assert f"resume with: {sys.executable} -m gvpo_core.training.cli train {config}" in output
    assert "Traceback" not in output
    assert len(steps_saved(tmp_path / "run" / "checkpoints")) == 1


def test_a_second_process_on_the_folder_refuses(tmp_path):
    config = table_run.make(tmp_path, steps=100_000)
    first = killing.start(config)
    try:
        first.stdout.readline()
        second = killing.start(config)
        output, _ = second.communicate(timeout=30)
        assert second.returncode == 1
        assert "is in use by another process" in output
    finally:
        first.kill()
        first.communicate()


def test_other_settings_are_refused_unless_allowed(tmp_path):
    config = table_run.make(tmp_path, steps=4)
    killing.finish(config)
    process = killing.start(config, "--optimizer.learning_rate", "0.5")
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "optimizer.learning_rate: 1.0 -> 0.5" in output
    assert "run.allow_changes" in output
    killing.finish(config, "--optimizer.learning_rate", "0.5", "--run.allow_changes", "True", "--run.steps", "6")
    assert killing.lasting(tmp_path / "run")[-1]["step"] == 6


@pytest.mark.parametrize("name", ["train", "evaluation"])
def test_other_data_are_refused_unless_allowed(name, tmp_path, capfd):
    """The same path and settings, another file: its prompts would come in another order."""
    config = table_run.make(tmp_path, steps=2)
    config.write_text(config.read_text().replace('"cosine"', '"constant"'))
    if name == "evaluation":
        text = config.read_text()
        config.write_text(
            text.replace(f'evaluation = "{tmp_path / "train.jsonl"}"', f'evaluation = "{tmp_path}/e.jsonl"')
        )
        (tmp_path / "e.jsonl").write_text((tmp_path / "train.jsonl").read_text())
    assert cli.main(["train", str(config)]) == 0
    rows = tmp_path / ("train.jsonl" if name == "train" else "e.jsonl")
    before = rows.read_text()
    rows.write_text(before + '{"prompt": "p0", "answer": "d"}\n')
    assert cli.main(["train", str(config), "--run.steps", "4"]) == 2
    said = capfd.readouterr().err
    assert "holds a run on other data" in said and "run.allow_changes" in said
    assert f"data.{name}: 3 rows, SHA-256 " in said and " -> 4 rows, SHA-256 " in said
    rows.write_text(before.replace("{", "{ "))  # written differently, the same rows
    assert cli.main(["train", str(config), "--run.steps", "4"]) == 0
    rows.write_text(before + '{"prompt": "p0", "answer": "d"}\n')
    assert cli.main(["train", str(config), "--run.steps", "6", "--run.allow_changes", "True"]) == 0
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["data"][name]["rows"] == 4
    assert killing.lasting(tmp_path / "run")[-1]["step"] == 6


def saved(folder: Path, step: int, text: str = "x" * 100) -> Path:
    (begin_checkpoint(folder, step).policy / "weights").write_text(text)
    return commit_checkpoint(folder, step, keep=2).directory


def test_any_byte_of_a_manifest_is_found(tmp_path):
    manifest = saved(tmp_path, 1) / "manifest.json"
    content = manifest.read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1
        manifest.write_bytes(changed)
        assert str(manifest) in damage(manifest.parent), place
    manifest.write_bytes(content)
    assert damage(manifest.parent) is None


@pytest.mark.parametrize("harm", ["flip", "cut", "missing", "manifest"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(harm, tmp_path, caplog):
    saved(tmp_path, 1)
    newest = saved(tmp_path, 2)
    weights = newest / "policy" / "weights"
    if harm == "flip":
        content = bytearray(weights.read_bytes())
        content[50] ^= 1
        weights.write_bytes(content)
    elif harm == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif harm == "missing":
        weights.unlink()
    else:
        (newest / "manifest.json").write_text("{")
    assert newest_checkpoint(tmp_path).step == 1
    assert ("manifest.json" if harm == "manifest" else str(weights)) in caplog.text
    assert (tmp_path / "damaged-step-00000002").exists()
    saved(tmp_path, 2)
    assert newest_checkpoint(tmp_path).step == 2


def test_a_run_resumes_past_a_damaged_checkpoint_and_ends_the_same(tmp_path):
    killing.finish(table_run.make(tmp_path / "whole", steps=8))
    config = table_run.make(tmp_path / "harmed", steps=6)
    text = config.read_text()
    config.write_text(text.replace('"cosine"', '"constant"'))
    whole = table_run.make(tmp_path / "whole2", steps=8)
    whole.write_text(whole.read_text().replace('"cosine"', '"constant"'))
    killing.finish(whole)
    killing.finish(config)
    newest = tmp_path / "harmed" / "run" / "checkpoints" / "step-00000006" / "policy" / "table.npz"
    newest.write_bytes(newest.read_bytes()[:-7])
    output = killing.finish(config, "--run.steps", "8")
    assert f"damaged checkpoint, not used: {newest} has" in output
    assert "resumed after step 4" in output
    np.testing.assert_array_equal(final_table(tmp_path / "harmed/run", 8), final_table(tmp_path / "whole2/run", 8))


def test_when_every_checkpoint_is_damaged_the_run_does_not_start_over(tmp_path):
    for step in (1, 2):
        (saved(tmp_path, step) / "policy" / "weights").write_text("")
    for _ in range(2):  # the second time they are set aside already
        with pytest.raises(CheckpointError, match=r"no checkpoint in .* is valid"):
            newest_checkpoint(tmp_path)


def test_old_checkpoints_go_only_after_the_new_one(tmp_path):
    for step in (1, 2, 3):
        saved(tmp_path, step)
    assert steps_saved(tmp_path) == [3, 2]
    assert all(damage(tmp_path / f"step-0000000{s}") is None for s in (2, 3))


def test_disk_full_while_saving_leaves_the_last_one_and_says_so(tmp_path, monkeypatch):
    """The error raised where a file system would; test_full_disk.py has a real one, where the machine allows it."""
    config = table_run.make(tmp_path, steps=6)
    script = tmp_path / "full.py"
    script.write_text(
        "import errno, sys\n"
        "from gvpo_core.training import cli; from gvpo_core.training.policy import table\n"
        "real = table.TablePolicy.save\n"
        "def save(self, directory):\n"
        "    real(self, directory)\n"
        "    if self.update_count > 4:\n"
        "        raise OSError(errno.ENOSPC, 'No space left on device', str(directory))\n"
        "table.TablePolicy.save = save\n"
        "sys.exit(cli.main(['train', sys.argv[1]]))\n"
    )
    done = subprocess.run([sys.executable, script, config], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "the disk is full; free space and run again" in done.stderr
    assert "the checkpoint of step 2 is intact" in done.stderr
    assert "Traceback" not in done.stderr
    folder = tmp_path / "run" / "checkpoints"
    assert newest_checkpoint(folder).step == 2
    assert not list(folder.glob(".partial-*"))


def test_a_second_ctrl_c_leaves_at_once(tmp_path):
    """In the middle of a step that would take a minute."""
    (tmp_path / "slow.py").write_text("import time\ndef f(completions, **_):\n    time.sleep(60)\n    return [1.0]\n")
    config = table_run.make(tmp_path, reward=f'function = "{tmp_path / "slow.py"}:f"\ntimeout = 600.0')
    process = killing.start(config)
    while "run folder" not in process.stdout.readline():  # the header's last line: the first evaluation follows
        assert process.poll() is None
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)  # the reward itself may take 600 s
    assert process.returncode == 130, output
    assert "Press Ctrl-C again to quit now" in output and "quit without saving" in output and "Traceback" not in output
