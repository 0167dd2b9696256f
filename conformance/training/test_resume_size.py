"""A run of 100,000 steps and 2,000,000 responses is resumed within 0.5 GB of memory and 30 s of one core."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import run_folders

from gvpo_core.training.report.columns import Columns
from gvpo_core.training.run.checkpoint import begin_checkpoint, commit_checkpoint
from gvpo_core.training.run.records import encoded

pytestmark = pytest.mark.core
pytest.importorskip("tomli_w", reason="the command line's extra is not installed")

RESUME = """
import sys, time
from pathlib import Path
import run_folders
begin = time.process_time()
assert run_folders.go(run_folders.config(Path(sys.argv[1]), steps=int(sys.argv[2])))[0].step == int(sys.argv[2])
print("CPU", time.process_time() - begin, file=sys.stderr)
"""


def long_run(folder: Path, steps: int, responses: int) -> None:
    """A run folder as one of `steps` steps leaves it, its records those of a short run again and again."""
    run_folders.go(run_folders.config(folder, steps=3))
    train = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().split("\n") if '"train"' in x][-1]
    row = json.loads((folder / "completions.jsonl").read_text().split("\n")[-2]) | {"response": "x" * 400, "step": 0}
    partial = begin_checkpoint(folder / "checkpoints", steps)
    shutil.copytree(folder / "checkpoints" / "step-00000003" / "policy", partial.policy, dirs_exist_ok=True)
    commit_checkpoint(folder / "checkpoints", steps, 1)
    line = encoded([row]).decode().replace('"step": 0', '"step": @') * responses
    with (folder / "metrics.jsonl").open("wb") as metrics, (folder / "completions.jsonl").open("w") as completions:
        for step in range(1, steps + 1):
            metrics.write(encoded([train | {"step": step}]))
            completions.write(line.replace("@", str(step)))


@pytest.mark.parametrize(
    ("steps", "memory"),
    [(5_000, 100), pytest.param(100_000, 500, marks=pytest.mark.slow)],  # MB: 15 more in 5,000 steps, 250 in 100,000
)
def test_a_long_run_is_resumed_in_bounded_memory_and_time(steps, memory, tmp_path, capsys):
    long_run(tmp_path / "run", steps, 20)
    (tmp_path / "resume.py").write_text(RESUME)
    command = [sys.executable, str(tmp_path / "resume.py"), str(tmp_path / "run"), str(steps + 1)]
    script = f"import resource, subprocess, sys; r = subprocess.run({command!r}, capture_output=True, text=True)\n"
    script += "print(r.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, r.stderr.split('CPU ')[-1])"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=600, check=True, env=env
    )
    status, peak, seconds = done.stdout.split()[:3]
    assert status == "0", done.stdout
    assert int(peak) / 1024 < memory
    assert float(seconds) < 30
    assert (tmp_path / "run" / "report.html").stat().st_mtime > (tmp_path / "run" / "config.toml").stat().st_mtime - 60


def test_columns_hold_each_steps_last_numbers():
    columns = Columns()
    columns.put(2, {"a": 1, "b": 2.5})
    columns.put(1, {"a": None})
    columns.put(3, {"c": 4})
    columns.put(2, {"a": 7})  # run again after a crash
    assert columns.keys() == ["a", "b", "c"]
    for key, steps, values in (("a", [1, 2], [np.nan, 7]), ("b", [], []), ("c", [3], [4]), ("d", [], [])):
        np.testing.assert_array_equal(columns.series(key), [steps, values])
