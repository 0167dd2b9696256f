"""rollout.ahead where the policy draws for itself: a copy of it, in a process of its own, draws ahead."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ranks
import table_run
from killing import lasting
from sampler_runs import lines
from table_problem import REFERENCE, settings, table

from gvpo_core.training.cli import main
from gvpo_core.training.config import ConfigError
from gvpo_core.training.config.file import read_config
from gvpo_core.training.loop import train
from gvpo_core.training.policy.load import load_policy
from gvpo_core.training.policy.table import TablePolicy
from gvpo_core.training.samplers import Drawn, copied, gaps
from gvpo_core.training.samplers.copied import PolicyCopy
from gvpo_core.training.sampling import Sampling

pytestmark = pytest.mark.core


def early(folder: Path, *, ahead: int, steps: int = 5, lines: str = "") -> Path:
    config = table_run.make(folder, steps=steps)
    config.write_text(config.read_text().replace("[rollout]", f"[rollout]\nahead = {ahead}\n{lines}"))
    return config


def trained(folder: Path) -> list[dict]:
    return [r for r in lasting(folder / "run") if r["kind"] == "train"]


def drawn(folder: Path) -> list[tuple]:
    completions = lines(settings(folder / "run"), "completions")
    return [(c["step"], c["row"], c["response"]) for c in completions if c["kind"] == "train"]


class Snapshots:
    """Draws with the policy's own `generate`, at the parameters that it had `ahead` steps before."""

    def __init__(self, policy: TablePolicy, ahead: int) -> None:
        self.policy, self.ahead, self.logits = policy, ahead, {}

    def refresh(self, policy, version):
        self.logits[version] = policy.logits

    def generate(self, prompts, seeds, sampling):
        newest = max(self.logits)
        old = max(0, newest - self.ahead)
        now, self.policy.logits = self.policy.logits, self.logits[old]
        given = self.policy.generate(prompts, seeds, sampling)
        self.policy.logits = now
        return [[Drawn(r.tokens, r.finished, version=old) for r in many] for many in given]


@pytest.mark.slow_on("3")
@pytest.mark.parametrize("ahead", [1, 3])
def test_the_run_is_that_of_the_policy_drawing_with_its_parameters_of_n_steps_before(ahead, tmp_path, capsys):
    assert main(["train", str(early(tmp_path / "copy", ahead=ahead))]) == 0
    assert f"a copy of the policy on cpu, in a process of its own, up to {ahead} step" in " ".join(
        capsys.readouterr().out.split()
    )
    config = read_config(early(tmp_path / "own", ahead=0))
    policy = load_policy(config)
    train(config, policy, sampler=Snapshots(policy, ahead))
    assert drawn(tmp_path / "copy") == drawn(tmp_path / "own")
    assert [r["sampler/staleness"] for r in trained(tmp_path / "copy")] == [min(ahead, t) for t in range(5)]
    for mine, other in zip(trained(tmp_path / "copy"), trained(tmp_path / "own"), strict=True):
        assert mine["gradient_norm"] == other["gradient_norm"] and mine["responses/lost"] == 0
    assert trained(tmp_path / "copy")[-1]["gradient_norm"] > 0


def test_without_ahead_no_process_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(copied.PolicyCopy, "__init__", None)
    config = table_run.make(tmp_path, steps=2)
    assert main(["train", str(config)]) == 0


@pytest.mark.slow
def test_the_copy_is_compared_with_the_policy(tmp_path, capsys, monkeypatch):
    """In float64 they agree to rounding; a copy that misses the parameters of a step stops the run."""
    monkeypatch.setattr(gaps, "PROBE_EVERY", 1)
    seen, check = [], gaps.GapCheck.check

    def noted(self, theirs, ours, lengths, stale):
        seen.append(float(np.abs(theirs - ours).max()))
        check(self, theirs, ours, lengths, stale)

    monkeypatch.setattr(gaps.GapCheck, "check", noted)
    assert main(["train", str(early(tmp_path / "right", ahead=2))]) == 0
    assert len(seen) == 5 and max(seen) < 1e-12
    monkeypatch.setattr(TablePolicy, "save_parameters", lambda self, folder: TablePolicy.save(initial, folder))
    initial = load_policy(read_config(tmp_path / "right" / "config.toml"))
    assert main(["train", str(early(tmp_path / "old", ahead=2))]) == 1
    assert "the sampler says that it has the policy's weights" in capsys.readouterr().err


KILLER = """
import os, signal, sys
from gvpo_core.training.rollout import Rollout
from gvpo_core.training import improve, loop
from gvpo_core.training.samplers import copied

kill, taken, before = int(sys.argv[2]), 0, loop.improve

def improving(*given, **named):
    global taken
    taken += 1
    if taken == kill:
        print([c._folder for c in copies][0], [c._process._process.pid for c in copies][0], flush=True)
        os.kill(os.getpid(), signal.{signal})
    return before(*given, **named)

copies, made = [], copied.PolicyCopy.__init__

def making(self, *given):
    made(self, *given)
    copies.append(self)

loop.improve, copied.PolicyCopy.__init__ = improving, making
from gvpo_core.training.cli import main
sys.exit(main(["train", sys.argv[1]]))
"""


def run_that_is_killed(config: Path, at: int, name: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", KILLER.replace("{signal}", name), str(config), str(at)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def gone(condition) -> bool:
    until = time.monotonic() + 20
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return condition()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_a_run_that_ends_in_the_middle_repeats_its_steps_and_leaves_no_process(name, tmp_path, capsys):
    """With two steps drawn ahead, a checkpoint every two steps."""
    assert main(["train", str(early(tmp_path / "whole", ahead=2, steps=6))]) == 0
    config = early(tmp_path / "killed", ahead=2, steps=6)
    ended = run_that_is_killed(config, 4, name)
    assert ended.returncode == (130 if name == "SIGINT" else -signal.SIGKILL), ended.stderr
    folder, pid = next(line for line in ended.stdout.splitlines() if "gvpo-copy-" in line).split()
    assert gone(lambda: not Path(folder).exists() and not Path(f"/proc/{pid}").exists())
    assert main(["train", str(config)]) == 0
    assert lasting(tmp_path / "killed" / "run") == lasting(tmp_path / "whole" / "run")
    assert drawn(tmp_path / "killed") == drawn(tmp_path / "whole")


def test_a_copy_that_dies_ends_the_run_by_name(tmp_path, capsys, monkeypatch):
    refresh = PolicyCopy.refresh

    def dies(self, policy, version):
        if version == 2:
            os.kill(self._process._process.pid, signal.SIGKILL)
        refresh(self, policy, version)

    monkeypatch.setattr(PolicyCopy, "refresh", dies)
    assert main(["train", str(early(tmp_path, ahead=1))]) == 1
    assert (
        "the copy of the policy that draws ahead failed: its process was killed by SIGKILL" in capsys.readouterr().err
    )
    monkeypatch.undo()
    assert main(["train", str(tmp_path / "config.toml")]) == 0
    assert [r["sampler/staleness"] for r in trained(tmp_path)] == [0, 1, 1, 1, 1]


def test_what_cannot_be_copied_is_refused(tmp_path, capsys):
    config = read_config(early(tmp_path, ahead=1))
    with pytest.raises(ConfigError, match="this TablePolicy cannot be copied"):
        PolicyCopy(config, TablePolicy(table(REFERENCE)))

    policy = load_policy(config)
    (tmp_path / "table.json").write_text('{"p0": {"a": 1.0}}')
    with pytest.raises(ConfigError, match=r"copy of the policy that draws ahead failed: it has .*'parameters': 1"):
        PolicyCopy(config, policy)
    (tmp_path / "table.json").unlink()
    with pytest.raises(ConfigError, match=r"draws ahead failed: ConfigError: model\.path = .*no table can be read"):
        PolicyCopy(config, policy)


@pytest.fixture
def two_ranks(tmp_path):
    """Runs `work(policy)` on two ranks of the table that the settings name."""
    config = read_config(early(tmp_path, ahead=1))
    rows = json.loads((tmp_path / "table.json").read_text())

    def run(work):
        def of_rank(policy):
            policy.settings = replace(policy.settings, model=config.model)
            work(config, policy)

        ranks.run_ranks(2, of_rank, rows, config.optimizer)

    return run


def test_each_rank_has_a_copy_of_its_own(two_ranks):
    """They read what the main rank wrote; the folder holds what a rank may not have read yet, and ends with the run."""
    folders, processes = [], set()
    sampling, seeds = Sampling(2), [[11, 12, 13], [14]]

    def work(config, policy):
        copy = PolicyCopy(config, policy)
        processes.add(copy._process._process.pid)
        folders.append(copy._folder)
        for version in range(4):
            copy.refresh(policy, version)
            drawn = copy.generate([(0,), (1,)], seeds, sampling)
            want = policy.generate([(0,), (1,)], seeds, sampling)
            assert [[r.tokens for r in many] for many in drawn] == [[r.tokens for r in many] for many in want]
            policy.logits = policy.logits + np.arange(4.0) * (1 - 2 * (version % 2))
        assert {path.name for path in copy._folder.iterdir()} == {"2", "3"}
        policy.gather(np.zeros(1))
        copy.close()

    two_ranks(work)
    assert len(processes) == 2 and len({*folders}) == 1 and gone(lambda: not folders[0].exists())


def test_a_copy_that_fails_on_one_rank_ends_both_by_name(two_ranks, monkeypatch):
    made = copied.setup_of
    broken = lambda config, backend: made(config, "jaxx" if threading.current_thread().name == "second" else backend)
    monkeypatch.setattr(copied, "setup_of", broken)

    def work(config, policy):
        threading.current_thread().name = "second" if policy.rank else "first"
        with pytest.raises(
            ConfigError, match="the copy of the policy on cpu that draws ahead failed: KeyError: 'jaxx'"
        ):
            PolicyCopy(config, policy)

    two_ranks(work)


def test_ranks_on_several_hosts_and_of_jax_are_refused(two_ranks, monkeypatch):
    made, here = [], copied._folder
    monkeypatch.setattr(copied, "_folder", lambda size: made.append(here(size)) or made[-1])
    is_dir = Path.is_dir
    elsewhere = lambda path: is_dir(path) and not (path in made and threading.current_thread().name == "second")
    monkeypatch.setattr(Path, "is_dir", elsewhere)

    def hosts(config, policy):
        threading.current_thread().name = "second" if policy.rank else "first"
        with pytest.raises(ConfigError, match="the ranks are on several hosts"):
            PolicyCopy(config, policy)

    two_ranks(hosts)
    assert len(made) == 1 and not made[0].exists()

    def jax(config, policy):
        facts = replace(policy.describe(), backend="jax")
        policy.describe = lambda: facts
        with pytest.raises(ConfigError, match="gvpo_jax makes it only in a run of one process, and this one has 2"):
            PolicyCopy(config, policy)

    two_ranks(jax)


@pytest.mark.parametrize(
    ("lines", "ahead", "wanted"),
    [
        ('ahead_device = "cuda:1"', 0, "rollout.ahead = 0 makes no copy of the policy"),
        ('ahead_device = "cuda:1"\nsampler = "a.py:S"', 1, "rollout.sampler = 'a.py:S' makes no copy of the policy"),
        ("own_responses = 2", 1, "the policy draws all responses itself"),
    ],
)
def test_settings_that_do_nothing_are_refused(lines, ahead, wanted, tmp_path, capsys):
    assert main(["train", str(early(tmp_path, ahead=ahead, lines=lines))]) == 2
    assert wanted in capsys.readouterr().err


def test_a_ratio_to_the_policy_that_drew_is_refused_ahead(tmp_path, capsys):
    config = early(tmp_path, ahead=1)
    assert main(["train", str(config), "--objective.name", "grpo"]) == 2
    assert "rollout.ahead = 1; objective.name = 'grpo' weighs a response by its ratio" in capsys.readouterr().err


def test_the_copys_device_is_named_by_its_own_setting():
    copy = object.__new__(copied.PolicyCopy)
    copy._where = " on cuda:7"
    assert "failed: rollout.ahead_device is 'cuda:7'" in str(copy._failed("model.device is 'cuda:7'"))
    copy._where = ""
    assert "failed: model.device is 'cuda:7'" in str(copy._failed("model.device is 'cuda:7'"))


def test_a_dry_run_draws_with_the_copy_and_collecting_does_not(tmp_path, capsys, monkeypatch):
    config = early(tmp_path, ahead=2)
    assert main(["train", str(config), "--dry-run"]) == 0
    assert "a copy of the policy on cpu" in capsys.readouterr().out and not (tmp_path / "run").exists()
    monkeypatch.setattr(copied.PolicyCopy, "__init__", None)
    assert main(["collect", str(config), str(tmp_path / "groups.jsonl")]) == 0


@pytest.mark.slow
def test_a_resumed_run_may_move_the_copy(tmp_path, capsys):
    first = read_config(early(tmp_path, ahead=1, steps=4))
    assert train(first, load_policy(first)).exit_status == 0
    moved = replace(first, rollout=replace(first.rollout, ahead_device="cpu"))
    assert train(moved, load_policy(moved), from_step=2).exit_status == 0
    assert [r["step"] for r in trained(tmp_path)] == [1, 2, 3, 4]
