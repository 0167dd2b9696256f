"""A disk that is really full: the run says so, the checkpoints before are intact, and with space it ends the same.

The file system is a small one in memory, mounted in a namespace of the test's own, which needs no privileges where the
kernel lets a user have one; elsewhere that test is skipped, and an error in nox -s "outside(full_disk)". The limit on a
file's size needs nothing.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import killing
import numpy as np
import pytest
import table_run

from gvpo_core.training import cli
from gvpo_core.training.policy.table import TablePolicy
from gvpo_core.training.run.checkpoint import damage, newest_checkpoint, save_failed, steps_saved

pytestmark = pytest.mark.core
pytest.importorskip("tyro", reason="the command line's extra is not installed")

RESPONSES = 3000  # of a prompt: a checkpoint has 72 kB
INSIDE = """
import json, subprocess, sys
from pathlib import Path
from gvpo_core.training.run.checkpoint import damage, steps_saved

config, run, size = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
run.mkdir()

def mount(*options):
    subprocess.run(["mount", "-t", "tmpfs", *options, "none", run], check=True)

def train():
    command = [sys.executable, "-m", "gvpo_core.training.cli", "train", config]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)

mount("-o", f"size={size}k")
first = train()
folder = run / "checkpoints"
steps = steps_saved(folder)
harmed = [damage(folder / f"step-{step:08d}") for step in steps]
mount("-o", "remount,size=8m")
second = train()
newest = folder / f"step-{max(steps_saved(folder)):08d}" / "policy" / "table.npz"
print(json.dumps({
    "status": first.returncode, "errors": first.stderr, "steps": steps, "harmed": harmed,
    "then": second.returncode, "then_errors": second.stderr, "logits": newest.read_bytes().hex(),
    "metrics": (run / "metrics.jsonl").read_text(),
}))
"""


def make(folder: Path) -> Path:
    config = table_run.make(folder, steps=6)
    responses = dict.fromkeys((*table_run.RESPONSES, *map(str, range(RESPONSES))), 1.0)
    table = dict.fromkeys(table_run.PROMPTS, responses)
    (folder / "table.json").write_text(json.dumps(table))
    config.write_text(config.read_text().replace('"cosine"', '"constant"'))
    return config


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    config = make(tmp_path_factory.mktemp("whole"))
    killing.finish(config)
    return config.parent / "run"


def own_namespace() -> str:
    """Empty where a file system can be mounted without privileges, else why not."""
    if not shutil.which("unshare"):
        return "there is no unshare"
    command = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/tmp"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"no mount without privileges here: {done.stderr.strip()[-200:]}"


@pytest.fixture
def namespace() -> None:
    if why := own_namespace():
        assert "full_disk" not in os.environ.get("GVPO_SUBJECTS", "").split(","), why
        pytest.skip(why)


@pytest.mark.slow
@pytest.mark.usefixtures("namespace")
def test_a_disk_that_fills_up_at_any_place(tmp_path, whole):
    """From room for nothing to room for all but the end: lines, checkpoints, the report."""
    said, sizes = [], [4, 40, 90, 130, 170, 200, 240, 280, 330]
    (tmp_path / "inside.py").write_text(INSIDE)
    for size in sizes:
        folder = tmp_path / str(size)
        config = make(folder)
        command = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, tmp_path / "inside.py"]
        command += [config, folder / "run", str(size)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        errors = found["errors"]
        assert "Traceback" not in errors, errors
        if found["status"]:
            assert found["status"] == 1 and "gvpo: " in errors, errors
            assert "No space left" in errors or "the disk is full" in errors, errors
            if found["steps"]:
                assert "intact" in errors, errors
        assert found["harmed"] == [None] * len(found["steps"])
        assert found["then"] == 0, found["then_errors"]
        saved = (whole / "checkpoints/step-00000006/policy/table.npz").read_bytes()
        assert arrays(bytes.fromhex(found["logits"])) == arrays(saved)
        (folder / "again").mkdir()
        (folder / "again" / "metrics.jsonl").write_text(found["metrics"])
        assert killing.lasting(folder / "again") == killing.lasting(whole)
        said.append((found["status"], found["steps"][:1]))
    statuses = [status for status, _ in said]
    assert statuses[0] == 1 and 1 in statuses[3:], said  # full before the first line, and in the middle of the run
    assert len({tuple(steps) for status, steps in said if status}) >= 2, said


def arrays(content: bytes) -> dict[str, bytes]:
    import io

    with np.load(io.BytesIO(content), allow_pickle=False) as saved:
        return {name: value.tobytes() for name, value in saved.items()}


def test_a_limit_on_file_sizes_during_a_save(tmp_path, whole):
    """A real error of the kernel in the middle of a checkpoint's largest file, on any machine."""
    config = make(tmp_path)
    killing.finish(config, "--run.steps", "2")
    limit = 60_000
    command = [sys.executable, "-m", "gvpo_core.training.cli", "train", str(config)]
    limited = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, preexec_fn=limited)
    assert done.returncode == 1, done.stderr
    assert "could not save step 4" in done.stderr and "the checkpoint of step 2 is intact" in done.stderr
    assert "a file may not grow this large here: check ulimit -f" in done.stderr
    assert "Traceback" not in done.stderr
    folder = tmp_path / "run" / "checkpoints"
    assert steps_saved(folder) == [2] and damage(folder / "step-00000002") is None
    assert newest_checkpoint(folder).step == 2 and not list(folder.glob(".partial-*"))
    killing.finish(config)
    trained, unbroken = ([r for r in killing.lasting(run) if r["kind"] == "train"] for run in (tmp_path / "run", whole))
    assert trained == unbroken


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Exception("Error while serializing: No space left on device (os error 28)"), "the disk is full"),
        (OSError(122, "Disk quota exceeded"), "the disk is full"),
        (Exception("I/O error: File too large (os error 27)"), "ulimit -f"),
        (
            Exception("Error while serializing: IoError(Os { code: 30, kind: ReadOnlyFilesystem })"),
            "Read-only file system",
        ),
        (OSError(30, "Read-only file system", "/x"), ": Read-only file system"),
        (RuntimeError("[save] cannot write: Input/output error"), ": Input/output error"),
        (OSError("odd"), ": odd"),
        (ValueError("odd"), "ValueError: odd"),
    ],
)
def test_errors_are_recognised_from_any_server(error, said, tmp_path):
    message = str(save_failed(tmp_path, 3, error))
    assert said in message and "there is no earlier checkpoint" in message


@pytest.mark.parametrize("error", ["(os error 28)", "(os error 30)", "of another kind"])
def test_an_export_that_cannot_be_written_is_one_line(error, tmp_path, capsys, monkeypatch):
    def cut_short(policy, folder):
        (folder / "part.safetensors").write_bytes(b"half")
        raise Exception(f"Error while serializing: I/O error: {error}")  # as safetensors' writer

    config, out = table_run.make(tmp_path, steps=1), tmp_path / "out"
    monkeypatch.setattr(TablePolicy, "export", cut_short)
    assert cli.main(["export", str(config), str(out)]) == 1 and not list(out.iterdir())
    said = capsys.readouterr().err
    if error == "of another kind":
        assert "Traceback" in said
        return
    why = "the disk is full; free space and run again" if "28" in error else "Read-only file system"
    assert said.splitlines()[-1] == f"gvpo: cannot write {out}: {why}" and "Traceback" not in said
