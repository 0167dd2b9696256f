"""Peak memory of the backward pass of one of J1's groups, at J1's real size. Fake tensors: nothing is computed.

All three micro-batches of the group go forward once before any goes backward (`update.Backward.deferred`), with
gradient checkpointing. As on CUDA, the pass runs in bfloat16 over float32 masters, without masks (attention by blocks).
The count includes everything that the step allocates, with gradients and casts, but not parameters and moments.
"""

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from gvpo_torch import logprobs, model, update
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, Qwen2Config

from benchmarks.scale.jobs import GIB, JOBS
from benchmarks.scale.table import Count
from gvpo_core.training.policy import Batch
from gvpo_core.training.policy.layout import Splitting

sys.path.insert(0, str(Path(__file__).parents[2] / "conformance" / "support"))
from live_bytes import LiveBytes

JOB = JOBS[0]
M = JOB.model
CPU = torch.device("cpu")
BUDGET = 8192


def scorer() -> Any:
    """Returns J1's model, made of fake tensors."""
    config = Qwen2Config(
        vocab_size=M.vocabulary,
        hidden_size=M.hidden,
        intermediate_size=M.inner,
        num_hidden_layers=M.layers,
        num_attention_heads=M.heads,
        num_key_value_heads=M.kv_heads,
        tie_word_embeddings=M.tied,
        max_position_embeddings=32768,
        use_cache=False,
    )
    made = model.Scorer(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), torch.bfloat16)
    model.enable_checkpointing(made.base)
    if sum(p.numel() for p in made.parameters()) != M.parameters:
        raise RuntimeError("the number of parameters is not J1's")
    return made


def group(responses: int) -> Batch:
    draw = np.random.default_rng(0)
    token = lambda n: tuple(draw.integers(0, M.vocabulary, n).tolist())
    return Batch([token(JOB.prompt)] * responses, [token(JOB.response) for _ in range(responses)], [0] * responses)


def peak() -> tuple[float, int]:
    """Returns the peak GiB that a group's step allocates, and its number of micro-batches."""
    batch = group(JOB.responses)
    micro = Splitting(True, BUDGET, 0, 0).rows(batch)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, mock.patch.object(torch.Tensor, "numpy", lambda self: np.zeros(self.shape, np.float32)):
        of = scorer()
        held = sum(p.nbytes for p in of.parameters())
        of._sees = lambda *arguments: None

        def score(arrays: Any, reduces: bool) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return model.score(of, arrays, CPU)

        backward = update.Backward(score, of, 1)
        with LiveBytes() as live, model.checkpointing(of):
            backward.deferred(batch, micro, lambda values, rows: np.ones(len(rows)), len(micro), nullcontext)
    if any(p.grad is None for p in of.parameters()):
        raise RuntimeError("a parameter has no gradient: the step was not taken")
    return (live.most - held) / GIB, len(micro)


def counts() -> Iterator[Count]:
    logprobs.CPU_TILE_BYTES = logprobs.DEVICE_TILE_BYTES  # tiles of the head's logits have the same size as on CUDA
    most, micro = peak()
    on = f"J1, {JOB.prompt} + {JOB.responses} x {JOB.response} tokens in {micro} micro-batches"
    yield Count("peak memory of one group's step, gradient checkpointing", on, "GiB", None, most, 10.5)
