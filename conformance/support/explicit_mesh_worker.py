"""Calls gvpo_core on a mesh of four devices as jax.make_mesh makes it by default; prints the results as JSON.

Usage: explicit_mesh_worker.py INPUTS: a JSON file of logprobs, ref_logprobs, rewards, group_ids and valid.
"""

import json
import os
import sys
from pathlib import Path

FLAGS = os.environ.get("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ["XLA_FLAGS"] = f"{FLAGS} --xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import gvpo_core

GROUPS = 4
ROWS = ("logprobs", "ref_logprobs", "rewards", "group_ids")


def coefficients(name, lp, ref, rewards, ids):
    lengths = {"lengths": ids + 1} if name == "gspo" else {}
    return gvpo_core.objective_coefficients(name, lp, ref, lp, rewards, ids, beta=0.5, num_groups=GROUPS, **lengths)


def functions(valid):
    options = {"beta": 0.5, "num_groups": GROUPS, "valid": valid}
    found = {
        "loss": lambda lp, *rest: gvpo_core.gvpo_loss(lp, *rest, **options).loss,
        "gradient": jax.grad(lambda lp, *rest: gvpo_core.gvpo_loss(lp, *rest, **options).loss),
        "surrogate_gradient": jax.grad(lambda lp, *rest: gvpo_core.gvpo_surrogate(lp, *rest, **options)),
        "weights": lambda *rows: gvpo_core.gvpo_weights(*rows, **options),
        "coefficients": lambda *rows: gvpo_core.gvpo_coefficients(*rows, **options),
        "regret": lambda *rows: gvpo_core.gvpo_regret(*rows, **options).series,
    }
    for name in ("grpo", "rloo", "mirror_descent", "a_star_po", "gspo", "reject_sampling", "sft", "dpo"):
        found[name] = lambda *rows, name=name: coefficients(name, *rows)
    return found


def main():
    inputs, names = (json.loads(Path(path).read_text()) for path in sys.argv[1:])
    mesh = jax.make_mesh((4,), ("data",))
    assert mesh.axis_types == (AxisType.Explicit,) and len(jax.devices()) == 4
    dtypes = {"group_ids": jnp.int32, "valid": bool}
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    plain = {name: jnp.asarray(v, dtypes.get(name, jnp.float32)) for name, v in inputs.items()}
    sharded = {name: jax.device_put(a, sharding) for name, a in plain.items()}
    results = {}
    for where, arrays in {"plain": plain, "alone": sharded, "set": sharded}.items():
        rows = [arrays[name] for name in ROWS]
        for name, function in functions(arrays["valid"]).items():
            if name not in names:
                continue
            for how, called in {"eager": function, "jit": jax.jit(function)}.items():
                if where == "plain" and how == "jit":
                    continue  # nothing is compared with it
                if where == "alone" and (how == "jit" or "gradient" in name):
                    continue  # JAX itself refuses jnp.zeros_like there: "enter your jit into a mesh context"
                if where == "set":
                    with jax.set_mesh(mesh):
                        found = called(*rows)
                else:
                    found = called(*rows)
                results[f"{name}-{where}-{how}"] = jnp.asarray(found).tolist()
    results |= {f"{name}-refused": refused(name, sharded, plain) for name in ("ref_logprobs", "rewards", "valid")}
    results["any-group-ids"] = gvpo_core.gvpo_weights(
        *(sharded[name] for name in ROWS[:3]), plain["group_ids"], beta=0.5, num_groups=GROUPS, valid=sharded["valid"]
    ).tolist()
    print(json.dumps(results))


def refused(name, sharded, plain):
    """What is said where this argument lies on every device, and the others are split."""
    arrays = sharded | {name: plain[name]}
    try:
        gvpo_core.gvpo_loss(*(arrays[n] for n in ROWS), beta=0.5, num_groups=GROUPS, valid=arrays["valid"])
    except ValueError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    main()
