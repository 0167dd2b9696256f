"""FLOPs of a JAX step whose groups take several micro-batches, with gradient checkpointing.

FLOPs are XLA's own count for each program times its calls. A group's layer inputs are held until its coefficients are
known. Before, the whole group was scored first.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # programs are counted

import numpy as np
from gvpo_jax import load
from gvpo_jax.programs import Programs

from benchmarks.scale.table import Count
from gvpo_core.training.config import ModelConfig, OptimizerConfig
from gvpo_core.training.policy import Batch

sys.path.insert(0, str(Path(__file__).parents[2] / "conformance" / "support"))
import tiny_models

K, PROMPT, RESPONSE, BUDGET = 8, 32, 97, 256  # a row holds two responses, a group takes four


def groups() -> Batch:
    draw = np.random.default_rng(0)
    token = lambda n: tuple(draw.integers(0, 96, n).tolist())
    prompts = [token(PROMPT) for _ in range(2)]
    return Batch([p for p in prompts for _ in range(K)], [token(RESPONSE) for _ in range(2 * K)], [0] * K + [1] * K)


def work(folder: Path, strategy: str) -> float:
    """Returns the FLOPs of a step."""
    of_policy: Any = load(
        ModelConfig(path=str(folder), device="cpu:0", gradient_checkpointing=True),
        OptimizerConfig(micro_batch_tokens=BUDGET, strategy=strategy),
        updates=1,
        reference=False,
        seed=0,
    )
    total, plain = 0.0, Programs.call

    def counted(self: Programs, function: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal total
        before = set(self.used)
        result = plain(self, function, *arguments, **options)
        (used,) = set(self.used) - before or {key for key in before if key[0] is function}  # type: ignore[index]
        total += self.used[used].cost_analysis().get("flops", 0.0)
        return result

    batch, factors = groups(), np.linspace(-1, 1, 2 * K)
    of_policy.programs.used.clear()
    try:
        Programs.call = counted  # type: ignore[method-assign]
        of_policy.update(batch, lambda logprobs, rows: factors[rows])
    finally:
        Programs.call = plain  # type: ignore[method-assign]
    return total


def counts() -> Iterator[Count]:
    with tempfile.TemporaryDirectory() as made:
        sizes = {"max_position_embeddings": 256, "num_hidden_layers": 1, "hidden_size": 256, "intermediate_size": 768}
        folder = tiny_models.make_model("llama", Path(made), **sizes)
        name = "FLOPs of a step / FLOPs of a step that scores first, gradient checkpointing"
        now = work(folder, "group") / work(folder, "score")
        yield Count(name, "tiny llama, groups in four micro-batches", "", 1.0, now, 0.82)
