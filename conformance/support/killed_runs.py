"""A run of the table, killed at each of its events and resumed: it must end as an unbroken one does."""

import shutil
import signal
from pathlib import Path

import faults
import killing
import numpy as np
import table_run

from gvpo_core.training.run.checkpoint import damage, steps_saved

STEPS = 3


def make(folder: Path, steps: int = STEPS) -> Path:
    """The config of a run that saves at every step."""
    config = table_run.make(folder, steps=steps)
    config.write_text(config.read_text().replace("checkpoint_every = 2", "checkpoint_every = 1"))
    return config


def unbroken(folder: Path) -> Path:
    """The run folder of a run that nothing stops."""
    config = make(folder)
    assert faults.run(config) == 0
    return config.parent / "run"


def same(run: Path, whole: Path) -> None:
    """Raises AssertionError: the runs' parameters, records or responses differ."""
    name = f"checkpoints/step-{STEPS:08d}/policy/table.npz"
    with np.load(run / name) as a, np.load(whole / name) as b:
        assert {k: v.tobytes() for k, v in a.items()} == {k: v.tobytes() for k, v in b.items()}
    assert killing.lasting(run) == killing.lasting(whole)
    assert (run / "completions.jsonl").read_bytes() == (whole / "completions.jsonl").read_bytes()


def kill_at_every_event(fault: str, folder: Path, whole: Path) -> None:
    """Runs again and again, killed one event later each time, until a run ends before its event."""
    for at in range(1, 1000):
        own = folder / str(at)
        config = make(own)
        status = faults.run(config, fault, at)
        if status == 0:  # fewer events than that in the whole run
            assert at > (15 if fault in ("call", "write") else 2), "the run had no such events"
            return
        assert status == -signal.SIGKILL, (own / "output.txt").read_text()
        checkpoints = own / "run" / "checkpoints"
        if checkpoints.exists():
            assert all(damage(checkpoints / f"step-{s:08d}") is None for s in steps_saved(checkpoints))
        assert faults.run(config) == 0, (own / "output.txt").read_text()
        same(own / "run", whole)
        shutil.rmtree(own)
    raise AssertionError("the run never ended")
