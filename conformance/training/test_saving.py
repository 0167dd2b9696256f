"""Checkpoints written beside the next step: sampled meanwhile, changed by nothing, committed before the update."""

import hashlib
import json
import threading

import numpy as np
import pytest
from killed_runs import kill_at_every_event, make, unbroken

from gvpo_core.training import cli
from gvpo_core.training.policy import tensor_file
from gvpo_core.training.policy.table import TablePolicy
from gvpo_core.training.policy.tensor_file import Digest
from gvpo_core.training.run import checkpoint
from gvpo_core.training.run.checkpoint import (
    CheckpointError,
    begin_checkpoint,
    commit_checkpoint,
    damage,
    read_back,
    steps_saved,
)

pytestmark = pytest.mark.core
pytest.importorskip("tyro", reason="the command line's extra is not installed")


def written_by(policy: TablePolicy, directory) -> dict[str, Digest]:
    policy.save(directory)
    found = {}
    for path in directory.iterdir():
        content = path.read_bytes()
        found[path.name] = Digest(len(content), hashlib.sha256(content).hexdigest())
    return found


def test_sampling_overlaps_a_checkpoint_and_the_update_waits(tmp_path, monkeypatch) -> None:
    """The writer waits until the next step samples: a run that waits for the writer would never end."""
    sampled, events = threading.Event(), []
    generate, update = TablePolicy.generate, TablePolicy.update

    def saving(self, directory):
        sampled.clear()
        step = self.steps_taken // 2
        events.append(f"begin {step}")

        def write():
            assert threading.current_thread() is not threading.main_thread()
            assert step == 3 or sampled.wait(60), "the next step did not begin"
            found = written_by(self, directory)
            events.append(f"written {step}")
            return found

        return write

    def sampling(self, *args):
        sampled.set()
        events.append("sample")
        return generate(self, *args)

    def updating(self, *args, **options):
        step = self.steps_taken // 2
        assert step == 0 or step in steps_saved(tmp_path / "run" / "checkpoints"), "updated before the commit"
        events.append("update")
        return update(self, *args, **options)

    monkeypatch.setattr(TablePolicy, "saving", saving, raising=False)
    monkeypatch.setattr(TablePolicy, "generate", sampling)
    monkeypatch.setattr(TablePolicy, "update", updating)
    config = make(tmp_path)
    config.write_text(config.read_text().replace("every = 3", "every = 100"))  # no evaluation between save and step
    assert cli.main(["train", str(config)]) == 0
    assert [event for event in events if "begin" in event or "written" in event] == [
        f"{what} {step}" for step in (1, 2, 3) for what in ("begin", "written")
    ]
    assert events.index("begin 1") < events.index("sample", events.index("begin 1")) < events.index("written 1")
    folder = tmp_path / "run" / "checkpoints"
    assert all(damage(folder / f"step-{step:08d}") is None for step in steps_saved(folder))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return unbroken(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("fault", ["save", *(pytest.param(f, marks=pytest.mark.slow) for f in ("call", "write"))])
def test_a_kill_at_every_event_of_a_run_that_saves_beside_its_steps(fault, tmp_path, whole, monkeypatch) -> None:
    monkeypatch.setenv("GVPO_TEST_SAVES_BESIDE", "1")
    kill_at_every_event(fault, tmp_path, whole)


def failing(step: int, error: Exception):
    def saving(self, directory):
        done = self.steps_taken // 2

        def write():
            if done == step:
                (directory / "half").write_text("half")
                raise error
            return written_by(self, directory)

        return write

    return saving


def test_an_error_while_writing_stops_the_run_and_leaves_the_checkpoint_before(tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setattr(TablePolicy, "saving", failing(2, OSError(28, "No space left on device")), raising=False)
    config = make(tmp_path)
    assert cli.main(["train", str(config)]) == 1
    said = capfd.readouterr().err
    assert "could not save step 2" in said and "the checkpoint of step 1 is intact" in said and "disk is full" in said
    assert steps_saved(tmp_path / "run" / "checkpoints") == [1]
    monkeypatch.delattr(TablePolicy, "saving")
    assert cli.main(["train", str(config)]) == 0


def test_an_error_in_the_next_step_loses_no_checkpoint(tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setattr(TablePolicy, "saving", failing(99, OSError()), raising=False)
    generate, calls = TablePolicy.generate, []

    def third(self, *args):
        calls.append(1)
        if self.steps_taken == 4:
            raise ValueError("the third step fails")
        return generate(self, *args)

    monkeypatch.setattr(TablePolicy, "generate", third)
    config = make(tmp_path)
    config.write_text(config.read_text().replace("every = 3", "every = 100"))
    assert cli.main(["train", str(config)]) == 1
    assert "the third step fails" in capfd.readouterr().err
    assert steps_saved(tmp_path / "run" / "checkpoints") == [2, 1]


def test_a_file_that_does_not_hold_what_was_written_is_not_committed(tmp_path, monkeypatch, capfd) -> None:
    def saving(self, directory):
        def write():
            found = written_by(self, directory)
            path = directory / "table.npz"
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
            return found

        return write

    monkeypatch.setattr(TablePolicy, "saving", saving, raising=False)
    assert cli.main(["train", str(make(tmp_path))]) == 1
    assert "table.npz does not hold what was written into it" in capfd.readouterr().err
    assert steps_saved(tmp_path / "run" / "checkpoints") == []


def test_each_file_of_a_checkpoint_is_read_once(tmp_path, monkeypatch) -> None:
    read: list[str] = []
    sha256 = checkpoint._sha256
    monkeypatch.setattr(checkpoint, "_sha256", lambda path: read.append(path.name) or sha256(path))
    policy = begin_checkpoint(tmp_path, 1).policy
    entry = tensor_file.Tensor("F32", (2,), 8, lambda: np.ones(2, np.float32))
    written = {"a": tensor_file.write(policy / "a", {"x": entry}, {})}
    (policy / "b").write_text("written without a digest")
    read_back(policy, written)
    final = commit_checkpoint(tmp_path, 1, 1, written={f"policy/{name}": d for name, d in written.items()}).directory
    assert sorted(read) == ["a", "b"]
    assert damage(final) is None
    assert json.loads((final / "manifest.json").read_text())["files"]["policy/a"]["sha256"] == sha256(
        final / "policy/a"
    )
    begin_checkpoint(tmp_path, 2)
    with pytest.raises(CheckpointError, match="gone was written and is missing now"):
        commit_checkpoint(tmp_path, 2, 1, written={"policy/gone": written["a"]})


def test_a_tensor_file_is_safetensors_and_what_its_digest_says(tmp_path) -> None:
    values = {f"t{i}": np.arange(i * 3, dtype=np.float32) for i in range(4)}
    entries = {
        name: tensor_file.Tensor("F32", v.shape, v.nbytes, lambda v=v: memoryview(v)) for name, v in values.items()
    }
    digest = tensor_file.write(tmp_path / "f", entries, {"rows": "{}"})
    content = (tmp_path / "f").read_bytes()
    assert digest == Digest(len(content), hashlib.sha256(content).hexdigest())
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    assert header.pop("__metadata__") == {"rows": "{}"} and (8 + size) % 8 == 0
    for name, entry in header.items():
        first, end = entry["data_offsets"]
        np.testing.assert_array_equal(np.frombuffer(content[8 + size :][first:end], np.float32), values[name])
    wrong = tensor_file.Tensor("F32", (2,), 8, lambda: np.ones(3, np.float32))
    with pytest.raises(ValueError, match="x gave 12 bytes to write; expected 8"):
        tensor_file.write(tmp_path / "g", {"x": wrong}, {})
