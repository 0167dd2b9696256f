"""Plan of claim 9: the runs, their learning rates, and the saved results."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METHODS = ("gvpo", "grpo", "rloo", "reject_sampling")
RATES = (4e-6, 1.2e-5, 3.6e-5)
SEEDS, TUNING_SEED = (1, 2, 3), 100
STALENESS = (0, 4)
STEPS, TUNING_STEPS = 24, 12
PROMPTS, RESPONSES, MAX_TOKENS, BETA = 4, 8, 16, 0.05
HELD_OUT, VALIDATION, LARGEST = 240, 120, 40  # LARGEST: largest number in a question
TASKS: dict[str, dict[str, Any]] = {
    "basic_arithmetic": {
        "min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2, "operators": ["+"],
        "allow_parentheses": False, "format_style": "natural",
    },
    "gcd": {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 40},
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """The settings of one run, and the name of its result."""

    task: str
    method: str
    staleness: int
    rate: float
    seed: int
    tuning: bool = False

    @property
    def name(self) -> str:
        kind = "tune" if self.tuning else "run"
        return f"{kind}-{self.task}-{self.method}-stale{self.staleness}-{self.rate:g}-{self.seed}"


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Returns name of a run -> its result."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {result["run"]: result for result in map(json.loads, lines)}


def tuning_runs() -> list[Run]:
    return [
        Run(task, method, 0, rate, TUNING_SEED, tuning=True) for task in TASKS for method in METHODS for rate in RATES
    ]


def final_runs(results: dict[str, dict[str, Any]]) -> list[Run]:
    """Returns the reported runs of tuned cells, at the rate with the highest validation accuracy, on-policy first."""
    tried_rates: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for run in tuning_runs():
        if run.name in results:
            tried_rates.setdefault((run.task, run.method), []).append((results[run.name]["after"], run.rate))
    rates = {cell: max(tried)[1] for cell, tried in tried_rates.items() if len(tried) == len(RATES)}
    return [
        Run(task, method, age, rate, seed)
        for age in STALENESS
        for seed in SEEDS
        for (task, method), rate in rates.items()
    ]
