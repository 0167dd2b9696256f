"""Trackers: what the real packages stored is read back; failures cost the tracker, never the run."""

import importlib.util
import json
import sqlite3
import subprocess
import sys
import types

import pytest

from gvpo_core.training.config import ConfigError
from gvpo_core.training.watch import trackers
from gvpo_core.training.watch.trackers import open_trackers

pytestmark = pytest.mark.core

TRAIN = {"kind": "train", "step": 3, "time": 1000.0, "reward/mean": 0.5, "kl": None, "memory/peak": 2**33}
EVALUATION = {"kind": "eval", "step": 3, "time": 1001.0, "eval/reward": 0.25}
EVENT = {"kind": "event", "step": 3, "time": 1002.0, "event": "resume", "message": "from step 2"}


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


def log_all(names, run):
    tracker = open_trackers(names, run, {"run": {"steps": 4}})
    for record in (TRAIN, EVALUATION, EVENT):
        tracker.log(record)
    tracker.close()
    tracker.close()  # a second close does nothing


@needs("tensorboard")
def test_tensorboard_holds_the_numbers(tmp_path):
    log_all(["tensorboard"], tmp_path)
    read = "from tensorboard.backend.event_processing.event_accumulator import EventAccumulator as E\n"
    read += "import json, sys; e = E(sys.argv[1]); e.Reload()\n"
    read += "rows = {t: [(x.step, x.tensor_proto.float_val[0], x.wall_time) for x in e.Tensors(t)]"
    read += " for t in e.Tags()['tensors']}\nprint(json.dumps(rows))"
    out = subprocess.run(
        [sys.executable, "-c", read, str(tmp_path / "tensorboard")], capture_output=True, text=True, check=True
    )
    assert json.loads(out.stdout) == {
        "reward/mean": [[3, 0.5, 1000.0]],
        "memory/peak": [[3, 2.0**33, 1000.0]],
        "eval/reward": [[3, 0.25, 1001.0]],
    }


@needs("trackio")
def test_trackio_holds_the_numbers_and_stdout_stays_ours(tmp_path, monkeypatch):
    # Its own process: trackio keeps module-level state, threads and an exit hook.
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    code = "import sys; from pathlib import Path; from gvpo_core.training.watch.trackers import open_trackers as o\n"
    code += "t = o(['trackio'], Path(sys.argv[1]), {'beta': 0.1}); print('ours', flush=True)\n"
    code += f"[t.log(r) for r in {[TRAIN, EVALUATION, EVENT]!r}]; t.close()"
    out = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    assert out.stdout.splitlines()[0] == "ours"
    (database,) = (tmp_path / "trackio").glob("**/*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, step, metrics from metrics order by id").fetchall()
    connection.close()
    assert [(step, json.loads(numbers)) for _, step, numbers in rows] == [
        (3, {"reward/mean": 0.5, "memory/peak": 2**33}),
        (3, {"eval/reward": 0.25}),
    ]
    assert rows[0][0].startswith("run-")


@needs("wandb")
def test_wandb_offline_writes_a_run(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.setenv("WANDB_MODE", "offline")
    code = "import sys; from pathlib import Path; from gvpo_core.training.watch.trackers import open_trackers as o\n"
    code += "t = o(['wandb'], Path(sys.argv[1]), {'beta': 0.1})\n"
    code += f"[t.log(r) for r in {[TRAIN, EVALUATION, EVENT]!r}]; t.close()"
    out = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    assert b"reward/mean" in file.read_bytes() and b"eval/reward" in file.read_bytes()
    identity = json.loads((run / "trackers.json").read_text())["id"]
    assert identity in file.name


class Fake:
    """A package whose runs keep what they are sent, or fail."""

    module, install = "fake_tracker", "fake"
    sent: list
    fail_at: int | None = None
    fail_to_start = False

    def __init__(self, module, run, identity, config):
        if self.fail_to_start:
            raise OSError("no login")
        print("hello from a tracker")

    def send(self, numbers, step, time):
        if step == self.fail_at:
            raise OSError("the server is gone")
        self.sent.append((step, numbers))

    def close(self):
        self.sent.append("closed")


@pytest.fixture
def fake(monkeypatch):
    kind = type("Kind", (Fake,), {"sent": []})
    monkeypatch.setitem(trackers._KINDS, "fake", kind)
    monkeypatch.setitem(sys.modules, "fake_tracker", types.ModuleType("fake_tracker"))
    return kind


def test_a_failing_tracker_warns_once_and_the_others_continue(tmp_path, fake, monkeypatch):
    other = type("Other", (Fake,), {"sent": []})
    monkeypatch.setitem(trackers._KINDS, "other", other)
    fake.fail_at = 2
    said = []
    tracker = open_trackers(["fake", "other"], tmp_path, {}, warn=said.append)
    for step in (1, 2, 3):
        tracker.log(TRAIN | {"step": step})
    tracker.close()
    assert said == ["tracker 'fake' failed and is off for the rest of the run: OSError: the server is gone"]
    assert [x[0] for x in fake.sent] == [1]
    assert [x[0] for x in other.sent[:3]] == [1, 2, 3] and other.sent[3] == "closed"


def test_the_default_warning_is_a_python_warning(tmp_path, fake):
    fake.fail_at = 3
    tracker = open_trackers(["fake"], tmp_path, {})
    with pytest.warns(UserWarning, match="tracker 'fake' failed"):
        tracker.log(TRAIN)
    tracker.log(TRAIN | {"step": 4})


def test_a_resumed_run_keeps_its_id_and_sends_no_step_twice(tmp_path, fake):
    first = open_trackers(["fake"], tmp_path, {})
    for step in (1, 2, 3):
        first.log(TRAIN | {"step": step})
    identity = json.loads((tmp_path / "trackers.json").read_text())["id"]
    second = open_trackers(["fake"], tmp_path, {})  # killed before close; the last checkpoint was step 1
    for step in (2, 3, 4):
        second.log(TRAIN | {"step": step})
    second.log(EVALUATION | {"step": 4})
    assert [x[0] for x in fake.sent] == [1, 2, 3, 4, 4]
    assert json.loads((tmp_path / "trackers.json").read_text())["id"] == identity


def test_nothing_is_printed_to_stdout(tmp_path, fake, capsys):
    open_trackers(["fake"], tmp_path, {}).close()
    assert capsys.readouterr().out == ""


def test_no_names_no_file(tmp_path):
    tracker = open_trackers([], tmp_path, {})
    tracker.log(TRAIN)
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_bad_names_and_missing_packages(tmp_path, fake, monkeypatch):
    with pytest.raises(ConfigError, match=r"'tensorbord'; expected .*; did you mean tensorboard\?"):
        open_trackers(["tensorbord"], tmp_path, {})
    with pytest.raises(ConfigError, match=r"trackers has 'mlflow'; expected wandb, trackio, tensorboard"):
        open_trackers(["mlflow"], tmp_path, {})
    fake.fail_to_start = True
    with pytest.raises(trackers.TrackerError, match=r"tracker 'fake' did not start \(OSError: no login\)"):
        open_trackers(["fake"], tmp_path, {})
    monkeypatch.setitem(sys.modules, "fake_tracker", None)  # Python's own mark of a module that cannot be imported
    with pytest.raises(ConfigError, match="pip install fake"):
        open_trackers(["fake"], tmp_path, {})
