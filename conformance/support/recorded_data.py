"""Recorded groups of the table problem, and runs on them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from table_problem import PROMPTS, REFERENCE, RESPONSES, REWARDS, settings, table

from gvpo_core.training.config import Config
from gvpo_core.training.loop import train
from gvpo_core.training.policy.table import TablePolicy


def groups(sizes=(2, 5, 3, 4, 2, 3), seed=0) -> list[dict]:
    """Rows with k(x) responses each, drawn uniformly: nobody's policy."""
    rng = np.random.default_rng(seed)
    rows = []
    for i, k in enumerate(sizes):
        x = i % len(PROMPTS)
        chosen = rng.integers(0, len(RESPONSES), k)
        rows.append(
            {
                "prompt": PROMPTS[x],
                "responses": [RESPONSES[y] for y in chosen],
                "rewards": [float(REWARDS[x, y]) for y in chosen],
            }
        )
    return rows


def config_of(folder: Path, **sections) -> Config:
    """Settings without a reward; each section's changes as a mapping."""
    config = replace(settings(folder), rewards={})
    config = replace(config, run=replace(config.run, steps=6, checkpoint_every=2))
    for name, changes in sections.items():
        config = replace(config, **{name: replace(getattr(config, name), **changes)})
    return config


class Counting(TablePolicy):
    """Counts what the loop asks of the policy."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.reference_calls = self.reference_rows = self.generated = 0

    def logprobs(self, batch, *, reference=False):
        self.reference_calls += reference
        self.reference_rows += len(batch) * reference
        return super().logprobs(batch, reference=reference)

    def generate(self, prompts, seeds, sampling):
        self.generated += len(prompts)
        return super().generate(prompts, seeds, sampling)


def policy_of(config: Config, **options) -> Counting:
    return Counting(table(REFERENCE), config.optimizer, updates=config.updates, **options)


def run(config: Config, rows, policy=None, **options) -> Counting:
    policy = policy or policy_of(config)
    train(config, policy, train_rows=rows, **options)
    return policy


def records(folder: Path, kind: str = "train") -> list[dict]:
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [r for line in lines if (r := json.loads(line))["kind"] == kind]
