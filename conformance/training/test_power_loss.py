"""After a power loss at any point of a run, the same command goes on and ends as an unbroken run does."""

import json
from dataclasses import replace

import killing
import numpy as np
import power_loss
import pytest
import recorded_data
import table_problem as problem
import table_run

from gvpo_core.training import cli, train
from gvpo_core.training.config import ModelConfig
from gvpo_core.training.files.disk import write_synced
from gvpo_core.training.files.records import append_synced
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


@pytest.mark.slow
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


def lost_at_the_end(disk, folder) -> dict:
    """Files under `folder` that a power loss after the last event takes or empties, by kind."""
    there = power_loss.files_of(folder)
    assert any(content is not None for content in there.values()), "nothing was written"
    return {
        kind: sorted(name for name, content in there.items() if disk.states[kind][-1].get(name, "lost") != content)
        for kind in power_loss.KINDS
    }


def test_a_file_that_a_kill_left_empty_is_durable_once_it_is_appended_to(tmp_path):
    """As `gvpo collect` and a kill between the two syncs of a new file leave it: a name on no disk."""
    disk = power_loss.Disk(tmp_path)
    with disk.recording():
        (tmp_path / "a.jsonl").touch()
        append_synced(tmp_path / "a.jsonl", b"{}\n")
    assert lost_at_the_end(disk, tmp_path) == {"content": [], "names": []}


def test_a_collection_resumes_after_a_power_loss_at_every_point(tmp_path, capsys):
    config, disk = table_run.make(tmp_path / "made", steps=3), power_loss.Disk(tmp_path / "disk")
    (tmp_path / "disk").mkdir()
    with disk.recording():
        assert cli.main(["collect", str(config), str(tmp_path / "disk" / "new" / "below" / "out.jsonl")]) == 0
    whole = (tmp_path / "disk" / "new" / "below" / "out.jsonl").read_bytes()
    assert lost_at_the_end(disk, tmp_path / "disk") == {"content": [], "names": []}
    for kind in power_loss.KINDS:
        sizes = [len(state.get("new/below/out.jsonl.partial") or b"") for state in disk.states[kind]]
        assert len({*sizes} - {0}) == 3, (kind, "a step that was done is lost", sizes)
        for i, state in enumerate(disk.states[kind]):
            place = tmp_path / f"{kind}{i}"
            power_loss.write(state, place)
            out = place / "new" / "below" / "out.jsonl"
            if not out.exists():
                assert cli.main(["collect", str(config), str(out)]) == 0
            assert out.read_bytes() == whole, (kind, i)


def test_an_export_is_durable_once_its_folder_is_printed(tmp_path, capsys):
    config, disk = table_run.make(tmp_path / "made", steps=2), power_loss.Disk(tmp_path / "disk")
    assert cli.main(["train", str(config)]) == 0
    (tmp_path / "disk").mkdir()
    with disk.recording():
        arguments = ["export", str(tmp_path / "made" / "run"), str(tmp_path / "disk" / "new" / "out")]
        assert cli.main(arguments) == 0
    assert (tmp_path / "disk" / "new" / "out" / "table.json").exists()
    assert lost_at_the_end(disk, tmp_path / "disk") == {"content": [], "names": []}


def test_a_cache_of_reference_scores_in_a_new_folder_outlives_a_power_loss(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "table.json").write_text(json.dumps(problem.table(problem.REFERENCE)))
    config = recorded_data.config_of(
        tmp_path / "run", data={"reference_cache": str(tmp_path / "disk" / "new" / "cache")}
    )
    config = replace(config, model=ModelConfig(path=str(tmp_path / "model")))
    policy = recorded_data.Counting(
        problem.table(problem.REFERENCE), config.optimizer, updates=config.updates, model=config.model
    )
    (tmp_path / "disk").mkdir()
    disk = power_loss.Disk(tmp_path / "disk")
    with disk.recording():
        train(config, policy, train_rows=recorded_data.groups())
    assert lost_at_the_end(disk, tmp_path / "disk") == {"content": [], "names": []}
