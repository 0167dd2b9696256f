"""One of several processes that hold whole groups and ask for coefficients by group; see test_torch_groups.py.

python torch_group_worker.py FOLDER OUT
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import SMOOTH, batch, coefficients_of, masked
from torch_policies import policy

from gvpo_core.training.policy import Batch

OF = masked(batch((4, 3, 2, 5, 3)))
OWNERS = {7: 0, 8: 1, 9: 1, 10: 0, 11: 0}  # of each group; a third rank has none
SETTINGS = {**SMOOTH, "micro_batch_tokens": 40}  # two groups fit in a micro-batch, one takes so many that it is scored
KINDS = {"full": {}, "lora": {"lora_rank": 2, "learning_rate": 3.0}, "checkpointing": {"gradient_checkpointing": True}}
SHARDING = ("data_parallel", "fsdp")


def whole_parameters(of_policy) -> dict[str, np.ndarray]:
    from gvpo_torch.update import full_tensor

    return {name: full_tensor(p.detach()).double().numpy().copy() for name, p in of_policy._named.items()}


def rows_of(rank: int) -> list[int]:
    return [i for i, label in enumerate(OF.groups) if OWNERS[label] == rank]


def step(of_policy, *, spoiled: int | None = None) -> dict[str, object]:
    """One update; `spoiled`: a rank whose coefficients are not finite."""
    mine, calls = np.asarray(rows_of(of_policy.rank), np.int64), []

    def coefficients(logprobs, part):
        calls.append(len(part))
        found = coefficients_of(OF)(np.asarray(logprobs), mine[part])
        return found * (np.nan if spoiled == of_policy.rank else 1.0)

    before = whole_parameters(of_policy)
    held: Batch = dataclasses.replace(OF.take(mine.tolist()), complete=True)
    update = of_policy.update(held, coefficients)
    assert sum(calls) == len(mine) and (of_policy.rank != 0 or len(calls) > 1), "not asked for by group"
    after = whole_parameters(of_policy)
    logprobs = np.zeros(len(OF))
    order = [i for rank in range(of_policy.world_size) for i in rows_of(rank)]
    logprobs[order] = of_policy.gather(update.logprobs)
    moved = {f"moved {name}": after[name] - before[name] for name in after}
    return {"norm": update.gradient_norm, "logprobs": logprobs, **moved}


def main(folder: Path, out: Path) -> None:
    for kind, settings in KINDS.items():
        for sharding in SHARDING:
            of_policy = policy(folder, sharding=sharding, **(SETTINGS | settings))
            assert of_policy._sharded == (sharding == "fsdp")
            assert of_policy.defers == (sharding != "fsdp" or kind == "checkpointing")
            kept = whole_parameters(of_policy)
            with pytest.raises(FloatingPointError, match="coefficients of"):
                step(of_policy, spoiled=1)
            for name, value in whole_parameters(of_policy).items():
                np.testing.assert_array_equal(value, kept[name])
            found = step(of_policy)
            if of_policy.rank == 0:
                np.savez(out / f"{kind} {sharding}.npz", **found)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
