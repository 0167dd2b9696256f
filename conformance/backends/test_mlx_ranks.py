"""Two processes of MLX over its ring: groups on both, a process without rows, and what crosses between them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from batches import step_difference
from killing import trained
from mlx_policies import parameters, policy
from places import ROOT, SUPPORT
from ports import free_ports
from required import require
from trainer_backends import BACKENDS
from trainer_runs import write_run

require(subject="mlx")

from mlx_rank_worker import CUTS, KINDS, OF, SMOOTH, step


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder of the model, and that of what both processes wrote."""
    folder = tiny_models.write_model("llama", tmp_path_factory.mktemp("model"))
    out = tmp_path_factory.mktemp("out")
    path = os.pathsep.join(p for p in (str(SUPPORT), os.environ.get("PYTHONPATH")) if p)
    launch = [str(Path(sys.executable).parent / "mlx.launch"), "-n", "2", "--backend", "ring"]
    command = [*launch, "--env", f"PYTHONPATH={path}", "--", sys.executable, str(SUPPORT / "mlx_rank_worker.py")]
    done = subprocess.run([*command, str(folder), str(out)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return folder, out


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_step_is_that_of_one_process(kind: str, cut: str, ran) -> None:
    folder, out = ran
    alone = policy(folder, **(SMOOTH | KINDS[kind]))
    before = parameters(alone)
    facts, after = step(alone, list(range(len(OF))))
    moved = {name: after[name] - before[name] for name in after}
    assert max(float(np.abs(d).max()) for d in moved.values()) > 1e-3
    for rank in (0, 1):
        found = np.load(out / f"{kind}, {cut}, {rank}.npz")
        assert step_difference(moved, {name: found[name] - before[name] for name in before}) < 1e-5
        told = json.loads((out / f"{kind}, {cut}, {rank}.json").read_text())
        assert told["ranks"] == 2
        assert told["gradient_norm"] == pytest.approx(facts["gradient_norm"], rel=1e-5)


@pytest.mark.slow
def test_the_command_of_the_docs_trains_in_two_processes(tmp_path) -> None:
    """Other tests start the ranks themselves, in less time."""
    model = tiny_models.write_model("llama", tmp_path / "model")
    config = write_run(tmp_path, BACKENDS["mlx"], model, steps=2, extra="", model_extra="")
    (line,) = [x for x in (ROOT / "docs" / "launch.md").read_text().splitlines() if x.startswith("mlx.launch -n 2")]
    launch, *options = line.split()
    command = [str(Path(sys.executable).with_name(launch)), "--starting-port", str(free_ports()), *options]
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=config.parent, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["policy"]["ranks"] == 2
    assert len(trained(tmp_path / "run")) == 2


def test_processes_that_cannot_meet_are_reported(tmp_path, monkeypatch) -> None:
    from gvpo_core.training.config import ConfigError

    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match="cannot find each other"):
        policy(tiny_models.write_model("llama", tmp_path / "model"))
