"""The core on JAX arrays that lie on a mesh with Explicit axes, the default of jax.make_mesh."""

import json
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
from places import SUPPORT
from required import require

require("jax", subject="jax")

from gvpo_core import gvpo_loss, gvpo_weights

RESULTS = ("loss", "gradient", "weights")
OTHERS = ("surrogate_gradient", "coefficients", "regret")
OTHERS += ("grpo", "rloo", "mirror_descent", "a_star_po", "gspo", "reject_sampling", "sft", "dpo")


@pytest.fixture(scope="module")
def inputs():
    draw = np.random.default_rng(0)
    rows = {name: draw.normal(size=16).astype(np.float32) for name in ("logprobs", "ref_logprobs", "rewards")}
    ids = draw.permutation(np.repeat(np.arange(4), 4))
    return rows | {"group_ids": ids, "valid": np.arange(16) != 5}


@pytest.fixture(scope="module")
def results_of(inputs, tmp_path_factory):
    """Names -> results of these functions, computed in a process with four devices."""
    folder = tmp_path_factory.mktemp("mesh")
    (folder / "inputs.json").write_text(json.dumps({name: a.tolist() for name, a in inputs.items()}))

    @cache
    def get(names: tuple[str, ...]):
        (folder / "names.json").write_text(json.dumps(names))
        worker = [SUPPORT / "explicit_mesh_worker.py", folder / "inputs.json", folder / "names.json"]
        done = subprocess.run([sys.executable, *map(str, worker)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    return get


@pytest.fixture
def results(results_of):
    return results_of(RESULTS)


@pytest.mark.parametrize("name", [*RESULTS, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_results_are_those_without_a_mesh(name, results_of) -> None:
    results = results_of(RESULTS if name in RESULTS else OTHERS)
    for where in ("alone-eager", "set-eager", "set-jit") if "gradient" not in name else ("set-eager", "set-jit"):
        found, wanted = results[f"{name}-{where}"], results[f"{name}-plain-eager"]
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6, err_msg=where)


def test_values_are_those_of_float64_numpy(inputs, results) -> None:
    wide = {n: a.astype(np.float64) if a.dtype == np.float32 else a for n, a in inputs.items()}
    rows = [wide[name] for name in ("logprobs", "ref_logprobs", "rewards", "group_ids")]
    options = {"beta": 0.5, "valid": wide["valid"]}
    np.testing.assert_allclose(results["loss-set-jit"], gvpo_loss(*rows, **options).loss, rtol=1e-5)
    np.testing.assert_allclose(results["weights-set-jit"], gvpo_weights(*rows, **options), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["ref_logprobs", "rewards", "valid"])
def test_an_argument_that_is_sharded_otherwise_is_refused_by_name(name, results) -> None:
    """Rewards come from the host and log-probs from the mesh: JAX's own error names a `select`."""
    assert results[f"{name}-refused"] == (
        f"{name} is sharded as P(), and logprobs as P('data',); expected the same on a mesh with Explicit axes:"
        f" jax.sharding.reshard({name}, jax.typeof(logprobs).sharding)"
    )
    np.testing.assert_allclose(results["any-group-ids"], results["weights-plain-eager"], rtol=1e-5, atol=1e-6)
