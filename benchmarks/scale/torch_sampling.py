"""Host waits and computed rows of sampling in fixed buffers, and what LoRA adds to sampling and to an update.

On CUDA rows are decoded in fixed buffers. Here the same code runs on CPU, without graphs. Products are the dispatched
matrix products. Waits are the calls that copy a tensor's values to the host.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from gvpo_torch import adapters, fixed, generate, load
from gvpo_torch.decode_prompts import Prefilled
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from benchmarks.scale.jobs import JOBS, Job
from benchmarks.scale.table import Count
from gvpo_core.training.config import ModelConfig, OptimizerConfig
from gvpo_core.training.policy import Batch, layout
from gvpo_core.training.sampling import Sampling, row_seed

sys.path.insert(0, str(Path(__file__).parents[2] / "conformance" / "support"))
import tiny_models

TINY, PROMPTS, K, TOKENS, ROWS = "tiny llama", 12, 8, 96, 16
SIZES = {"hidden_size": 64, "intermediate_size": 192, "max_position_embeddings": 512}


def counts() -> Iterator[Count]:
    with tempfile.TemporaryDirectory() as name:
        folder = tiny_models.make_model("llama", Path(name) / "model", **SIZES)
        full = policy(folder)
        alike = [[row_seed(1, i, j) for j in range(K)] for i in range(2)]
        prompts = [tuple(np.random.default_rng(i).integers(1, 96, 12).tolist()) for i in range(PROMPTS)]
        plain, in_buffers = (waits(full, prompts[:2], alike, fixed_too) for fixed_too in (False, True))
        yield Count("host waits per sampled token", TINY, "", plain, in_buffers, 1 / 16)
        for job in (JOBS[0], JOBS[2]):
            copies = replace(job, shares=False).cache / job.cache
            yield Count(
                "bytes of the sampling cache / bytes needed", job.name, "", copies, cache(job) / job.cache, 1.01
            )
        chunks, refilled = computed(full, prompts)
        on = f"{TINY}, {PROMPTS * K} ragged rows, {ROWS} at once"
        yield Count("rows computed / tokens sampled", on, "", chunks, refilled, 1.1)
        lora = policy(folder, lora_rank=4)
        merged, apart = (products(lora, prompts[:2], alike, together) for together in (True, False))
        base = products(full, prompts[:2], alike, False)
        ratio = "matrix products to sample with LoRA / without LoRA"
        yield Count(ratio, TINY, "", apart / base, merged / base, 1.05)
        for kind, dtype, bound in (("lora", "bfloat16", 0.8), ("dora", "bfloat16", 0.9), ("dora", "float32", 1.15)):
            trained_in_full, by_peft, ours = (
                held(policy(folder, dtype=dtype, **settings), peft) for settings, peft in of_kind(kind)
            )
            ratio = f"bytes held for the backward pass, {NAMES[kind]} / full training"
            yield Count(ratio, f"{TINY}, {dtype}", "", by_peft / trained_in_full, ours / trained_in_full, bound)


NAMES = {"lora": "LoRA", "dora": "DoRA"}


def of_kind(kind: str) -> list[tuple[dict[str, Any], bool]]:
    """Returns (settings, whether peft's own layers are used) for full training, peft's and gvpo_torch's adapters."""
    adapted = {"lora_rank": 4, "lora_kind": kind}
    return [({}, False), (adapted, True), (adapted, False)]


def policy(folder: Path, **settings: Any) -> Any:
    config = ModelConfig(path=str(folder), device="cpu", **settings)
    return load(config, OptimizerConfig(), updates=1, reference=False, seed=0)


def sample(of_policy: Any, prompts: Any, seeds: Any, in_fixed_buffers: bool, rows: int = 1 << 20) -> Any:
    of_policy.scorer.eval()
    with torch.inference_mode():
        return generate.generate(
            of_policy.scorer,
            of_policy.scorer,
            prompts,
            seeds,
            Sampling(TOKENS),
            end=of_policy._end,
            device=of_policy.device,
            cache_tokens=rows * TOKENS + 3 * (rows // K + 1) * max(map(len, prompts)),  # including space for prompts
            in_fixed_buffers=in_fixed_buffers,
        )


def waits(of_policy: Any, prompts: Any, seeds: Any, in_fixed_buffers: bool) -> float:
    """Returns calls that wait for the device / tokens of the longest response."""
    count: list[int] = []
    original = {name: getattr(torch.Tensor, name) for name in ("cpu", "item", "tolist", "__int__", "__bool__")}

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(self: Any, *arguments: Any) -> Any:
            count.append(1)
            return call(self, *arguments)

        return counted

    for name, call in original.items():
        setattr(torch.Tensor, name, watched(call))
    try:
        drawn = sample(of_policy, prompts, seeds, in_fixed_buffers)
    finally:
        for name, call in original.items():
            setattr(torch.Tensor, name, call)
    return len(count) / max(len(r.tokens) for row in drawn for r in row)


def computed(of_policy: Any, prompts: Sequence[Any]) -> tuple[float, float]:
    """Returns rows of all decoding steps / tokens sampled: in chunks that wait for the longest row, and with refill."""
    sizes: list[int] = []
    logits = fixed.FixedRows.logits

    def counted(self: fixed.FixedRows) -> Any:
        sizes.append(len(self.tokens))
        return logits(self)

    seeds = [[row_seed(2, i, j) for j in range(K)] for i in range(len(prompts))]
    drawn = 0
    fixed.FixedRows.logits = counted  # type: ignore[method-assign]
    try:
        for i in range(0, len(prompts), ROWS // K):
            for row in sample(of_policy, prompts[i : i + ROWS // K], seeds[i : i + ROWS // K], True, ROWS):
                drawn += sum(len(r.tokens) for r in row)
        chunks = sum(sizes)
        sizes.clear()
        again = sample(of_policy, prompts, seeds, True, ROWS)
    finally:
        fixed.FixedRows.logits = logits  # type: ignore[method-assign]
    assert sum(len(r.tokens) for row in again for r in row) == drawn, "the samples differ"
    return chunks / drawn, sum(sizes) / drawn


def cache(job: Job) -> int:
    """Returns the bytes of the buffers of a chip's rows, with space for complete responses. Uses fake tensors."""
    m, prompts = job.model, job.rows // job.responses
    with FakeTensorMode():
        held = DynamicCache()
        for layer in range(m.layers):
            states = torch.zeros((prompts, m.kv_heads, job.prompt, m.head_size), dtype=torch.bfloat16)
            held.update(states, states, layer)
        first = Prefilled(torch.zeros(prompts, 1), held, None, torch.arange(prompts))
        rows = fixed.FixedRows(SimpleNamespace(dtype=torch.bfloat16), first, job.rows, job.responses, job.response)
        while rows.slots < job.response:
            rows.grow()
        buffers = [rows.bias, rows.prompts.bias, *rows.keys, *rows.values, *rows.prompts.keys, *rows.prompts.values]
        return sum(buffer.nbytes for buffer in buffers)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
        return func(*args, **(kwargs or {}))


def products(of_policy: Any, prompts: Any, seeds: Any, merged: bool) -> int:
    """Returns the matrix products of a rollout, including those that merge the adapters."""
    with Products() as counted:
        if merged:
            with adapters.merged(of_policy.scorer.lm):
                sample(of_policy, prompts, seeds, True)
        else:
            sample(of_policy, prompts, seeds, True)
    return counted.count


def held(of_policy: Any, as_peft: bool) -> int:
    """Returns the bytes that a forward pass holds for the backward pass, without parameters.

    Args:
      as_peft: use peft's own layers.
    """
    for layer in adapters.lora_layers(of_policy.scorer.lm) if as_peft else ():
        layer.cast_input_dtype_enabled = True
        layer.lora_variant = {name: getattr(variant, "own", variant) for name, variant in layer.lora_variant.items()}
        layer.lora_A["default"].__class__ = torch.nn.Linear
    draw = np.random.default_rng(0)
    prompt = tuple(draw.integers(1, 96, 32).tolist())
    batch = Batch([prompt] * 4, [tuple(draw.integers(1, 96, 40).tolist()) for _ in range(4)], [0] * 4)
    arrays = layout.arrays(batch, of_policy._splitting.rows(batch)[0])
    parameters = {p.untyped_storage().data_ptr() for p in of_policy.scorer.parameters()}
    storages: dict[int, Any] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        of_policy._score_autocast(arrays)
    return sum(size for size, _ in storages.values())
