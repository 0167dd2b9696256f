"""One of several processes that train and sample by blocks and in fixed buffers, as on CUDA; see test_torch_sharded.py.

python torch_sharded_worker.py FOLDER OUT RUNS       runs: a list of [name of KINDS, "fast" or "dense"], as JSON
"""

import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import block_kernel
import numpy as np
import pytest
import torch
from batches import SMOOTH, batch, coefficients_of, masked
from gvpo_torch import blocks, check, decode_attention, fixed, model
from gvpo_torch.sharding import gathered
from torch_policies import policy
from torch_rank_worker import counted, whole_parameters

from gvpo_core.training.policy import Batch
from gvpo_core.training.sampling import Sampling, row_seed

OF = masked(batch((3, 2, 4), longest=300))  # packed rows of several blocks
LABELS = sorted(set(OF.groups))
SETTINGS = {**SMOOTH, "learning_rate": 2e-3, "micro_batch_tokens": 700, "sharding": "fsdp"}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora_rank": 2, "learning_rate": 0.02},
    "checkpointing": {"gradient_checkpointing": True},
    "lora checkpointing": {"lora_rank": 2, "learning_rate": 0.02, "gradient_checkpointing": True},
    "bfloat16": {"dtype": "bfloat16"},
}
PROMPTS = [(5, 6, 7), tuple(range(20, 32)), (9,), (40, 41)]
SEEDS = [[row_seed(1, i, j) for j in range(size)] for i, size in enumerate((5, 4, 6, 3))]
TOKENS = 40
ROWS = 3  # that the cache holds at once


@contextmanager
def as_on_cuda() -> Iterator[pytest.MonkeyPatch]:
    """Blocks and fixed buffers are tried at load, and the attention kernel has gradients."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "FAST", ("cpu",))
        patch.setattr(blocks, "WITHOUT_GRADIENT", ())
        patch.setattr(blocks, "flex_attention", block_kernel.flex_attention)
        yield patch


def assert_sharded(of_policy) -> None:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    sharded = of_policy.world_size > 1
    if sharded:
        with gathered(of_policy.scorer):
            held = sum(p.nbytes for p in of_policy.scorer.parameters())
        estimated = of_policy.describe().memory.sampled  # with 16 bits the gathered copy may be smaller
        assert held <= estimated if of_policy.scorer.dtype != torch.float32 else held == estimated
    assert isinstance(of_policy._trained, FSDPModule) == sharded
    assert all(isinstance(p, DTensor) == sharded for p in of_policy._trained.parameters())


def step(of_policy, groups: list[list[int]], in_blocks: bool) -> dict[str, np.ndarray]:
    """One update, in which rank r holds the groups `groups[r]` (indices of LABELS)."""
    rank = of_policy.rank
    rows_of = [[i for i, label in enumerate(OF.groups) if label in {LABELS[g] for g in held}] for held in groups]
    mine = np.asarray(rows_of[rank], np.int64)
    held: Batch = dataclasses.replace(OF.take(mine.tolist()), complete=True)
    before, calls = whole_parameters(of_policy), len(block_kernel.calls)
    update = of_policy.update(held, lambda logprobs, part: coefficients_of(OF)(np.asarray(logprobs), mine[part]))
    assert (len(block_kernel.calls) > calls) == (in_blocks and len(mine) > 0), "blocks did not run, or on an idle rank"
    after, order = whole_parameters(of_policy), [i for rows in rows_of for i in rows]
    logprobs = np.zeros(len(OF))
    logprobs[order] = of_policy.gather(update.logprobs)
    moved = {f"moved {name}": after[name] - before[name] for name in after}
    return {"norm": np.asarray(update.gradient_norm), "logprobs": logprobs, **moved}


def sample(of_policy, patch) -> tuple[list[list[list[int]]], dict[str, int], int, float]:
    """Returns tokens, collectives, how often rows were placed, and rows computed / tokens sampled, on this rank."""
    rank, size = of_policy.rank, of_policy.world_size
    prompts, seeds = PROMPTS[rank::size], SEEDS[rank::size]
    placed, computed = [], []
    place, logits = fixed.FixedRows.place, fixed.FixedRows.logits
    patch.setattr(fixed.FixedRows, "place", lambda rows, *given: placed.append(1) or place(rows, *given))
    patch.setattr(fixed.FixedRows, "logits", lambda rows: computed.append(len(rows.tokens)) or logits(rows))
    patch.setattr(of_policy, "_cache_tokens", lambda: ROWS * (12 + TOKENS))
    of_policy.generate(prompts, seeds, Sampling(1))  # before it a last scoring pass has left some parameters gathered
    placed.clear()
    computed.clear()
    drawn, collectives = counted(lambda: of_policy.generate(prompts, seeds, Sampling(TOKENS)))
    tokens = [[list(r.tokens) for r in row] for row in drawn]
    times, ratio = len(placed), sum(computed) / sum(len(r) for row in tokens for r in row)
    one_idle = lambda: of_policy.generate(prompts if rank else [], seeds if rank else [], Sampling(TOKENS))
    assert counted(one_idle)[1] == collectives, "a rank without prompts has other collectives"
    return tokens, collectives, times, ratio


def run(folder: Path, out: Path, kind: str, how: str) -> None:
    with as_on_cuda() as patch:
        if how == "dense":
            patch.setattr(check, "FAST", ())
        of_policy = policy(folder, **(SETTINGS | KINDS[kind]))
        assert_sharded(of_policy)
        fast = how != "dense"
        assert of_policy.packed and of_policy.scorer.in_blocks == fast and of_policy.scorer.decodes_fixed == fast
        assert (of_policy._splitting.hidden_size == 0) == fast
        if fast:
            patch.setattr(model, "_attention", None)  # no dense mask
        size = of_policy.world_size
        found: dict[str, Any] = {}
        for number, groups in enumerate(([[0, 2], [1]], [[0, 1, 2], []])):
            together = [[g for part in groups for g in part]]
            done = step(of_policy, groups if size > 1 else together, fast)
            found |= {f"{name} {number}": value for name, value in done.items()}
        scored = of_policy.logprobs(OF.take(list(range(len(OF))) if of_policy.rank == 0 else []))
        found["scored"] = of_policy.gather(scored)
        tokens, collectives, placed, ratio = sample(of_policy, patch)
        (out / f"{kind} {how} {of_policy.rank}.json").write_text(json.dumps([tokens, collectives, placed, ratio]))
        if of_policy.rank == 0:
            np.savez(out / f"{kind} {how}.npz", **found)


def refused_by_one(folder: Path) -> None:
    """What fails on one rank is used on none; no rank waits for another meanwhile."""
    rank = torch.distributed.get_rank()

    def fails(*given: Any, **options: Any) -> Any:
        raise RuntimeError("no kernel for this device")

    for fault in ("blocks", "buffers"):
        with as_on_cuda() as patch:
            if fault == "blocks" and rank == 1:
                patch.setattr(blocks, "flex_attention", fails)
            if fault == "buffers" and rank == 1:
                patch.setattr(decode_attention.Layer, "update", fails)
            of_policy = policy(folder, **SETTINGS)
            assert_sharded(of_policy)
            assert of_policy.scorer.in_blocks == (fault != "blocks")
            assert of_policy.scorer.decodes_fixed == (fault != "buffers")
            step(of_policy, [[0, 2], [1]], of_policy.scorer.in_blocks)


def main(folder: Path, out: Path, runs: list[list[str]]) -> None:
    for kind, how in runs:
        run(folder, out, kind, how)
    if torch.distributed.is_initialized():
        refused_by_one(folder)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
