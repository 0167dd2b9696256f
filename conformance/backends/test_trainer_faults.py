"""Kills and signals in each phase, over every backend, on a tiny real language model: the run ends as an unbroken one.

test_faults.py does the same at every file call, on the table policy; what is saved and restored differs by backend.
"""

import shutil
import signal
from pathlib import Path

import faults
import killing
import numpy as np
import pytest
import tiny_models
import trainer_backends
from trainer_runs import write_run

from gvpo_core.training.run.checkpoint import damage, steps_saved

PRESENT = trainer_backends.present()
if not PRESENT:
    pytest.skip("no backend of a language model is among the subjects", allow_module_level=True)

STEPS = 3
EVENTS = {"generate": 5, "reward": 5, "update": STEPS, "evaluate": 2, "save": STEPS}
"""Of an unbroken run with an evaluation at either end."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_models.write_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def run(backend, model):
    """Runs a config of two prompts a step (a pass over the data ends within a step), with a fault."""

    def run(folder: Path, *fault) -> int:
        if not folder.exists():
            config = write_run(folder, backend, model, steps=STEPS, extra="", model_extra="")
            config.write_text(config.read_text().replace("checkpoint_every = 2", "checkpoint_every = 1"))
        return faults.run(folder / "config.toml", *fault, preload=backend.preload)

    return run


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "folder"
    assert run(folder) == 0, (folder / "output.txt").read_text()
    return folder / "run"


@pytest.fixture
def same(backend, whole):
    def same(folder: Path) -> None:
        name = f"checkpoints/step-{STEPS:08d}/policy"
        one, two = backend.state(folder / name), backend.state(whole / name)
        assert one.keys() == two.keys() and len(one) > 3
        for key in one:
            np.testing.assert_array_equal(one[key], two[key], err_msg=key)
        assert killing.lasting(folder) == killing.lasting(whole)
        assert (folder / "completions.jsonl").read_bytes() == (whole / "completions.jsonl").read_bytes()

    return same


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["update", "generate", "reward", "evaluate", "save"])
def test_a_kill_at_the_starts_of_a_phase(phase, backend, run, same, tmp_path):
    """At the first and the last one where a start of a run takes seconds: JAX traces its programs."""
    starts = range(1, EVENTS[phase] + 1)
    for at in (starts[0], starts[-1]) if backend.name == "jax" else starts:
        folder = tmp_path / str(at)
        assert run(folder, phase, at) == -signal.SIGKILL, (folder / "output.txt").read_text()
        checkpoints = folder / "run" / "checkpoints"
        assert all(damage(checkpoints / f"step-{s:08d}") is None for s in steps_saved(checkpoints))
        assert run(folder) == 0, (folder / "output.txt").read_text()
        same(folder / "run")


@pytest.mark.slow_on("generate", "reward", "evaluate", "save", "jax")
@pytest.mark.parametrize(
    ("phase", "at", "number", "status"),
    [
        ("update", 2, signal.SIGINT, 130),
        ("generate", 4, signal.SIGINT, 130),
        ("reward", 4, signal.SIGTERM, 143),
        ("evaluate", 2, signal.SIGTERM, 143),
        ("save", 2, signal.SIGTERM, 143),
    ],
)
def test_a_signal_in_each_phase_saves_and_leaves(phase, at, number, status, run, same, tmp_path):
    folder = tmp_path / "one"
    assert run(folder, phase, at, number) == status, (folder / "output.txt").read_text()
    output = (folder / "output.txt").read_text()
    assert "Stopping after this step" in output and "resume with: " in output
    assert "Traceback" not in output
    assert steps_saved(folder / "run" / "checkpoints")
    assert run(folder) == 0, (folder / "output.txt").read_text()
    same(folder / "run")


@pytest.mark.slow
def test_one_byte_flipped_in_any_file_of_a_checkpoint_is_found(run, same, tmp_path):
    """`damage` names each file; a run of the policy's largest file damaged and one of its manifest start before it."""
    folder, kept = tmp_path / "one", tmp_path / "kept"
    assert run(folder) == 0
    shutil.copytree(folder / "run", kept)
    newest = kept / f"checkpoints/step-{STEPS:08d}"
    paths = [p for p in newest.rglob("*") if p.is_file()]
    assert len(paths) >= 2
    largest = max(paths, key=lambda p: p.stat().st_size)
    assert "policy" in largest.relative_to(newest).parts
    for path in paths:
        shutil.rmtree(folder / "run")
        shutil.copytree(kept, folder / "run")
        victim = folder / "run" / path.relative_to(kept)
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 0x10
        victim.write_bytes(content)
        assert str(victim) in (damage(folder / "run" / newest.relative_to(kept)) or "")
        if path == largest or path.parent == newest:
            assert run(folder) == 0, (folder / "output.txt").read_text()
            assert f"damaged checkpoint, not used: {victim}" in (folder / "output.txt").read_text()
            same(folder / "run")
