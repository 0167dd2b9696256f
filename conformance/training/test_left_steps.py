"""A step or an evaluation that cannot be finished: what was trained before it is saved, and the run resumes."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import killing
import numpy as np
import pytest
import ranks
import run_folders
import table_run
from table_problem import REFERENCE, reward, table

from gvpo_core.training import loop, train
from gvpo_core.training.cli import main
from gvpo_core.training.improve import NoSignalError
from gvpo_core.training.policy.table import TablePolicy
from gvpo_core.training.rewards import RewardError
from gvpo_core.training.run.checkpoint import steps_saved

pytestmark = pytest.mark.core

FAULTS = {
    "no score": (RewardError, lambda n: [None] * n),
    "an error": (RewardError, lambda n: 1 / 0),
    "a wrong count": (RewardError, lambda n: [0.0]),
    "a score a group": (NoSignalError, lambda n: [0.5 if i % 4 == 0 else None for i in range(n)]),
}
CASES = [(where, fault) for fault in FAULTS for where in ("step", "evaluation")]
CASES.remove(("evaluation", "a score a group"))  # which an evaluation accepts


def settings(folder, where, **run):
    """Three steps are saved by nothing but an error, or the end of the run; the second fault falls after step 2."""
    config = run_folders.config(folder, steps=4, checkpoint_every=0, keep_best=False, **run)
    config = replace(config, rewards={name: replace(r, isolation="thread") for name, r in config.rewards.items()})
    if where == "evaluation":
        config = replace(config, evaluation=replace(config.evaluation, every=2, responses=2))
    return config


def failing(where, fault, number=None):
    """A reward with a fault in step 3, or in the evaluation after step 2; it first sends this process a signal."""
    calls = []

    def scores(prompts, completions):
        calls.append(len(completions))
        first = 4 if where == "evaluation" else 3  # an evaluation before the first step is a call too
        if len(calls) >= first:  # a call that raised is made again, response by response
            if number and len(calls) == first:
                os.kill(os.getpid(), number)
                time.sleep(0.05)
            return FAULTS[fault][1](len(completions))
        return reward(prompts, completions)

    return {"value": scores}


def given(where, rewards):
    rows = {"evaluation_rows": run_folders.ROWS} if where == "evaluation" else {}
    return rows | {"rewards": rewards}


def whole(folder, where):
    """What a run without the fault leaves: the table, and its records."""
    _, policy = run_folders.go(settings(folder, where), **given(where, {"value": reward}))
    return policy.log_table(), killing.lasting(folder)


@pytest.mark.parametrize(("where", "fault"), CASES)
def test_an_error_costs_no_step_before_it(where, fault, tmp_path, capsys):
    table_of_whole, records = whole(tmp_path / "whole", where)
    config = settings(tmp_path / "run", where)
    with pytest.raises(FAULTS[fault][0]):
        run_folders.go(config, **given(where, failing(where, fault)))
    assert steps_saved(tmp_path / "run" / "checkpoints") == [2]
    assert killing.events(tmp_path / "run") == ["failed"]
    result, policy = run_folders.go(config, **given(where, {"value": reward}))
    assert (result.step, result.exit_status) == (4, 0)
    assert np.array_equal(policy.log_table(), table_of_whole)
    assert killing.lasting(tmp_path / "run") == records


@pytest.mark.parametrize(("where", "fault"), CASES)
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_stop_saves_although_the_step_cannot_be_finished(name, where, fault, tmp_path, capsys, caplog):
    """As where a job's end takes the server of a reward with it."""
    number = getattr(signal, name)
    table_of_whole, records = whole(tmp_path / "whole", where)
    config = settings(tmp_path / "run", where)
    result, _ = run_folders.go(config, **given(where, failing(where, fault, number)))
    assert (result.step, result.exit_status) == (2, 128 + number)
    assert steps_saved(tmp_path / "run" / "checkpoints") == [2]
    assert killing.events(tmp_path / "run") == ["stop"]
    assert any("asked to stop, and this step cannot be finished: " in text for text in caplog.messages)
    result, policy = run_folders.go(config, **given(where, {"value": reward}))
    assert (result.step, result.exit_status) == (4, 0)
    assert np.array_equal(policy.log_table(), table_of_whole)
    assert killing.lasting(tmp_path / "run") == records


def test_an_error_of_the_policy_while_it_draws_costs_no_step_before_it(tmp_path, capsys):
    class Short(TablePolicy):
        def generate(self, *args):
            if self.steps_taken == 2:
                raise MemoryError("no memory for the cache")
            return super().generate(*args)

    config = settings(tmp_path / "run", "step")
    policy = Short(table(REFERENCE), config.optimizer, updates=config.updates)
    with pytest.raises(MemoryError, match="no memory for the cache"):
        run_folders.go(config, policy=policy)
    assert steps_saved(tmp_path / "run" / "checkpoints") == [2]


def test_an_error_while_the_policy_changes_saves_nothing_of_it(tmp_path, capsys):
    class Breaks(TablePolicy):
        def update(self, *args, **options):
            update = super().update(*args, **options)
            if self.steps_taken == 3:
                raise MemoryError("no memory for the gradient")
            return update

    config = settings(tmp_path / "run", "step")
    policy = Breaks(table(REFERENCE), config.optimizer, updates=config.updates)
    with pytest.raises(MemoryError, match="no memory for the gradient"):
        run_folders.go(config, policy=policy)
    assert steps_saved(tmp_path / "run" / "checkpoints") == []


@pytest.mark.parametrize("stopping", [False, True])
def test_ranks_that_fail_together_save_together(stopping, tmp_path, capsys, monkeypatch):
    """One rank's reward fails."""
    heard, results = threading.Event(), []
    monkeypatch.setattr(loop, "StopRequest", lambda: ranks.Stops(heard))
    config = settings(tmp_path / "run", "step")
    calls = []

    def work(policy):
        def scores(prompts, completions):
            calls.append(policy.rank)
            if policy.rank == 1 and calls.count(1) == 3:
                if stopping:
                    heard.set()
                return [0.0]
            return reward(prompts, completions)

        results.append(train(config, policy, train_rows=run_folders.ROWS, rewards={"value": scores}))

    if stopping:
        ranks.run_ranks(2, work, table(REFERENCE), config.optimizer)
        assert [(result.exit_status, result.step) for result in results] == [(143, 2)] * 2
    else:
        with pytest.raises(RewardError):
            ranks.run_ranks(2, work, table(REFERENCE), config.optimizer)
    assert steps_saved(tmp_path / "run" / "checkpoints") == [2]


HANGS = """
import os, signal, time
folder = os.path.dirname(os.path.abspath(__file__))
def reward(prompts, completions, **_):
    if len(os.listdir(folder)) > {files}:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        os.mkdir(os.path.join(folder, f"hangs-{{os.getpid()}}"))
        time.sleep(3600)
    os.mkdir(os.path.join(folder, f"called-{{time.time_ns()}}"))
    return [float(len(c)) for c in completions]
"""


@pytest.mark.parametrize(
    "names", [pytest.param(["SIGTERM"], marks=pytest.mark.slow), ["SIGINT", "SIGINT"], ["SIGTERM", "SIGQUIT"]]
)
def test_a_signal_while_a_reward_hangs_ends_the_run_and_its_processes(names, tmp_path):
    pytest.importorskip("tyro", reason="the command line's extra is not installed")
    called = tmp_path / "called"
    called.mkdir()
    (called / "mine.py").write_text(HANGS.format(files=4))  # this one, __pycache__ and two calls
    config = table_run.make(tmp_path, steps=9, reward=f'function = "{called / "mine.py"}:reward"\ntimeout = 1')
    text = config.read_text().replace("checkpoint_every = 2", "checkpoint_every = 0\nkeep_best = false")
    config.write_text(text.replace("every = 3", "every = 0"))
    command = [sys.executable, "-m", "gvpo_core.training.cli", "train", config]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until = time.monotonic() + 60
    while not (hanging := list(called.glob("hangs-*"))):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.01)
    for name in names:
        process.send_signal(getattr(signal, name))
        time.sleep(0.2)
    output, _ = process.communicate(timeout=60)
    saved = steps_saved(tmp_path / "run" / "checkpoints")
    if len(names) == 1:
        assert process.returncode == 143 and len(saved) == 1 and saved[0] > 0, output
        assert "this step cannot be finished: reward right gave no score" in output
    else:
        assert process.returncode == 130 and "gvpo: quit without saving" in output, output
    assert "Traceback" not in output
    for path in [*hanging, *called.glob("hangs-*")]:
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name.partition("-")[2]), 0)


def test_a_collection_that_cannot_finish_its_step_stops_as_asked(tmp_path, capsys, monkeypatch):
    pytest.importorskip("tyro", reason="the command line's extra is not installed")
    (tmp_path / "mine.py").write_text(
        "import os, signal\n"
        "calls = []\n"
        "def reward(prompts, completions, **_):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 3:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        return [None] * len(completions)\n"
        "    return [float(len(c)) for c in completions]\n"
    )
    config = table_run.make(
        tmp_path, steps=4, reward=f'function = "{tmp_path / "mine.py"}:reward"\nisolation = "thread"'
    )
    out = tmp_path / "out.jsonl"
    assert main(["collect", str(config), str(out)]) == 143
    assert "the same command continues" in capsys.readouterr().out
    steps = (tmp_path / "out.jsonl.partial").read_text().count('"step": 2')
    assert steps == 2 and not out.exists()
