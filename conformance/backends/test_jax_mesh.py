"""8 simulated devices, and two processes, take the step of one device; what the mesh refuses."""

import json
import os
from pathlib import Path

import forks
import jax_processes
import numpy as np
import pytest
import tiny_models
from batches import step_difference
from jax_policies import policy
from places import SUPPORT
from required import require

require(subject="jax")

from gvpo_core.training.config import ConfigError

SMOOTH = {"learning_rate": 0.02, "betas": [0.0, 0.0], "eps": 1.0, "micro_batch_responses": 5, "strategy": "score"}
LORA = {"lora_rank": 2, "learning_rate": 0.2}
MESHES = {
    "fsdp": {"mesh_fsdp": 8},
    "all": {"mesh_fsdp": 2, "mesh_tensor": 2},
    "all-lora": {"mesh_fsdp": 2, "mesh_tensor": 2, **LORA},
}


def run(folder: Path, out: Path, runs: dict[str, dict[str, object]], *, processes: int, devices: int) -> None:
    """Trains with each of the settings over simulated devices of one or several processes, which write into `out`."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
    environments = jax_processes.environments(processes) if processes > 1 else [{}]
    made = [json.dumps({"name": name, **SMOOTH, **settings}) for name, settings in runs.items()]
    logs = [out / f"rank{rank}.log" for rank in range(processes)]
    statuses = forks.run_together(
        forks.run_script,
        (str(SUPPORT / "jax_mesh_worker.py"), str(folder), str(out), *made),
        logs,
        [environment | {"XLA_FLAGS": flags, "OMP_NUM_THREADS": "1"} for environment in environments],
        preload=jax_processes.PRELOAD,
        seconds=1800,
    )
    assert statuses == [0] * processes, "\n".join(log.read_text()[-5000:] for log in logs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_models.write_model("llama3", tmp_path_factory.mktemp("llama"), attention_bias=True)


@pytest.fixture(scope="module")
def out(folder, tmp_path_factory) -> Path:
    """Every mesh over 8 simulated devices, and one of them alone."""
    out = tmp_path_factory.mktemp("out")
    runs = {"one": {"device": "cpu:0"}, "one-lora": {"device": "cpu:0", **LORA}}
    runs |= {name: {"device": "cpu", **settings} for name, settings in MESHES.items()}
    run(folder, out, runs, processes=1, devices=8)
    return out


def compare(one: Path, other: Path) -> None:
    alone, many = (dict(np.load(path)) for path in (one, other))
    assert alone.keys() == many.keys()
    for number in "01":  # parameters after each step
        sets = [
            {k: v.astype(np.float64) for k, v in a.items() if k.startswith(f"after{number}/")} for a in (alone, many)
        ]
        assert step_difference(*sets) < 1e-5
        assert many[f"norm{number}"] == pytest.approx(alone[f"norm{number}"], rel=1e-5)
    for name in ("logprobs0", "logprobs1", "scoredFalse", "scoredTrue"):
        np.testing.assert_allclose(many[name], alone[name], rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_takes_the_step_of_one_device(name: str, out: Path) -> None:
    alone = "one-lora" if "lora" in name else "one"
    compare(out / f"{alone}.npz", out / f"{name}.npz")
    one, many = (json.loads((out / f"{n}.json").read_text()) for n in (alone, name))
    assert one["devices"] == 1 and many["devices"] == 8
    assert many["tokens"] == one["tokens"]
    matrix = "model.layers.*.mlp.up_proj.weight"
    parts = {"fsdp": 8, "all": 4, "all-lora": 4}[name]
    assert many["shares"][matrix] == pytest.approx(1 / parts)
    assert many["largest_read"] * parts == one["largest_read"]  # the host makes a device's part, never the whole


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one", *MESHES])
def test_the_estimate_of_memory_knows_the_mesh(name: str, out: Path) -> None:
    """Matrices are cut over fsdp and tensor; adapters of rank 2 here are not cut into as many parts."""
    found = json.loads((out / f"{name}.json").read_text())["memory"]
    for what in ("parameters",) if "lora" in name else found:
        estimated, held = found[what]
        assert estimated == pytest.approx(held, rel=0.25), what


@pytest.mark.slow
def test_the_export_of_a_mesh_is_whole(out: Path) -> None:
    of_policy = policy(out / "all-export")
    scored = np.load(out / "one.npz")["scoredFalse"]
    from jax_mesh_worker import OF

    np.testing.assert_allclose(of_policy.logprobs(OF), scored, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(folder, out, tmp_path) -> None:
    run(folder, tmp_path, {"two": {"device": "cpu", "mesh_fsdp": 2}}, processes=2, devices=2)
    compare(out / "one.npz", tmp_path / "two.npz")
    facts = json.loads((tmp_path / "two.json").read_text())
    assert facts["ranks"] == 2 and facts["devices"] == 4
    one = json.loads((out / "one.json").read_text())
    assert facts["tokens"] == one["tokens"]
    # A checkpoint does not depend on the number of processes or devices: one device resumes from theirs.
    of_policy = policy(folder, **SMOOTH)
    of_policy.restore(tmp_path / "two-checkpoint")
    alone = np.load(out / "one.npz")
    for name, value in of_policy.learner.trained.items():
        wanted = alone[f"after1/{name}"]
        np.testing.assert_allclose(np.asarray(value), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_what_a_mesh_refuses(folder) -> None:
    with pytest.raises(ConfigError, match=r"mesh_fsdp 3 x model.mesh_tensor 1 does not divide the 1 cpu devices"):
        policy(folder, mesh_fsdp=3)
    with pytest.raises(ConfigError, match=r"model.device is 'tpu', which JAX does not have here"):
        policy(folder, device="tpu")
    with pytest.raises(ConfigError, match=r"model.device is 'cpu:9'"):
        policy(folder, device="cpu:9")
