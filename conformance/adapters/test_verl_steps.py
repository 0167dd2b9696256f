"""verl's own actor worker, FSDP engine, loss and mini-batching on CPU take the steps of gvpo_core on whole batches."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from places import SUPPORT
from required import require

with warnings.catch_warnings(action="ignore"):  # of verl's, at import
    require("verl", "transformers", subject="verl")
pytestmark = pytest.mark.filterwarnings("default")  # verl warns of engines that are not installed

EVEN, UNEVEN = [4, 4, 4, 4], [5, 2, 1, 4, 2]  # the second: 14 rows and 2 that only pad
REFUSED = {  # changes of config.json, and the message
    "dropout": ({"attention_dropout": 0.3}, "random numbers in training mode (LlamaAttention.attention_dropout = 0.3)"),
    "dynamic RoPE": (
        {
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 700.0},
            "max_position_embeddings": 8,
        },
        "rope_type is 'dynamic' and a row has",
    ),
}
CASES: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "one mini-batch twice": {"groups": EVEN, "mini": 16, "epochs": 2},
        "adapters": {"groups": EVEN, "mini": 8, "epochs": 2, "lora": 3},
        "dynamic mini-batches of unequal groups": {"groups": UNEVEN, "mini": 8, "epochs": 2, "dynamic": True},
    },
    2: {
        "groups on both": {"groups": UNEVEN, "mini": 16, "epochs": 1, "micro": 4},
        "dynamic mini-batches on both": {"groups": EVEN, "mini": 8, "epochs": 2, "dynamic": True},
    },
}


REFUSALS = {
    name: {"refused": changes, "groups": EVEN, "mini": 8, "epochs": 1} for name, (changes, _) in REFUSED.items()
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_models.make_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def out(folder, tmp_path_factory):
    made: dict[int, Path] = {}

    def get(processes: int) -> Path:
        """What verl_runs.py has written: all cases of so many processes, started once, for verl is slow to import."""
        if processes not in made:
            made[processes] = tmp_path_factory.mktemp("runs")
            path = os.pathsep.join([str(SUPPORT), *(p for p in sys.path if p)])
            env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
            command += [str(processes), str(SUPPORT / "verl_runs.py"), str(folder), str(made[processes])]
            command += [json.dumps(CASES[processes] | (REFUSALS if processes == 1 else {}))]
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
            assert done.returncode == 0, done.stderr[-6000:]
        return made[processes]

    return get


@pytest.mark.parametrize(("processes", "name"), [(n, name) for n, cases in CASES.items() for name in cases])
def test_the_steps_are_those_of_the_core(processes: int, name: str, folder, out) -> None:
    import verl_runs

    settings = CASES[processes][name]
    rows = verl_runs.rollout(tuple(settings["groups"]))
    parts = np.array_split(np.arange(len(rows)), processes)
    size, steps = settings["mini"] // processes, []
    for _ in range(settings["epochs"]):
        for start in range(0, len(parts[0]), size):
            steps.append([rows[i] for part in parts for i in part[start : start + size]])
    if name == "groups on both":
        assert {row["uid"] for row in rows[:8]} & {row["uid"] for row in rows[8:]}
    begin, end = (np.load(out(processes) / f"{name} {when}.npz") for when in ("start", "end"))
    wanted = verl_runs.reference(folder, steps, lora=settings.get("lora", 0), start=begin)
    assert all("lora_" in n for n in wanted) == ("lora" in settings)
    norm = lambda of: sum(float((x**2).sum()) for x in of) ** 0.5
    moved = norm(wanted[n] - begin[n] for n in wanted)
    apart = norm(wanted[n] - end[n] for n in wanted)
    assert moved > 1e-3 * norm(wanted.values())
    assert apart < 1e-5 * norm(wanted.values())
    assert apart < 2e-4 * moved, f"apart by {apart / moved:.1e} of the way"
    metrics = json.loads((out(processes) / f"{name}.json").read_text())
    assert len(metrics["gvpo/loss"]) == len(steps)
    for i, loss in enumerate(metrics["gvpo/loss"]):
        variances = metrics["gvpo/implicit_variance"][i] + metrics["gvpo/reward_variance"][i]
        assert loss == pytest.approx(variances - 2 * metrics["gvpo/covariance"][i])
    assert abs(metrics["gvpo/kl"][0]) < 1e-6, "the first step is of the policy that is the reference"
    assert abs(metrics["gvpo/kl"][-1]) > 1e-3 or len(steps) == 1


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_whose_step_would_score_otherwise_is_refused_by_name(name: str, out) -> None:
    found = json.loads((out(1) / f"{name}.json").read_text())
    assert REFUSED[name][1] in found["message"]
    assert found["same"], "no step was taken"


def test_the_reward_rises(out) -> None:
    reward = json.loads((out(1) / "learned.json").read_text())
    assert sum(reward[:2]) / 2 < 0.6
    assert sum(reward[-2:]) / 2 > 0.85
