"""After a power loss at any point of a run, the same command goes on and ends as an unbroken run does."""

from dataclasses import replace

import killing
import numpy as np
import power_loss
import pytest
import table_problem as problem

from gvpo_core.training import train
from gvpo_core.training.files.disk import write_synced
from gvpo_core.training.policy.table import TablePolicy
from gvpo_core.training.run.checkpoint import damage, steps_saved

pytestmark = pytest.mark.core
pytest.importorskip("tomli_w", reason="the command line's extra is not installed")

STEPS = 3
ROWS = [{"prompt": p} for p in problem.PROMPTS]


def run(folder, steps=STEPS):
    config = problem.settings(folder)
    config = replace(
        config,
        run=replace(config.run, steps=steps, checkpoint_every=1),
        rollout=replace(config.rollout, responses=4),
        evaluation=replace(config.evaluation, every=2),
    )
    policy = TablePolicy(problem.table(problem.REFERENCE), config.optimizer)
    train(config, policy, train_rows=ROWS, evaluation_rows=ROWS, rewards={"value": problem.reward})
    return policy.logits


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return run(folder), killing.lasting(folder), (folder / "completions.jsonl").read_bytes()


def goes_on(disk, tmp_path, whole) -> None:
    for kind in power_loss.KINDS:
        assert len(disk.states[kind]) > 8, "nothing was recorded"
        for i, state in enumerate(disk.states[kind]):
            place = tmp_path / f"{kind}{i}"
            power_loss.write(state, place)
            checkpoints = place / "run" / "checkpoints"
            assert all(damage(checkpoints / f"step-{s:08d}") is None for s in steps_saved(checkpoints)), (kind, i)
            np.testing.assert_array_equal(run(place / "run"), whole[0], err_msg=f"{kind} {i}")
            assert killing.lasting(place / "run") == whole[1], (kind, i)
            assert (place / "run" / "completions.jsonl").read_bytes() == whole[2], (kind, i)


def test_at_every_point_of_a_run_from_nothing(tmp_path, whole, capsys):
    (tmp_path / "disk").mkdir()
    disk = power_loss.Disk(tmp_path / "disk")
    with disk.recording():
        run(tmp_path / "disk" / "run")
    goes_on(disk, tmp_path, whole)


def test_at_every_point_of_a_resumed_start(tmp_path, whole, capsys):
    """Whose files are all there before, and are replaced."""
    run(tmp_path / "disk" / "run", steps=2)
    disk = power_loss.Disk(tmp_path / "disk")
    with disk.recording():
        run(tmp_path / "disk" / "run")
    assert all("run/config.toml" in state for state in disk.states["content"])
    assert all(state["run/config.toml"] and state["run/environment.json"] for state in disk.states["content"])
    goes_on(disk, tmp_path, whole)


def test_the_recorder_forgets_what_was_not_synced(tmp_path):
    """The files that a rename without a sync, and a new file in a folder without one, leave."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a").write_text("old")
    disk = power_loss.Disk(tmp_path / "disk")
    with disk.recording():
        (tmp_path / "disk" / "new").write_text("new")
        (tmp_path / "disk" / "new").rename(tmp_path / "disk" / "a")
    assert disk.states["content"][-1] == {"a": b""}
    assert disk.states["names"][-1] == {"a": b"old"}
    disk = power_loss.Disk(tmp_path / "disk")
    with disk.recording():
        write_synced(tmp_path / "disk" / "a", b"synced")
    assert disk.states["content"][-1] == disk.states["names"][-1] == {"a": b"synced"}
