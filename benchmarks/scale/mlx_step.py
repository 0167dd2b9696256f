"""Host waits, operations, programs and memory of sampling and a step in MLX.

Waits and prefilled tokens are counted while a tiny model samples. Operations are the nodes of a pass's graph before it
is evaluated; on a GPU each launches a kernel. Programs are planned from J4's ragged rows; none is compiled.
"""

import io
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from gvpo_mlx import buckets, choice, load
from gvpo_mlx.model import inputs

from benchmarks.scale.jobs import JOBS
from benchmarks.scale.table import Count
from gvpo_core.training.config import ModelConfig, OptimizerConfig
from gvpo_core.training.policy import Batch, layout
from gvpo_core.training.sampling import Sampling, row_seed

sys.path.insert(0, str(Path(__file__).parents[2] / "conformance" / "support"))
import tiny_models

JOB = next(job for job in JOBS if job.name == "J4")
STEPS, BUDGET = 15, 8192
TINY, K, TOKENS = "tiny llama", 8, 24


def counts() -> Iterator[Count]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = tiny_models.write_model("llama", Path(scratch), spread=0.15)
        of_policy = load(
            ModelConfig(path=str(folder), device="cpu"), OptimizerConfig(), updates=1, reference=False, seed=0
        )
        waits, prefilled, queued = sampled(of_policy)
        yield Count("host waits per sampled token", TINY, "", 3, waits, 1)
        name = "forward passes queued after the host chose the token / all forward passes"
        yield Count(name, TINY, "", 1, 1 - queued, 0.05)
        # Before: mlx-lm's BatchGenerator prefills the prompt of every row.
        name = "prompt tokens prefilled / tokens of the distinct prompts"
        yield Count(name, f"{TINY}, {K} responses", "", K, prefilled, 1)
        plain, compiled = passes(of_policy, False), passes(of_policy, True)
        ratio = compiled["operations"] / plain["operations"]
        yield Count("operations of a compiled group pass / of an uncompiled one", TINY, "", 1, ratio, 0.8)
        ratio = compiled["bytes"] / plain["bytes"]
        yield Count("peak bytes of a compiled group pass / of an uncompiled one", TINY, "", 1, ratio, 1.1)
        computed, programs = planned()
        yield Count("tokens computed in an update / real tokens", "J4, ragged lengths", "", None, computed, 1.3)
        yield Count(f"backward programs in {STEPS} steps", "J4, ragged lengths", "", None, programs, 32)


def sampled(of_policy: Any) -> tuple[float, float, float]:
    """Samples once and counts.

    Returns: host waits per token of the longest response; prompt tokens computed / tokens of the distinct prompts; the
      share of a token's forward passes that are queued before the host waits for that token.
    """
    draw = np.random.default_rng(0)
    prompts = [tuple(draw.integers(1, 96, 12).tolist()) for _ in range(3)]
    seeds = [[row_seed(1, i, j) for j in range(K)] for i in range(3)]
    waits, computed, at_once, queued = [], [], [], []
    evaluate, array, to_host, decoder = mx.eval, np.array, choice.to_host, of_policy.scorer.decoder

    def evaluated(*arrays: Any) -> None:
        waits.append("eval")
        evaluate(*arrays)

    def copied(value: Any, *args: Any, **options: Any) -> Any:
        if isinstance(value, mx.array) and not at_once:
            waits.append("array")
        return array(value, *args, **options)

    def fetched(*arrays: Any) -> Any:
        at_once.append(True)  # copies of arrays that were just evaluated do not wait
        try:
            return to_host(*arrays)
        finally:
            at_once.clear()

    def decoded(ids: Any, **options: Any) -> Any:
        computed.append(ids.size if ids.shape[1] > 1 else 0)
        if ids.shape[1] == 1:
            queued.append(len(waits) <= len(queued))
        return decoder(ids, **options)

    mx.eval, np.array, choice.to_host, of_policy.scorer.decoder = evaluated, copied, fetched, decoded
    try:
        drawn = of_policy.generate(prompts, seeds, Sampling(TOKENS))
    finally:
        mx.eval, np.array, choice.to_host, of_policy.scorer.decoder = evaluate, array, to_host, decoder
    longest = max(len(r.tokens) for row in drawn for r in row)
    return len(waits) / longest, sum(computed) / sum(map(len, prompts)), sum(queued) / len(queued)


def passes(of_policy: Any, compiled: bool) -> dict[str, int]:
    """Returns the operations and the peak bytes of a group's forward and backward pass."""
    draw = np.random.default_rng(1)
    prompt = tuple(draw.integers(1, 96, 32).tolist())
    batch = Batch([prompt] * K, [tuple(draw.integers(1, 96, 40).tolist()) for _ in range(K)], [0] * K)
    arrays = layout.arrays(batch, of_policy._splitting.rows(batch)[0])
    run = of_policy._passes._plain_backward
    run = mx.compile(run) if compiled else run
    with mx.stream(of_policy.device):
        on, factors = inputs(arrays), mx.ones(len(arrays.targets))
        mx.eval(on, factors)
        mx.eval(*run(of_policy.scorer.parameters, on, factors))  # compiles
        peaks = []
        for _ in range(5):
            mx.clear_cache()
            mx.reset_peak_memory()
            held = mx.get_active_memory()
            values, gradients = run(of_policy.scorer.parameters, on, factors)
            text = io.StringIO()
            mx.export_to_dot(text, values, gradients)  # type: ignore[arg-type]
            mx.eval(values)
            mx.eval(gradients)
            peaks.append(mx.get_peak_memory() - held)
            del values, gradients
        # MLX evaluates in its own threads, so the number of buffers in flight differs from run to run.
        return {"operations": text.getvalue().count("shape=rectangle"), "bytes": min(peaks)}


def planned() -> tuple[float, int]:
    """Returns computed tokens / real tokens in the worst step, and the number of shapes of backward passes."""
    worst, shapes = 0.0, set()
    for step in range(STEPS):
        draw = np.random.default_rng(step)
        prompts = [(1,) * int(n) for n in draw.integers(JOB.prompt // 4, JOB.prompt + 1, JOB.prompts)]
        lengths = np.exp(draw.normal(np.log(0.3 * JOB.response), 0.7, JOB.prompts * JOB.responses)).astype(int) + 1
        groups = [i // JOB.responses for i in range(len(lengths))]
        responses = [(i, *(1,) * (min(int(n), JOB.response) - 1)) for i, n in enumerate(lengths)]
        batch = Batch([prompts[g] for g in groups], responses, groups)
        splitting = layout.Splitting(True, BUDGET, 0, JOB.model.hidden, None)
        real = computed = 0
        for rows in splitting.rows(batch):
            padded = buckets.padded(layout.arrays(batch, rows), BUDGET)
            real, computed = real + sum(row.length for row in rows), computed + padded.ids.size
            shapes.add((padded.ids.shape, padded.targets.shape))
        worst = max(worst, computed / real)
    return worst, len(shapes)
