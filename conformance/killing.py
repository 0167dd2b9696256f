"""Kills a real `gvpo train` process at chosen moments and starts it again, until the run is done."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_TIMED = ("time", "seconds/", "share/", "tokens_per_second", "memory/", "policy/")  # what differs between equal runs


def start(config: Path, *options: str, **popen: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "gvpo_core.training.cli", "train", str(config), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **popen)


def finish(config: Path, *options: str) -> str:
    """Runs to the end; the output."""
    process = start(config, *options)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def kill_and_resume(config: Path, folder: Path, kills: int, seed: int, longest: float) -> dict[str, int]:
    """SIGKILLs the run `kills` times, then lets it finish; returns how often each kind of moment was hit.

    Half of the kills wait for a checkpoint being written and fall inside it; the others come at a random time up to
    `longest` seconds after the run has said its first line.
    """
    chance = random.Random(seed)
    hit = {"saving": 0, "running": 0, "done": 0}
    for i in range(kills):
        process = start(config)
        assert process.stdout is not None
        process.stdout.readline()
        stop = time.monotonic() + (60 if i % 2 else chance.uniform(0, longest))
        saving = False
        while process.poll() is None and time.monotonic() < stop and not saving:
            if i % 2:
                saving = any((folder / "checkpoints").glob(".partial-*"))
            else:
                time.sleep(0.001)
        if saving:
            time.sleep(chance.uniform(0, 0.003))
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
        if process.returncode == -signal.SIGKILL:
            hit["saving" if saving else "running"] += 1
        else:
            assert process.returncode == 0, output
            hit["done"] += 1
            break
    finish(config)
    return hit


def lasting(folder: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl that equal runs share: no events, no times, no memory."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith(_TIMED)} for r in records if r["kind"] != "event"]


def environment() -> dict[str, str]:
    return dict(os.environ, PYTHONUNBUFFERED="1")
