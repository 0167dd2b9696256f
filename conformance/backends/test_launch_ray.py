"""Two workers of Ray Train, on a real Ray of this machine, take the steps of one process."""

import subprocess
import sys
from pathlib import Path

from launch_jobs import assert_two_ranks_took_the_steps_of_one, environment, write_job
from places import ROOT
from required import require

require("ray", "torch", "transformers", subject="ray")


def test_two_workers(tmp_path: Path, monkeypatch) -> None:
    job = write_job(tmp_path)
    command = [
        sys.executable,
        str(ROOT / "examples" / "launch" / "ray_train.py"),
        "config.toml",
        "--workers",
        "2",
        "--cpu",
    ]
    path = environment(PYTHONPATH=":".join(p for p in sys.path if p), RAY_USAGE_STATS_ENABLED="0")
    done = subprocess.run(command, cwd=job, env=path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert_two_ranks_took_the_steps_of_one(job, monkeypatch)
