"""Short runs of the table policy in a folder, started from Python: what the run folder's tests begin with."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import table_problem as problem

from gvpo_core.training import Result, train
from gvpo_core.training.config import Config
from gvpo_core.training.policy.table import TablePolicy

ROWS = [{"prompt": p} for p in problem.PROMPTS]


def config(folder: Path, *, steps: int = 3, evaluation: dict[str, Any] | None = None, **run: Any) -> Config:
    """A checkpoint every step, two of them kept, unless `run` says otherwise."""
    base = problem.settings(folder)
    return replace(
        base,
        run=replace(base.run, **({"steps": steps, "checkpoint_every": 1} | run)),
        rollout=replace(base.rollout, responses=4),
        evaluation=replace(base.evaluation, **(evaluation or {})),
    )


def go(config: Config, **given: Any) -> tuple[Result, TablePolicy]:
    """Runs or resumes with a policy of its own; `given` goes to train."""
    policy = given.pop("policy", None) or TablePolicy(
        problem.table(problem.REFERENCE), config.optimizer, updates=config.updates
    )
    given = {"train_rows": ROWS, "rewards": {"value": problem.reward}} | given
    return train(config, policy, **given), policy


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
