"""Killed at each file call and at each start of a phase, a run goes on and ends as an unbroken one does."""

import signal

import faults
import killing
import pytest
from killed_runs import STEPS, kill_at_every_event, make, same, unbroken

from gvpo_core.training.run.checkpoint import steps_saved

pytestmark = pytest.mark.core
pytest.importorskip("tyro", reason="the command line's extra is not installed")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An unbroken run, that the others must equal."""
    return unbroken(tmp_path_factory.mktemp("whole"))


@pytest.mark.slow_on("call", "write", "generate", "update", "reward")
@pytest.mark.parametrize("fault", ["call", "write", *faults.PHASES])
def test_a_kill_at_every_event_of_a_run(fault, tmp_path, whole):
    kill_at_every_event(fault, tmp_path, whole)


# (phase, which of its starts, the step that is finished and saved). Of these phases three come with the first
# evaluation already (the test below), and a step has two updates.
SIGNALS = [
    ("generate", 2, 1), ("reward", 2, 1), ("update", 3, 2), ("evaluate", 2, 3),
    ("save", 1, 2), ("save", 2, 3), ("save", 3, 3),
]  # fmt: skip


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(("phase", "at", "last"), SIGNALS)
def test_a_signal_in_each_phase_saves_and_leaves(phase, at, last, number, status, tmp_path, whole):
    config = make(tmp_path)
    ended = (phase, at) == ("save", STEPS)  # in the run's last save all is done: there is nothing to go on with
    assert faults.run(config, phase, at, number) == (0 if ended else status)
    output = (tmp_path / "output.txt").read_text()
    assert "Stopping after this step" in output and "Traceback" not in output
    assert ("resume with: " in output) == ("stop" in killing.events(tmp_path / "run")) == (not ended)
    assert steps_saved(tmp_path / "run" / "checkpoints")[0] == last
    assert faults.run(config) == 0
    same(tmp_path / "run", whole)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("phase", ["generate", "reward", "evaluate"])
def test_a_signal_in_the_first_evaluation_leaves_before_a_step(phase, number, status, tmp_path, whole):
    config = make(tmp_path)
    assert faults.run(config, phase, 1, number) == status
    output = (tmp_path / "output.txt").read_text()
    assert f"stopped by signal {int(number)} before the first step, nothing to save\n  resume with: " in output
    assert "Traceback" not in output
    assert not [r for r in killing.lasting(tmp_path / "run") if r["kind"] == "train"]
    assert not steps_saved(tmp_path / "run" / "checkpoints")
    assert faults.run(config) == 0
    same(tmp_path / "run", whole)


def test_every_byte_counts(tmp_path, whole):
    """One byte flipped in any file of the newest checkpoint: found and named, and the one before used."""
    names = [p.relative_to(whole) for p in (whole / f"checkpoints/step-{STEPS:08d}").rglob("*") if p.is_file()]
    assert len(names) >= 2
    for i, name in enumerate(names):
        config = make(tmp_path / str(i))
        assert faults.run(config) == 0
        victim = tmp_path / str(i) / "run" / name
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 0x10
        victim.write_bytes(content)
        assert faults.run(config) == 0
        assert f"damaged checkpoint, not used: {victim}" in (tmp_path / str(i) / "output.txt").read_text()
        same(tmp_path / str(i) / "run", whole)
