"""How much `rollout.ahead` overlaps sampling with updates, with simulated times.

    python benchmarks/ahead_overlap.py [--steps 40] [--ahead 4] [--bound 0.9]

A step has 32 requests. The sampler takes 8 at a time and answers each after a log-normal time: mean 30 ms, sigma of the
logarithm 0.8. An update takes 120 ms, the mean time to sample a step. The ideal time, without any waiting, is the
longer of two sums: all sampling divided by 8, and everything else in the steps. Both sums are measured in the run, so
the ratio depends little on the machine. Exits with an error if the run takes longer than ideal / bound.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "conformance" / "support"))
from table_problem import PROMPTS, REFERENCE, reward, settings, table

from gvpo_core.training.loop import train
from gvpo_core.training.policy import Batch, Coefficients, Response, Update
from gvpo_core.training.policy.table import TablePolicy
from gvpo_core.training.samplers.workers import Workers
from gvpo_core.training.sampling import Sampling
from gvpo_core.training.watch.console import Console

REQUESTS, AT_ONCE, MEAN, SIGMA = 32, 8, 0.03, 0.8  # per step, at a time, seconds, of the logarithm
Drawn = list[list[Response]]


class Simulated:
    """Samples from the reference after a log-normal time that depends only on the seed."""

    def __init__(self) -> None:
        self.policy, self.workers = TablePolicy(table(REFERENCE)), Workers[list[Response]](AT_ONCE)
        self.seconds = 0.0  # sum over all requests

    def generate(self, prompts: Sequence[Any], seeds: Sequence[Sequence[int]], sampling: Sampling) -> Drawn:
        return self.ask(prompts, seeds, sampling)()

    def ask(self, prompts: Sequence[Any], seeds: Sequence[Sequence[int]], sampling: Sampling) -> Callable[[], Drawn]:
        work = [self.workers.submit(partial(self._draw, p, s, sampling)) for p, s in zip(prompts, seeds, strict=True)]
        return partial(_results, work)

    def _draw(self, prompt: Any, seeds: Sequence[int], sampling: Sampling) -> list[Response]:
        start = time.perf_counter()
        normal = np.random.default_rng(seeds[0]).standard_normal()
        time.sleep(MEAN * math.exp(SIGMA * normal - SIGMA**2 / 2))
        self.seconds += time.perf_counter() - start
        return self.policy.generate([prompt], [seeds], sampling)[0]


def _results(work: Sequence["Future[list[Response]]"]) -> Drawn:
    return [future.result() for future in work]


class Slow(TablePolicy):
    """A policy whose updates take the mean time to sample a step."""

    def update(self, batch: Batch, coefficients: Coefficients, *, scored: np.ndarray | None = None) -> Update:
        time.sleep(MEAN * REQUESTS / AT_ONCE)
        return super().update(batch, coefficients, scored=scored)


def measured(folder: Path, steps: int, ahead: int) -> tuple[float, float, float]:
    """Returns the seconds of the run's steps, of all sampling / AT_ONCE, and of everything else."""
    config = settings(folder)
    rollout = replace(config.rollout, prompts=REQUESTS, responses=4, ahead=ahead)
    config = replace(config, run=replace(config.run, steps=steps), rollout=rollout)
    policy, sampler = Slow(table(REFERENCE), config.optimizer), Simulated()
    rows = [{"prompt": PROMPTS[i % len(PROMPTS)]} for i in range(3 * REQUESTS)]
    with (folder.parent / "console.txt").open("w") as file:
        console = Console(steps, stream=file)
        train(config, policy, train_rows=rows, rewards={"value": reward}, sampler=sampler, console=console)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    records = [line for line in lines if line["kind"] == "train"]
    step, waiting = (sum(r[f"seconds/{name}"] for r in records) for name in ("step", "generate"))
    return step, sampler.seconds / AT_ONCE, step - waiting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--ahead", type=int, default=4)
    parser.add_argument("--bound", type=float, default=0.9)
    arguments = parser.parse_args()
    print(f"{'ahead':>5} {'run, s':>7} {'drawing':>8} {'other':>6} {'ideal':>6} {'ratio':>6}")
    ratio = 0.0
    for ahead in sorted({0, 1, 2, arguments.ahead}):
        with tempfile.TemporaryDirectory() as scratch:
            step, drawing, other = measured(Path(scratch) / "run", arguments.steps, ahead)
        ideal = max(drawing, other)
        ratio = ideal / step
        print(f"{ahead:5} {step:7.2f} {drawing:8.2f} {other:6.2f} {ideal:6.2f} {ratio:6.3f}")
    if ratio < arguments.bound:
        sys.exit(f"ahead = {arguments.ahead}: {ratio:.3f} of ideal overlap; expected at least {arguments.bound}")


if __name__ == "__main__":
    main()
