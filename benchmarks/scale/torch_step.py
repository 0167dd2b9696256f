"""FLOPs of a step over the bound, and the blocks of attention that packed rows visit.

The bound: each prompt once, 6 a parameter of the layers and a token, 3 products of the head and a response token, and
visible pairs of tokens alone in the attention. J1's model with all widths and lengths divided by 16, which keeps the
ratios of layers, head and attention, takes real steps. Products are counted by FlopCounterMode; those of attention from
the rows, 2 forward and 5 backward a pair: of the dense mask all pairs of a row, of blocks those in visited blocks of
128 / 16 tokens, as on CUDA.
"""

import sys
import tempfile
from collections.abc import Iterator
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
# All that was computed at 8a31fac, over the same bound, with the dense mask.
BEFORE = {"fits": 1.890, "ranks": 2.012, "split": 1.739, "checkpointing": 2.016}


class Passes:
    """What attention computes and computes again in the passes of a step, in pairs of tokens a layer."""

    def __init__(self, of_policy: Any, in_blocks: bool) -> None:
        self.policy, self.in_blocks = of_policy, in_blocks
        self.pairs = self.again = self.again_tokens = 0.0

    def __call__(self, scorer: Any, arrays: Any, device: Any) -> Any:
        pairs = float(arrays.ids.size * arrays.ids.shape[1])
        if self.in_blocks:
            before, blocks.BLOCK = blocks.BLOCK, blocks.BLOCK // SCALE
            pairs = float((blocks.kinds(arrays.segments, arrays.last) > 0).sum() * blocks.BLOCK**2)
            blocks.BLOCK = before
        trains = torch.is_grad_enabled()
        recomputed = trains and any(layer.training for layer in self.policy.scorer.decoder.layers)
        self.pairs += pairs * (7 if trains else 2)
        self.again += 2 * pairs * recomputed
        self.again_tokens += arrays.ids.size * recomputed
        return self.plain(scorer, arrays, device)

    plain = staticmethod(model.score)


class _NoModules:
    """In place of what tells modules apart."""

    parents = ("Global",)

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def _addmm(out: Any, a: Any, b: Any, *given: Any, **options: Any) -> int:
    """FLOPs of a product added in place, from shapes: FlopCounterMode leaves it out."""
    return int(2 * a[0] * a[1] * b[1])


def groups(full: bool = False) -> Batch:
    draw = np.random.default_rng(0)
    token = lambda n: tuple(draw.integers(0, SIZES["vocab_size"], n).tolist())
    prompts = [token(PROMPT) for _ in range(2)]
    lengths = np.minimum(LONGEST, np.exp(draw.normal(np.log(LONGEST / 2), 0.6, 2 * K)).astype(int) + 1)
    responses = [token(LONGEST if full else int(n)) for n in lengths]
    return Batch([p for p in prompts for _ in range(K)], responses, [g for g in range(2) for _ in range(K)])


def flops(folder: Path, batch: Batch, in_blocks: bool, **settings: Any) -> tuple[float, float]:
    """FLOPs of a step over the bound: without what is computed again in the backward pass, and that."""
    always = settings.pop("gradient_checkpointing", False)
    policy = load(
        ModelConfig(path=str(folder), device="cpu", gradient_checkpointing=always),
        OptimizerConfig(**settings),
        updates=1,
        reference=False,
        seed=0,
    )
    if in_blocks:  # as on CUDA, where rows share their prompt whatever their length
        policy._splitting = policy._split(0)
    passes = Passes(policy, in_blocks)
    factors = np.linspace(-1, 1, len(batch))
    try:
        model.score = passes
        counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm})
        counter.mod_tracker = _NoModules()  # its hooks fail where layers are computed again
        with counter:
            policy.update(batch, lambda logprobs, rows: factors[rows])
    finally:
        model.score = passes.plain
    counted = {op: n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op)}
    h, v = SIZES["hidden_size"], SIZES["vocab_size"]
    linear = M.linear // SCALE**2
    pair = 2 * h * M.layers  # of one product of queries and keys, or of weights and values
    bound, again = 0.0, 0.0
    for g in range(2):
        rows = [i for i in range(len(batch)) if batch.groups[i] == g]
        n = np.asarray([len(batch.responses[i]) for i in rows])
        tokens = PROMPT + (n - 1).sum()
        visible = PROMPT * (PROMPT + 1) / 2 + ((n - 1) * PROMPT + (n - 1) * n / 2).sum()
        again += 2 * v * h * n.sum()  # logits, in tiles, once more in the backward pass
        bound += 6 * linear * tokens + 6 * v * h * n.sum() + 6 * pair * visible
    # A layer's last product is not computed again: nothing after it needs its result.
    again += 2 * (linear - M.layers * h * SIZES["intermediate_size"]) * passes.again_tokens + pair * passes.again
    total = sum(counted.values()) + pair * (passes.pairs + passes.again)
    return (total - again) / bound, again / bound


def counts() -> Iterator[Count]:
    with tempfile.TemporaryDirectory() as made:
        folder = tiny_models.make_model("qwen2", Path(made), spread=0.02, **SIZES)
        ragged, full = groups(), groups(full=True)
        fits, again = flops(folder, ragged, True, micro_batch_tokens=16896 // SCALE)
        what = "FLOPs of a step over the bound, groups that fit a micro-batch"
        yield Count(what, ON, "", BEFORE["fits"], float(fits + again), 1.08)
        yield Count(f"{what}, without recomputation", ON, "", None, float(fits), 1.06)
        # On several processes each holds whole groups, and takes them as one process does.
        yield Count(f"{what}, on several processes", ON, "", BEFORE["ranks"], float(fits + again), 1.08)
        for always in (False, True):
            settings = {"micro_batch_tokens": 8192 // SCALE, "gradient_checkpointing": always}
            split, again = flops(folder, full, True, **settings)
            what = "FLOPs of a step over the bound, groups in three micro-batches"
            what, key = (f"{what}, gradient checkpointing", "checkpointing") if always else (what, "split")
            yield Count(what, "J1 / 16, full lengths", "", BEFORE[key], float(split + again), 1.36 if always else 1.30)
            yield Count(f"{what}, without recomputation", "J1 / 16, full lengths", "", None, float(split), 1.10)
    for name, (prompt, response, k), bound in (("J1", (512, 2048, 8), 0.105), ("J2", (1024, 4096, 16), 0.05)):
        of = Batch([(0,) * prompt] * k, [(i, *(0,) * (response - 1)) for i in range(k)], [0] * k)
        arrays = layout.arrays(of, layout.plan_rows(of, packed=True, tokens=1 << 30))
        visited = float((blocks.kinds(arrays.segments, arrays.last) > 0).mean())
        yield Count("blocks of attention visited by a packed row, of all", name, "", 1.0, visited, bound)
