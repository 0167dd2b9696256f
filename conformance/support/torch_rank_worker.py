"""One of several processes that train the same tiny policy; started by test_torch_ranks.py with torchrun's variables.

python torch_rank_worker.py FOLDER OUT SETTINGS_AS_JSON
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from batches import batch, coefficients_of, masked
from torch_policies import policy

from gvpo_core.training.sampling import Sampling, row_seed

OF = masked(batch((4, 3, 2, 5)))  # context tokens in most responses
CUT = 5  # rows 0..4 on rank 0: three groups lie on both ranks
PROMPTS = [(5, 6, 7), tuple(range(20, 32)), (9,)]
SEEDS = [[row_seed(1, i, j) for j in range(size)] for i, size in enumerate((3, 1, 2))]


def whole_parameters(of_policy) -> dict[str, np.ndarray]:
    from gvpo_torch.update import full_tensor

    return {name: full_tensor(p.detach()).cpu().double().numpy().copy() for name, p in of_policy._named.items()}


def assert_is_what_runs(of_policy, sharding: str) -> None:
    """The trained module is FSDP2's or DDP's, and under FSDP2 every parameter is sharded over the ranks."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    of = of_policy._trained
    assert isinstance(of, torch.nn.parallel.DistributedDataParallel) == (sharding == "data_parallel")
    assert isinstance(of, FSDPModule) == (sharding == "fsdp")
    if sharding == "fsdp":
        modules = [of, of_policy._reference.model] if of_policy._reference.model is not None else [of]
        for p in [p for module in modules for p in module.parameters()]:
            assert isinstance(p, DTensor) and p.placements[0].is_shard()
            assert p.to_local().numel() <= -(-p.shape[0] // of_policy.world_size) * max(1, p[0].numel())
        held = [p for group in of_policy._optimizer.param_groups for p in group["params"]]
        assert held and all(isinstance(p, DTensor) for p in held), "the optimizer steps other tensors"


def reads_in_parts() -> list[int]:
    """Gets a number for each model that is read in parts from now on: of its parameters."""
    from gvpo_torch import sharding

    fill, numbers = sharding.fill, []

    def counting(module, unread, device):
        if unread:
            numbers.append(len(unread))
        fill(module, unread, device)

    sharding.fill = counting
    return numbers


def counted(call) -> tuple[object, dict[str, int]]:
    """What `call` returns, and how often each collective ran in it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    counts: dict[str, int] = {}

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), options=None):
            if "c10d" in operation.namespace:
                counts[str(operation)] = counts.get(str(operation), 0) + 1
            return operation(*args, **(options or {}))

    with Counter():
        result = call()
    return result, counts


def step(of_policy, rows: list[list[int]]) -> dict[str, object]:
    """One update in which each rank holds its own rows of OF."""
    mine, order = rows[of_policy.rank], [i for part in rows for i in part]
    before = sum(len(part) for part in rows[: of_policy.rank])
    calls = []

    def coefficients(logprobs, chosen):
        calls.append(len(chosen))
        everything = of_policy.gather(np.asarray(logprobs))
        assert len(everything) == len(OF)
        factors = coefficients_of(OF)(everything[np.argsort(order)], np.arange(len(OF)))[order]
        return factors[before : before + len(mine)]

    update = of_policy.update(OF.take(mine), coefficients)
    assert calls == [len(mine)]
    return {"norm": update.gradient_norm, "logprobs": of_policy.gather(update.logprobs)[np.argsort(order)]}


def main() -> None:
    folder, out, settings = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    read_in_parts = reads_in_parts()
    of_policy = policy(folder, reference=True, **settings)
    rank, size = of_policy.rank, of_policy.world_size
    if size > 1:
        assert_is_what_runs(of_policy, settings["sharding"])
        models = 0 if settings["sharding"] == "data_parallel" else 1 if of_policy._reference.model is None else 2
        assert len(read_in_parts) == models, "a sharded model was read whole"
    n = len(OF)
    cuts = {1: [], 2: [CUT], 4: [1, CUT, 8]}[size]  # groups of 4, 3, 2 and 5 rows lie on several ranks
    straddling = [part.tolist() for part in np.split(np.arange(n), cuts)]
    one_idle = [list(range(n)), [], [], []][:size]
    found: dict[str, object] = {}
    np.testing.assert_array_equal(
        of_policy.gather(np.arange(3 * rank, dtype=np.int64)), np.concatenate([np.arange(3 * r) for r in range(size)])
    )
    made = []
    for number, rows in enumerate((straddling, one_idle)):
        for name, value in step(of_policy, rows).items():
            found[f"{name}{number}"] = value
        made.append(whole_parameters(of_policy))
    mine = one_idle[rank]  # scoring and sampling where one rank has nothing
    for reference in (False, True):
        found[f"scored{reference}"] = of_policy.gather(of_policy.logprobs(OF.take(mine), reference=reference))
    prompts = PROMPTS if rank == 0 else []
    seeds = SEEDS if prompts else []
    of_policy.generate(prompts, seeds, Sampling(1))  # before it a last scoring pass has left some parameters gathered
    responses, collectives = counted(lambda: of_policy.generate(prompts, seeds, Sampling(8)))
    fewer = counted(lambda: of_policy.generate(prompts, seeds, Sampling(2)))[1]
    assert fewer == collectives, f"a collective a token: {fewer} for 2 tokens, {collectives} for 8"
    one, two = made
    (out / "checkpoint").mkdir(exist_ok=True)
    of_policy.save(out / "checkpoint")
    of_policy.export(out / "export")
    found["norm2"] = step(of_policy, straddling)["norm"]
    three = whole_parameters(of_policy)
    if size > 1:
        torch.distributed.barrier()
    of_policy.logprobs(OF.take(mine))  # leaves parameters gathered, of the state that is left now
    of_policy.restore(out / "checkpoint")
    restored = whole_parameters(of_policy)
    scored = of_policy.gather(of_policy.logprobs(OF.take(mine)))
    np.testing.assert_array_equal(scored, found["scoredFalse"], "scored with parameters of before the restore")
    step(of_policy, straddling)
    again = whole_parameters(of_policy)
    for name in two:
        np.testing.assert_array_equal(restored[name], two[name])
        np.testing.assert_array_equal(again[name], three[name])
    of_policy.renew_reference()  # after it, scored as the policy is, also once the policy has moved on
    mine_now = of_policy.logprobs(OF.take(mine))
    found["renewed"] = of_policy.gather(mine_now)
    step(of_policy, straddling)
    (out / "renewed").mkdir(exist_ok=True)
    of_policy.save(out / "renewed")
    step(of_policy, straddling)
    of_policy.restore(out / "renewed")
    reference = of_policy.logprobs(OF.take(mine), reference=True)
    np.testing.assert_allclose(reference, mine_now, rtol=0, atol=1e-5 if settings.get("dtype") != "bfloat16" else 0.05)
    assert np.abs(of_policy.gather(of_policy.logprobs(OF.take(mine))) - found["renewed"]).max() > 1e-2
    if rank == 0:
        np.savez(out / "one.npz", **one)
        np.savez(out / "two.npz", **two)
        np.savez(out / "three.npz", **three)
        np.savez(out / "found.npz", **found)
        tokens = [[list(r.tokens) for r in row] for row in responses]
        facts = {"tokens": tokens, "collectives": collectives, **of_policy.describe().as_dict()}
        (out / "facts.json").write_text(json.dumps(facts))
    if size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
