"""Two processes by torchrun on two nodes, by SLURM's script and by SkyPilot's command take the steps of one.

The machine stands for all nodes; stand-ins for srun and scontrol start the tasks as SLURM does.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch_jobs import assert_two_ranks_took_the_steps_of_one, environment, write_job
from places import ROOT
from ports import free_port
from required import require

require(subject="torch")
SRUN = """#!{python}
import os, signal, subprocess, sys
command = [a for a in sys.argv[1:] if not a.startswith("--")]
count = int(os.environ["SLURM_NTASKS"])
tasks = [
    subprocess.Popen(command, env=os.environ | {{"SLURM_PROCID": i, "SLURM_LOCALID": i}})
    for i in map(str, range(count))
]
open(os.environ["TASKS"], "w").write(" ".join(str(t.pid) for t in tasks))
sys.exit(max(abs(t.wait()) for t in tasks))
"""
SCONTROL = """#!/bin/sh
case "$1" in
  show) echo localhost; echo other ;;
  requeue) echo "$2" >> "$REQUEUED" ;;
esac
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return write_job(tmp_path)


def finish(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    """Their exit statuses; none is left behind."""
    try:
        return [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_the_shells_of_two_nodes_read_their_scripts() -> None:
    yaml = pytest.importorskip("yaml")
    launch = ROOT / "examples" / "launch"
    of_skypilot = yaml.safe_load((launch / "skypilot.yaml").read_text())["run"]
    for script in ((launch / "slurm.sh").read_text(), of_skypilot):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        assert "gvpo" in script


@pytest.mark.slow
def test_two_nodes_by_torchrun(job: Path, monkeypatch) -> None:
    place = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    train = ["-m", "gvpo_core.training.cli", "train", "config.toml"]
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *place, "--node-rank", str(node), *train],
            cwd=job,
            env=environment(),
            stdout=subprocess.DEVNULL,
        )
        for node in range(2)
    ]
    assert finish(nodes) == [0, 0]
    assert_two_ranks_took_the_steps_of_one(job, monkeypatch)


@pytest.mark.slow
def test_skypilot_s_command_on_two_nodes(job: Path, monkeypatch) -> None:
    yaml = pytest.importorskip("yaml")
    task = yaml.safe_load((ROOT / "examples" / "launch" / "skypilot.yaml").read_text())
    command = task["run"].replace("29500", str(free_port()))
    bin_folder = Path(sys.executable).parent
    variables = task["envs"] | {
        "RUN_FOLDER": "run",
        "SKYPILOT_NODE_IPS": "127.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": str(task["num_nodes"]),
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "GVPO_PROCESSES_PER_NODE": "1",
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
    }
    nodes = [
        subprocess.Popen(
            ["bash", "-c", command],
            cwd=job,
            env=environment(**variables, SKYPILOT_NODE_RANK=str(node)),
            stdout=subprocess.DEVNULL,
        )
        for node in range(2)
    ]
    assert finish(nodes) == [0, 0]
    assert_two_ranks_took_the_steps_of_one(job, monkeypatch)


@pytest.fixture
def slurm(job: Path) -> dict[str, str]:
    """The environment of a job with two tasks, with srun, scontrol and gvpo on PATH."""
    folder = job / "bin"
    folder.mkdir()
    gvpo = f'#!/bin/sh\nexec {sys.executable} -m gvpo_core.training.cli "$@"\n'
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL), ("gvpo", gvpo)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return environment(
        PATH=f"{folder}:{os.environ['PATH']}",
        SLURM_JOB_NODELIST="node[0-1]",
        SLURM_JOB_ID=str(free_port() - 20000),  # the script makes a port of it
        SLURM_NTASKS="2",
        TASKS=str(job / "tasks"),
        REQUEUED=str(job / "requeued"),
    )


@pytest.mark.slow
def test_slurm_s_script_is_requeued_at_its_time_limit_and_resumes(
    job: Path, slurm: dict[str, str], monkeypatch
) -> None:
    """USR1 reaches the tasks while they train; the run saves, the job is requeued, and the next start goes on."""
    (job / "reward.py").write_text(
        "import time\n" + (job / "reward.py").read_text().replace("    return", "    time.sleep(1)\n    return")
    )
    script = ["bash", str(ROOT / "examples" / "launch" / "slurm.sh"), "config.toml"]
    first = subprocess.Popen(script, cwd=job, env=slurm, stdout=subprocess.DEVNULL)
    metrics = job / "run" / "metrics.jsonl"
    for _ in range(2400):
        if metrics.exists() and metrics.read_text().count('"kind": "train"') >= 1:
            break
        assert first.poll() is None, "the job has ended"
        time.sleep(0.05)
    for task in (job / "tasks").read_text().split():
        os.kill(int(task), signal.SIGUSR1)
    assert finish([first]) == [138]
    assert (job / "requeued").read_text().strip() == slurm["SLURM_JOB_ID"]
    assert metrics.read_text().count('"kind": "train"') < 3, "the run ended before the signal"
    again = subprocess.Popen(
        script, cwd=job, env=slurm | {"SLURM_JOB_ID": str(free_port() - 20000)}, stdout=subprocess.DEVNULL
    )
    assert finish([again]) == [0]
    assert_two_ranks_took_the_steps_of_one(job, monkeypatch)
