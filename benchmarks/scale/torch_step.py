"""FLOPs of a step / lower bound, and the attention blocks that packed rows visit.

The bound computes each prompt once. It has 6 FLOPs per layer parameter and token, 3 products of the head per response
token, and attention over visible pairs of tokens only. The step is real: J1's model with all widths and lengths divided
by 16, which keeps the ratios of layers, head and attention. FlopCounterMode counts the products. Attention's products
are counted from the rows, 2 forward and 5 backward per pair: all pairs of a row with a dense mask, or the pairs in
visited blocks of 128 / 16 tokens, as on CUDA. On two gloo ranks each rank holds one group, and their FLOPs are added.

python benchmarks/scale/torch_step.py FOLDER OUT     one rank, with torchrun's variables
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gvpo_torch import blocks, load, model
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.scale.jobs import QWEN_1_5B
from benchmarks.scale.table import Count
from gvpo_core.training.config import ModelConfig, OptimizerConfig
from gvpo_core.training.policy import Batch, layout

sys.path.insert(0, str(Path(__file__).parents[2] / "conformance" / "support"))
import tiny_models

SCALE = 16
M = QWEN_1_5B
SIZES = {
    "vocab_size": M.vocabulary // SCALE,
    "hidden_size": M.hidden // SCALE,
    "intermediate_size": M.inner // SCALE,
    "num_hidden_layers": M.layers,
    "num_attention_heads": M.heads,
    "num_key_value_heads": M.kv_heads,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
PROMPT, LONGEST, K = 512 // SCALE, 2048 // SCALE, 8
ON = "J1 / 16, ragged lengths"
RATIO, ONCE = "FLOPs of a step / lower bound", "recomputation not counted"
FITS, SPLIT = 16896 // SCALE, {"micro_batch_tokens": 8192 // SCALE}  # a group in one micro-batch, in three
LINEAR = M.linear // SCALE**2
PAIR = 2 * SIZES["hidden_size"] * M.layers  # FLOPs per pair: queries x keys, or weights x values
THREE, MORE = "groups in three micro-batches", "groups of more than 4 micro-batches"
BEYOND = {"micro_batch_tokens": 4096 // SCALE}
# Cases in which groups do not fit: settings, and bounds with and without recomputation. The part of a group beyond 4 x
# the budget is scored first; with strategy "score" the whole group is. This adds a forward pass and saves memory.
SEVERAL: dict[str, tuple[dict[str, Any], float, float]] = {
    THREE: (SPLIT, 1.30, 1.10),
    f"{THREE}, gradient checkpointing": (SPLIT | {"gradient_checkpointing": True}, 1.36, 1.10),
    f"{THREE}, scored first": (SPLIT | {"strategy": "score"}, 1.49, 1.45),
    MORE: (BEYOND, 1.51, 1.30),
    f"{MORE}, gradient checkpointing": (BEYOND | {"gradient_checkpointing": True}, 1.60, 1.30),
}
# All FLOPs at commit 8a31fac / the same bound, with the dense mask. For `MORE`: when the whole group was scored first.
BEFORE = {"fits": 1.890, "ranks": 2.012, THREE: 1.739, f"{THREE}, gradient checkpointing": 2.016}
BEFORE |= {MORE: 1.627, f"{MORE}, gradient checkpointing": 1.880}


class Passes:
    """Counts what attention computes and recomputes in the passes of a step, in pairs of tokens per layer."""

    def __init__(self, of_policy: Any) -> None:
        self.policy = of_policy
        self.pairs = self.again = self.again_tokens = self.predicted = 0.0

    def __call__(self, scorer: Any, arrays: Any, device: Any) -> Any:
        before, blocks.BLOCK = blocks.BLOCK, blocks.BLOCK // SCALE
        pairs = float((blocks.kinds(arrays.segments, arrays.last) > 0).sum() * blocks.BLOCK**2)
        blocks.BLOCK = before
        trains = torch.is_grad_enabled()
        recomputed = trains and any(layer.training for layer in self.policy.scorer.decoder.layers)
        self.pairs += pairs * (7 if trains else 2)
        self.again += 2 * pairs * recomputed
        self.again_tokens += arrays.ids.size * recomputed
        self.predicted += arrays.targets.size * trains
        return self.plain(scorer, arrays, device)

    plain = staticmethod(model.score)


class _NoModules:
    """Replaces FlopCounterMode's module tracker and attributes everything to one module."""

    parents = ("Global",)

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def _addmm(out: Any, a: Any, b: Any, *arguments: Any, **options: Any) -> int:
    """Returns the FLOPs of an in-place addmm, from shapes. FlopCounterMode does not count it."""
    return int(2 * a[0] * a[1] * b[1])


def groups(full: bool = False) -> Batch:
    draw = np.random.default_rng(0)
    token = lambda n: tuple(draw.integers(0, SIZES["vocab_size"], n).tolist())
    prompts = [token(PROMPT) for _ in range(2)]
    lengths = np.minimum(LONGEST, np.exp(draw.normal(np.log(LONGEST / 2), 0.6, 2 * K)).astype(int) + 1)
    responses = [token(LONGEST if full else int(n)) for n in lengths]
    return Batch([p for p in prompts for _ in range(K)], responses, [g for g in range(2) for _ in range(K)])


def work(folder: Path, batch: Batch, **settings: Any) -> tuple[float, float]:
    """Returns the FLOPs of a step on this rank's part of a batch: without recomputation, and those of recomputation."""
    always = settings.pop("gradient_checkpointing", False)
    policy = load(
        ModelConfig(path=str(folder), device="cpu", gradient_checkpointing=always),
        OptimizerConfig(**settings),
        updates=1,
        reference=False,
        seed=0,
    )
    policy._splitting = policy._split(0)  # as on CUDA, where rows of any length share their prompt
    passes = Passes(policy)
    factors = np.linspace(-1, 1, len(batch))
    try:
        model.score = passes
        counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm})
        counter.mod_tracker = _NoModules()  # its hooks fail if layers are recomputed
        with counter:
            policy.update(batch, lambda logprobs, rows: factors[rows])
    finally:
        model.score = passes.plain
    counted = {op: n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op)}
    h, v = SIZES["hidden_size"], SIZES["vocab_size"]
    again = 2 * v * h * passes.predicted  # the backward pass recomputes logits in tiles
    # A layer's last product is not recomputed: nothing after it needs its result.
    again += 2 * (LINEAR - M.layers * h * SIZES["intermediate_size"]) * passes.again_tokens + PAIR * passes.again
    return sum(counted.values()) + PAIR * (passes.pairs + passes.again) - again, again


def bound(batch: Batch) -> float:
    """Returns the fewest FLOPs that a step can take; see the top of the file."""
    h, v, total = SIZES["hidden_size"], SIZES["vocab_size"], 0.0
    for label in set(batch.groups):
        n = np.asarray([len(r) for r, g in zip(batch.responses, batch.groups, strict=True) if g == label])
        visible = PROMPT * (PROMPT + 1) / 2 + ((n - 1) * PROMPT + (n - 1) * n / 2).sum()
        total += 6 * LINEAR * (PROMPT + (n - 1).sum()) + 6 * v * h * n.sum() + 6 * PAIR * visible
    return total


def flops(folder: Path, batch: Batch, **settings: Any) -> tuple[float, float]:
    """Returns `work` / the bound."""
    counted, again = work(folder, batch, **settings)
    return counted / bound(batch), again / bound(batch)


def of_two_ranks(folder: Path, batch: Batch) -> tuple[float, float]:
    """Returns `flops` of two processes that each hold a group and average their gradients."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, __file__, str(folder), out]
        ranks = [
            subprocess.Popen(command, env=os.environ | env | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)
        ]
        statuses = [rank.wait(timeout=900) for rank in ranks]
        if any(statuses):
            raise RuntimeError("a rank failed")
        counted = np.sum([json.loads((Path(out) / f"{rank}.json").read_text()) for rank in range(2)], axis=0)
    return tuple((counted / bound(batch)).tolist())


def main() -> None:
    """Runs one of two ranks."""
    rank, batch = int(os.environ["RANK"]), groups()
    mine = replace(batch.take([i for i, label in enumerate(batch.groups) if label == rank]), complete=True)
    counted = work(Path(sys.argv[1]), mine, micro_batch_tokens=FITS)
    (Path(sys.argv[2]) / f"{rank}.json").write_text(json.dumps(counted))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def counts() -> Iterator[Count]:
    with tempfile.TemporaryDirectory() as made:
        folder = tiny_models.make_model("qwen2", Path(made), spread=0.02, **SIZES)
        ragged, full = groups(), groups(full=True)
        fits, again = flops(folder, ragged, micro_batch_tokens=FITS)
        name = f"{RATIO}, groups that fit a micro-batch"
        yield Count(name, ON, "", BEFORE["fits"], float(fits + again), 1.08)
        yield Count(f"{name}, {ONCE}", ON, "", None, float(fits), 1.06)
        ranks, again = of_two_ranks(folder, ragged)
        yield Count(f"{name}, on two ranks", ON, "", BEFORE["ranks"], ranks + again, 1.08)
        yield Count(f"{name}, on two ranks, {ONCE}", ON, "", None, ranks, 1.06)
        for kind, (settings, most, without) in SEVERAL.items():
            several, again = flops(folder, full, **settings)
            name = f"{RATIO}, {kind}"
            yield Count(name, "J1 / 16, full lengths", "", BEFORE.get(kind), several + again, most)
            yield Count(f"{name}, {ONCE}", "J1 / 16, full lengths", "", None, several, without)
        scored, again = flops(folder, ragged, micro_batch_tokens=FITS, strategy="score")
        name = f"{RATIO}, groups that fit a micro-batch, scored first"
        yield Count(name, ON, "", None, scored + again, 1.42)
        yield Count(f"{name}, {ONCE}", ON, "", None, scored, 1.38)
    for job, (prompt, response, k), most in (("J1", (512, 2048, 8), 0.105), ("J2", (1024, 4096, 16), 0.05)):
        batch = Batch([(0,) * prompt] * k, [(i, *(0,) * (response - 1)) for i in range(k)], [0] * k)
        arrays = layout.arrays(batch, layout.plan_rows(batch, packed=True, tokens=1 << 30))
        visited = float((blocks.kinds(arrays.segments, arrays.last) > 0).mean())
        yield Count("attention blocks visited by a packed row / all blocks", job, "", 1.0, visited, most)


if __name__ == "__main__":
    main()
