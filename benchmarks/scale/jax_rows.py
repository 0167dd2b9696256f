"""How many of the tokens that JAX computes in an update are padding, and how many programs a run compiles for updates.

Plans J3's batches, and episodes, as one of four processes with 4 chips each does. No model is run.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from gvpo_jax import generate, mesh, rows

from benchmarks.scale import episodes
from benchmarks.scale.jobs import JOBS
from benchmarks.scale.table import Count
from gvpo_core.training.policy import Batch

JOB = next(job for job in JOBS if job.name == "J3")
PROCESSES, SHARDS, STEPS, BUDGET = 4, 4, 15, 8192


def ragged(step: int) -> Batch:
    """Returns a process's part of a step: prompts of P/4 to P tokens, log-normal responses with a median of 0.3 R."""
    draw = np.random.default_rng(step)
    prompts = JOB.prompts // PROCESSES
    texts = [(1,) * int(n) for n in draw.integers(JOB.prompt // 4, JOB.prompt + 1, prompts)]
    lengths = np.exp(draw.normal(np.log(0.3 * JOB.response), 0.7, prompts * JOB.responses)).astype(int) + 1
    groups = [i // JOB.responses for i in range(prompts * JOB.responses)]
    responses = [(i, *(1,) * (min(int(n), JOB.response) - 1)) for i, n in enumerate(lengths)]
    return Batch([texts[g] for g in groups], responses, groups)


def counts() -> Iterator[Count]:
    mesh.batch_shards = lambda over: SHARDS  # type: ignore[assignment]
    worst, shapes = planned(ragged(step) for step in range(STEPS))
    yield Count("tokens computed in an update / real tokens", "J3, 4 processes", "", 3.37, worst, 1.3)
    yield Count("`accumulate` programs in 15 steps", "J3, 4 processes", "", 96, shapes, 12)
    yield Count("shapes of `prefill` and `decode` in 15 steps", "J3, 4 processes", "", 9, sampled(), 2)
    on = "groups of " + episodes.ON % (4, f"{episodes.THOUGHT} to {3 * episodes.THOUGHT}")
    of_steps = [episodes.segments(4, 16 + step % 3, 3) for step in range(STEPS)]
    least = [episodes.needed(of_rows) for of_rows, _ in of_steps]
    alone, _ = planned((of_rows for of_rows, _ in of_steps), least)
    worst, shapes = planned((shared for _, shared in of_steps), least)
    yield Count("tokens computed in an update / distinct tokens", on, "", alone, worst, 1.5)
    yield Count("`accumulate` programs in 15 steps", on, "", None, shapes, 12)


def sampled() -> int:
    """Returns the number of shapes in which a process samples. Half of its chips' free memory holds keys and values."""
    spec, chip = JOB.model, JOB.chip
    held = spec.parameters * (16 + 2) / JOB.chips + 2 * spec.parameters / SHARDS  # 4 chips share a sampling copy
    tokens = int(SHARDS * (chip.memory - held) / 2 / spec.cache_bytes)
    room, shapes = rows.bucket(JOB.response), set()
    for step in range(STEPS):
        batch = ragged(step)
        prompts = batch.prompts[:: JOB.responses]
        seeds = [range(JOB.responses)] * len(prompts)
        chunks = generate.chunks_of(prompts, seeds, room, tokens, 1)
        shapes |= {generate.shape_of(chunk, prompts, room, 1) for chunk in chunks}
    return len(shapes)


def planned(batches: Iterable[Batch], tokens: Sequence[int] = ()) -> tuple[float, int]:
    """Returns computed tokens / real tokens in the worst step, and the number of shapes over all steps.

    Args:
      tokens: real tokens of each step; default: the tokens of its rows.
    """
    splitting = rows.ShardSplitting(True, BUDGET, 0, JOB.model.hidden, None, SHARDS)
    worst, shapes = 0.0, set()
    for step, batch in enumerate(batches):
        units = splitting.rows(batch)
        micro = rows.plan(batch, units, splitting, None)  # type: ignore[arg-type]
        real = tokens[step] if tokens else sum(row.length for (row,) in units)
        worst = max(worst, sum(p.arrays["ids"].size for p in micro) / real)
        shapes |= {p.shape for p in micro}
    return worst, len(shapes)
