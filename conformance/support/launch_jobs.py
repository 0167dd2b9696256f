"""A small run that launchers start, and what it must end with."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tiny_models

from gvpo_core.training import cli


def write_job(folder: Path) -> Path:
    """A folder with config.toml, data, a reward and a tiny model."""
    tiny_models.write_model("llama", folder / "model")
    (folder / "data.jsonl").write_text("".join(json.dumps({"prompt": f"say {c}:"}) + "\n" for c in "abcd"))
    (folder / "reward.py").write_text(
        "def reward(completions):\n    return [c.count('a') - len(c) for c in completions]\n"
    )
    (folder / "config.toml").write_text(
        '[run]\nfolder = "run"\nsteps = 3\ncheckpoint_every = 1\nbackend = "torch"\n'
        '[model]\npath = "model"\ndevice = "cpu"\n[data]\ntrain = "data.jsonl"\n'
        "[rollout]\nprompts = 3\nresponses = 3\nmax_tokens = 5\n[optimizer]\nlearning_rate = 1e-3\n"
        '[rewards.a]\nfunction = "reward.py:reward"\n'
    )
    return folder


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | more


def parameters(job: Path, run: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Of an export of the newest checkpoint."""
    from safetensors.numpy import load_file

    monkeypatch.chdir(job)
    assert cli.main(["export", run, f"{run}-export"]) == 0
    return load_file(job / f"{run}-export" / "model.safetensors")


def assert_two_ranks_took_the_steps_of_one(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job's run had two ranks, and ended where a run of one process ends."""
    described = json.loads((job / "run" / "environment.json").read_text())
    assert described["policy"]["ranks"] == 2, "the launcher started two runs of one process"
    monkeypatch.chdir(job)
    assert cli.main(["train", "config.toml", "--run.folder", "alone"]) == 0
    alone, found = (parameters(job, run, monkeypatch) for run in ("alone", "run"))
    assert alone.keys() == found.keys()
    for name, value in alone.items():
        np.testing.assert_allclose(found[name], value, atol=2e-5, err_msg=name)
