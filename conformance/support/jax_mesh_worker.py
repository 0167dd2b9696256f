"""Trains the same tiny policy over meshes of 8 simulated devices, or as one of several processes, and writes what came
of it; started by test_jax_mesh.py, since the number of devices is fixed when JAX starts.

python jax_mesh_worker.py FOLDER OUT SETTINGS_AS_JSON...    each settings: {"name": ..., a config field: value, ...}
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from batches import batch, coefficients_of, masked
from jax_policies import policy

from gvpo_core.training.config import Config
from gvpo_core.training.policy.memory import estimate_memory
from gvpo_core.training.sampling import Sampling, row_seed

OF = masked(batch((4, 3, 2, 5)))  # context tokens in most responses
CUT = 5  # rows 0..4 on the first process: three groups lie on both
PROMPTS = [(5, 6, 7), tuple(range(20, 32)), (9,)]
SEEDS = [[row_seed(1, i, j) for j in range(size)] for i, size in enumerate((3, 1, 2))]


def whole(of_policy) -> dict[str, np.ndarray]:
    from gvpo_jax import mesh

    everywhere = mesh.replicated(of_policy.mesh)
    return {
        n: np.asarray(jax.device_put(a, everywhere).addressable_data(0)) for n, a in of_policy.learner.trained.items()
    }


def step(of_policy, rows: list[list[int]]) -> dict[str, np.ndarray]:
    """One update in which each process holds its own rows of OF."""
    mine, order = rows[of_policy.rank], [i for part in rows for i in part]
    before = sum(len(part) for part in rows[: of_policy.rank])

    def coefficients(logprobs, chosen):
        if of_policy.world_size == 1:
            return coefficients_of(OF)(logprobs, chosen)
        everything = of_policy.gather(np.asarray(logprobs))
        factors = coefficients_of(OF)(everything[np.argsort(order)], np.arange(len(OF)))[order]
        return factors[before : before + len(mine)]

    done = of_policy.update(OF.take(mine), coefficients)
    return {"norm": np.asarray(done.gradient_norm), "logprobs": of_policy.gather(done.logprobs)[np.argsort(order)]}


@contextlib.contextmanager
def counted_reads() -> Iterator[list[int]]:
    """Bytes of each part that is made on the host for a device."""
    sizes, plain = [], jax.make_array_from_callback

    def counted(shape, sharding, part):
        def noted(index):
            made = part(index)
            sizes.append(made.nbytes)
            return made

        return plain(shape, sharding, noted)

    jax.make_array_from_callback = counted
    try:
        yield sizes
    finally:
        jax.make_array_from_callback = plain


def memory(of_policy) -> dict[str, tuple[int, int]]:
    """Of this process's devices: bytes estimated, and those of their parts."""
    held = lambda tree: sum(s.data.nbytes for a in jax.tree.leaves(tree) for s in a.addressable_shards)
    config = Config(model=of_policy.config, optimizer=of_policy.optimizer_config)
    estimated = estimate_memory(of_policy.describe(), config, 8)
    learner = of_policy.learner
    return {
        "parameters": (estimated.parameters, held((learner.parameters, learner.adapters))),
        "optimizer": (estimated.optimizer, held((learner._state.mu, learner._state.nu))),
        "reference": (estimated.reference, held(of_policy._reference) if not of_policy.config.lora_rank else 0),
    }


def train(folder: Path, out: Path, name: str, settings: dict[str, object]) -> None:
    with counted_reads() as sizes:
        of_policy = policy(folder, reference=True, **settings)
    rank, size, n = of_policy.rank, of_policy.world_size, len(OF)
    halves = [list(range(CUT)), list(range(CUT, n))] if size == 2 else [list(range(n))]
    one_idle = [list(range(n)), []][:size]
    counts = of_policy.gather(np.arange(3 * rank, dtype=np.float64) + 1e-12)
    np.testing.assert_array_equal(counts, np.concatenate([np.arange(3 * r) for r in range(size)]) + 1e-12)
    found: dict[str, np.ndarray] = {}
    for number, rows in enumerate((halves, one_idle)):
        found |= {f"{key}{number}": value for key, value in step(of_policy, rows).items()}
        found |= {f"after{number}/{key}": value for key, value in whole(of_policy).items()}
    mine = one_idle[rank]
    for reference in (False, True):
        found[f"scored{reference}"] = of_policy.gather(of_policy.logprobs(OF.take(mine), reference=reference))
    prompts = (PROMPTS, [])[rank]
    responses = of_policy.generate(prompts, SEEDS if prompts else [], Sampling(8))
    for place in ("checkpoint", "export"):
        (out / f"{name}-{place}").mkdir(exist_ok=True)
    of_policy.save(out / f"{name}-checkpoint")
    of_policy.export(out / f"{name}-export")
    step(of_policy, halves)
    third = whole(of_policy)
    of_policy.restore(out / f"{name}-checkpoint")
    for key, value in whole(of_policy).items():
        np.testing.assert_array_equal(value, found[f"after1/{key}"])
    step(of_policy, halves)
    for key, value in whole(of_policy).items():
        np.testing.assert_array_equal(value, third[key])
    of_policy.renew_reference()  # after it, scored as the policy is, also once the policy has moved on
    then = of_policy.logprobs(OF.take(mine))
    step(of_policy, halves)
    (out / f"{name}-renewed").mkdir(exist_ok=True)
    of_policy.save(out / f"{name}-renewed")
    step(of_policy, halves)
    of_policy.restore(out / f"{name}-renewed")
    np.testing.assert_allclose(of_policy.logprobs(OF.take(mine), reference=True), then, rtol=0, atol=1e-5)
    if rank == 0:
        np.savez(out / f"{name}.npz", **found)
        tokens = [[list(r.tokens) for r in row] for row in responses]
        shares = {n: a.addressable_shards[0].data.size / a.size for n, a in of_policy.learner.parameters.items()}
        facts = {"tokens": tokens, "shares": shares, "largest_read": max(sizes), **of_policy.describe().as_dict()}
        facts |= {"memory": memory(of_policy)}
        (out / f"{name}.json").write_text(json.dumps(facts))


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    for text in sys.argv[3:]:
        settings = json.loads(text)
        train(folder, out, settings.pop("name"), settings)


if __name__ == "__main__":
    main()
