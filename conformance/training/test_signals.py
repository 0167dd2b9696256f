"""Signals of terminals and schedulers: a run saves and leaves, or goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import killing
import pytest
import run_folders
import table_run
from table_problem import reward

from gvpo_core.training import cli
from gvpo_core.training.policy.table import TablePolicy
from gvpo_core.training.run.checkpoint import steps_saved
from gvpo_core.training.run.signals import StopRequest

pytestmark = pytest.mark.core
pytest.importorskip("tyro", reason="the command line's extra is not installed")

STOPS = {"SIGUSR1": 138, "SIGUSR2": 140, "SIGXCPU": 152, "SIGQUIT": 131, "SIGTERM": 143, "SIGINT": 130}
STOPS |= {"SIGALRM": 142, "SIGVTALRM": 154}  # a watchdog's
STOPS |= {"SIGPWR": 158} if hasattr(signal, "SIGPWR") else {}  # a container or machine that shuts down

OTHERS = ("SIGPROF", "SIGIO", "SIGSTKFLT", "SIGRTMIN", "SIGRTMAX")  # of systems that have them
STOPS |= {name: 128 + getattr(signal, name) for name in OTHERS if hasattr(signal, name)}


def signalled(folder, numbers, steps=50):
    """A run that sends itself signals in its second step."""
    calls = []

    def sending(prompts, completions, **columns):
        calls.append(1)
        if len(calls) == 2:
            for number in numbers:
                os.kill(os.getpid(), number)
                time.sleep(0.1)  # handled one by one: signals that wait together are taken by their numbers
        return reward(prompts, completions)

    config = run_folders.config(folder, steps=steps, checkpoint_every=0)
    return run_folders.go(config, rewards={"value": sending})[0]


@pytest.mark.parametrize("name", STOPS)
def test_a_signal_finishes_the_step_saves_and_leaves(name, tmp_path, capsys):
    before = signal.getsignal(getattr(signal, name))
    result = signalled(tmp_path, [getattr(signal, name)])
    assert (result.step, result.exit_status) == (2, STOPS[name])
    assert steps_saved(tmp_path / "checkpoints") == [2] and "stop" in killing.events(tmp_path)
    assert signal.getsignal(getattr(signal, name)) is before
    assert "Stopping after this step and saving" in capsys.readouterr().out


def test_sighup_is_ignored(tmp_path, capsys):
    result = signalled(tmp_path, [signal.SIGHUP], steps=4)
    assert (result.step, result.exit_status) == (4, 0)


@pytest.mark.parametrize("second", ["SIGUSR1", "SIGXCPU", "SIGTERM", "SIGHUP"])
def test_a_warning_that_comes_again_does_not_cost_the_step(second, tmp_path, capsys):
    """The kernel sends SIGXCPU every second, SLURM SIGTERM after its warning, a launcher SIGTERM once more."""
    for first in ("SIGXCPU", "SIGTERM"):
        folder = tmp_path / first
        result = signalled(folder, [getattr(signal, first), *[getattr(signal, second)] * 3])
        assert (result.step, result.exit_status) == (2, STOPS[first])
        assert steps_saved(folder / "checkpoints") == [2]


@pytest.mark.parametrize("second", ["SIGINT", "SIGQUIT"])
def test_ctrl_c_after_another_request_leaves_at_once(second, tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        signalled(tmp_path, [signal.SIGTERM, getattr(signal, second)])
    assert not steps_saved(tmp_path / "checkpoints")


def test_a_handler_that_the_program_has_for_a_warning_stays():
    calls = []
    own = lambda number, frame: calls.append(number)
    before = signal.signal(signal.SIGUSR1, own), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            assert signal.getsignal(signal.SIGUSR1) is own and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGUSR1)
            assert calls == [signal.SIGUSR1] and stop.signal == 0
    finally:
        signal.signal(signal.SIGUSR1, before[0])
        signal.signal(signal.SIGHUP, before[1])


def test_a_handler_that_a_profiler_sets_meanwhile_stays():
    own = lambda number, frame: None
    before = signal.getsignal(signal.SIGPROF)
    try:
        with StopRequest():
            assert signal.getsignal(signal.SIGPROF) is not before
            signal.signal(signal.SIGPROF, own)
        assert signal.getsignal(signal.SIGPROF) is own
    finally:
        signal.signal(signal.SIGPROF, before)


def test_what_python_and_the_kernel_use_is_left_alone():
    with StopRequest():
        for name in ("SIGCHLD", "SIGPIPE", "SIGSEGV", "SIGABRT", "SIGTSTP", "SIGWINCH", "SIGCONT"):
            handler = signal.getsignal(getattr(signal, name))
            assert getattr(handler, "__module__", "") != StopRequest.__module__, name


def test_a_handler_of_the_rewards_own_stays_in_what_it_forks(tmp_path):
    """A limit of time by SIGALRM, in a child that the reward forks."""
    (tmp_path / "mine.py").write_text(
        "import os, signal\n"
        "def late(number, frame):\n"
        "    os._exit(7)\n"
        "def reward(prompts, completions, **_):\n"
        "    signal.signal(signal.SIGALRM, late)\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        os.kill(os.getpid(), signal.SIGALRM)\n"
        "        os._exit(0)\n"
        "    return [float(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))] * len(completions)\n"
    )
    config = table_run.make(tmp_path, steps=1, reward=f'function = "{tmp_path / "mine.py"}:reward"')
    assert cli.main(["train", str(config)]) == 0
    (trained,) = (r for r in killing.lasting(tmp_path / "run") if r["kind"] == "train")
    assert trained["reward/mean"] == 7.0


def test_reward_processes_outlive_the_signals_of_a_job(tmp_path):
    """SLURM sends them to all processes of a step: a dead worker cost the rewards of the step that was to be saved."""
    (tmp_path / "mine.py").write_text(
        "import os, signal, subprocess, sys\n"
        "def reward(prompts, completions, **_):\n"
        f"    for name in {[*STOPS, 'SIGHUP']!r}:\n"
        "        os.kill(os.getpid(), getattr(signal, name))\n"
        "    code = 'import signal, sys; sys.exit(signal.getsignal(signal.SIGTERM) != signal.SIG_DFL)'\n"
        "    assert subprocess.run([sys.executable, '-c', code]).returncode == 0\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        os._exit(signal.getsignal(signal.SIGTERM) != signal.SIG_DFL)\n"
        "    assert os.waitpid(child, 0)[1] == 0\n"
        "    return [1.0] * len(completions)\n"
    )
    config = table_run.make(tmp_path, steps=2, reward=f'function = "{tmp_path / "mine.py"}:reward"')
    assert cli.main(["train", str(config)]) == 0
    trained = [r for r in killing.lasting(tmp_path / "run") if r["kind"] == "train"]
    assert [r["responses/unscored"] for r in trained] == [0, 0]
    assert not any(value for r in trained for key, value in r.items() if key.startswith("reward_errors/"))


def test_the_command_line_saves_on_usr1_and_outlives_its_terminal(tmp_path):
    """SIGHUP while the model loads already; SIGUSR1 as `sbatch --signal=USR1@120` sends it to the job's steps."""
    config = table_run.make(tmp_path, steps=100_000)
    config.write_text(config.read_text().replace("checkpoint_every = 2", "checkpoint_every = 0\nkeep_best = false"))
    script = tmp_path / "run.py"
    script.write_text(
        "import os, signal, sys\n"
        "from gvpo_core.training import cli\n"
        "from gvpo_core.training.policy import load\n"
        "real = load.load_policy\n"
        "def loading(config):\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    return real(config)\n"
        "load.load_policy = loading\n"
        "sys.exit(cli.main(['train', sys.argv[1]]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-u", script, config], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for line in process.stdout:
        if line.split()[:1] == ["3"]:
            break
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 138, output
    assert "stopped by signal 10" in output and "resume with: " in output and "Traceback" not in output
    assert len(steps_saved(tmp_path / "run" / "checkpoints")) == 1


@pytest.mark.parametrize(
    "names", [("SIGUSR1",), ("SIGXCPU",), ("SIGQUIT",), ("SIGALRM",), ("SIGUSR1", "SIGTERM", "SIGTERM")]
)
def test_a_signal_during_an_export_leaves_nothing_half_written(names, tmp_path, capfd, monkeypatch):
    """The handlers and the signals are real."""

    def cut_short(policy, folder):
        (folder / "part.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), getattr(signal, names[0]))
        time.sleep(30)

    def removing(folder):
        for name in names[1:] if (tmp_path / "out" / "part.safetensors").exists() else ():
            os.kill(os.getpid(), getattr(signal, name))
        return sorted(remove(folder))

    config = table_run.make(tmp_path, steps=1)
    number = getattr(signal, names[0])
    before, remove = signal.signal(number, signal.SIG_DFL), Path.iterdir
    try:
        with monkeypatch.context() as patched, pytest.raises(SystemExit) as ended:
            patched.setattr(TablePolicy, "export", cut_short)
            patched.setattr(Path, "iterdir", removing)
            cli.main(["export", str(config), str(tmp_path / "out")])
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert ended.value.code == 128 + number and not list((tmp_path / "out").iterdir())
    assert cli.main(["export", str(config), str(tmp_path / "out")]) == 0
