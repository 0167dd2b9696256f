"""How much of what JAX computes in an update is padding, and how many programs a run compiles for it.

Planned for J3's batches and for episodes, as one of four processes of 4 chips plans them; nothing is computed.
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
    """A process's part of a step: prompts of P/4 to P tokens, log-normal responses of 0.3 R in the median."""
    draw = np.random.default_rng(step)
    prompts = JOB.prompts // PROCESSES
    given = [(1,) * int(n) for n in draw.integers(JOB.prompt // 4, JOB.prompt + 1, prompts)]
    lengths = np.exp(draw.normal(np.log(0.3 * JOB.response), 0.7, prompts * JOB.responses)).astype(int) + 1
    groups = [i // JOB.responses for i in range(prompts * JOB.responses)]
    responses = [(i, *(1,) * (min(int(n), JOB.response) - 1)) for i, n in enumerate(lengths)]
    return Batch([given[g] for g in groups], responses, groups)


def counts() -> Iterator[Count]:
    mesh.batch_shards = lambda over: SHARDS  # type: ignore[assignment]
    worst, shapes = planned(ragged(step) for step in range(STEPS))
    yield Count("computed tokens over real ones in an update", "J3, 4 processes", "", 3.37, worst, 1.3)
    yield Count("programs `accumulate` after 15 steps", "J3, 4 processes", "", 96, shapes, 12)
    yield Count("shapes of `prefill` and `decode` after 15 steps", "J3, 4 processes", "", 9, sampled(), 2)
    on = "groups of " + episodes.ON % 4 + " or up to three times that"
    of_steps = [episodes.segments(4, 16 + step % 3, 3) for step in range(STEPS)]
    least = [episodes.needed(of_rows) for of_rows, _ in of_steps]
    alone, _ = planned((of_rows for of_rows, _ in of_steps), least)
    worst, shapes = planned((shared for _, shared in of_steps), least)
    yield Count("computed tokens over different ones in an update", on, "", alone, worst, 1.5)
    yield Count("programs `accumulate` after 15 steps", on, "", None, shapes, 12)


def sampled() -> int:
    """Shapes in which a process samples: half of its chips' free memory is for keys and values, as in a run."""
    spec, chip = JOB.model, JOB.chip
    held = spec.parameters * (16 + 2) / JOB.chips + 2 * spec.parameters / SHARDS  # a copy to sample from for 4 chips
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
    """Computed over real tokens (default: those of the rows) in the worst step, and the shapes in all."""
    splitting = rows.ShardSplitting(True, BUDGET, 0, JOB.model.hidden, None, SHARDS)
    worst, shapes = 0.0, set()
    for step, batch in enumerate(batches):
        units = splitting.rows(batch)
        micro = rows.plan(batch, units, splitting, None)  # type: ignore[arg-type]
        real = tokens[step] if tokens else sum(row.length for (row,) in units)
        worst = max(worst, sum(p.arrays["ids"].size for p in micro) / real)
        shapes |= {p.shape for p in micro}
    return worst, len(shapes)
