"""Long run folders made quickly, and what it costs to resume them in a separate process."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import run_folders

from gvpo_core.training.files.records import encoded
from gvpo_core.training.run.checkpoint import begin_checkpoint, commit_checkpoint


@dataclass(frozen=True)
class Cost:
    """What a process used: peak resident memory in bytes, bytes read (Linux; else 0) and CPU seconds."""

    memory: int
    read: int
    cpu: float


def long_run(folder: Path, steps: int, responses: int) -> None:
    """Makes the folder of a run of `steps` steps and `responses` a step, by repeating the records of a short run."""
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


def resume(folder: Path, steps: int) -> Cost:
    """Resumes the run in a new process until it has `steps` steps. The starter is small: a child inherits its peak."""
    script = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", script, sys.executable, __file__, str(folder), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def _resume(folder: Path, steps: int) -> None:
    begin = time.process_time()
    assert run_folders.go(run_folders.config(folder, steps=steps))[0].step == steps
    cpu = time.process_time() - begin
    counts = Path("/proc/self/io")
    read = int(counts.read_text().split()[1]) if counts.exists() else 0
    unit = 1 if sys.platform == "darwin" else 1024
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(json.dumps({"memory": memory, "read": read, "cpu": cpu}))


if __name__ == "__main__":
    _resume(Path(sys.argv[1]), int(sys.argv[2]))
