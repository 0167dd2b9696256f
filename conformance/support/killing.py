"""Kills a real `gvpo train` process at chosen moments and starts it again, until the run is done."""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import forks

_TIMED = (
    "time",
    "seconds/",
    "share/",
    "tokens_per_second",
    "memory/",
    "machine/",
    "reward_seconds/",
    "policy/",
)  # what differs between equal runs


def start(config: Path, *options: str) -> "subprocess.Popen[str]":
    """`gvpo train` in a separate process, its output in a pipe."""
    command = [sys.executable, "-m", "gvpo_core.training.cli", "train", str(config), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(config: Path, *options: str) -> str:
    """Runs to the end; the output."""
    process = start(config, *options)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


class Forked:
    """`gvpo train` forked from a server that has imported the framework already: a start in milliseconds."""

    @classmethod
    def of(cls, preload: Sequence[str] = ()) -> "Callable[[Path, Path], Forked]":
        """What starts runs from a server that has imported these modules."""
        return partial(cls, preload=preload)

    def __init__(self, config: Path, log: Path, preload: Sequence[str] = ()) -> None:
        log.write_text("")
        self.log = log
        self.process = forks.start(train, (str(config),), log, preload=preload)

    def has_spoken(self) -> bool:
        return "left state" in self.log.read_text()  # the titles above the first row

    def exit_status(self) -> int | None:
        return self.process.exitcode

    def wait_for_steps(self, run: Path, steps: int) -> None:
        """Returns once metrics.jsonl has this many steps.

        Raises: AssertionError: the process ends first, or five minutes pass.
        """
        end = time.monotonic() + 300
        while len(trained(run)) < steps:
            assert self.exit_status() is None and time.monotonic() < end, self.log.read_text()
            time.sleep(0.01)

    def finish(self) -> None:
        """Waits for its end, which must be a good one."""
        self.process.join(600)
        assert self.exit_status() == 0, self.log.read_text()

    def kill(self) -> None:
        self.process.kill()
        self.process.join(60)


class Spawned:
    """`gvpo train` as a person starts it."""

    def __init__(self, config: Path, log: Path) -> None:
        command = [sys.executable, "-m", "gvpo_core.training.cli", "train", str(config)]
        self.log = log
        with log.open("w") as f:
            self.process = subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT)

    def has_spoken(self) -> bool:
        return "left state" in self.log.read_text()  # the titles above the first row

    def exit_status(self) -> int | None:
        return self.process.poll()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(60)


def train(config: str) -> None:
    """In a forked process: `gvpo train config`."""
    from gvpo_core.training.cli import main

    sys.exit(main(["train", config]))


def kill_and_resume(
    config: Path,
    folder: Path,
    launch: "Callable[[Path, Path], Forked | Spawned]",
    *,
    kills: int,
    seed: int,
    longest: float,
) -> dict[str, int]:
    """SIGKILLs the run `kills` times, then lets it finish; returns how often each kind of moment was hit.

    Half of the kills wait for a checkpoint being written, the first or the second of the process (so that the run comes
    forward on a slow machine too), and fall inside it; the others come at a random time up to `longest` seconds after
    its first row.
    """
    chance = random.Random(seed)
    hit = {"saving": 0, "running": 0}
    log = folder.parent / "output.txt"
    for i in range(kills):
        process = launch(config, log)
        while not process.has_spoken() and process.exit_status() is None:
            time.sleep(0.001)
        in_save = i % 2 == 1
        stop = time.monotonic() + (60 if in_save else chance.uniform(0, longest))
        saving, first, wanted = False, None, chance.choice((1, 2))
        while process.exit_status() is None and time.monotonic() < stop and not saving:
            if in_save:
                names = {p.name for p in (folder / "checkpoints").glob(".partial-step-*")}
                first = first or names
                saving = bool(names if wanted == 1 else names - first)
            else:
                time.sleep(0.001)
        if saving:
            time.sleep(chance.uniform(0, 0.003))
        process.kill()
        if process.exit_status() != -signal.SIGKILL:
            assert process.exit_status() == 0, log.read_text()
            break  # done before it could be killed
        hit["saving" if saving else "running"] += 1
    process = launch(config, log)
    while process.exit_status() is None:
        time.sleep(0.01)
    assert process.exit_status() == 0, log.read_text()
    return hit


def trained(folder: Path) -> list[dict[str, Any]]:
    """The steps in metrics.jsonl of a run that may go on: a line that is not written to its end does not count."""
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in records if record["kind"] == "train"]


def lasting(folder: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl that equal runs share: no events, no times, no memory."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith(_TIMED)} for r in records if r["kind"] != "event"]


def events(folder: Path) -> list[str]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r["event"] for r in records if r["kind"] == "event"]
