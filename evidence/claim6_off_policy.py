"""Off-policy: stale samplers and replay, with and without importance ratios."""

import math
from typing import Any

import numpy as np

from evidence.page import number, table
from evidence.problem import BETA, LOG_REF, distance, sampled_steps
from gvpo_core.training.intervals import mean_half_width

CHEAP = False
TITLE = "6. Stale and replayed responses need no ratio (Corollary 3.2)"
STALENESS = (0, 1, 4, 16)
REPLAY = 16
SEEDS, STEPS, K = 40, 400, 8
RATES = {"gvpo": 3.0, "rloo": 3.0, "grpo": 0.3}  # each where its on-policy runs are stable in claim 5
METHODS = {
    "GVPO": ("gvpo", False),
    "RLOO, clipped ratio": ("rloo", True),
    "GRPO, no ratio": ("grpo", False),
    "GRPO, clipped ratio": ("grpo", True),
}


def regrets(name: str, ratio: bool, staleness: int, replay: int, rate: float) -> np.ndarray:
    """(S,) regret of Eq. 5 at the end, reward units; infinite where numbers overflow."""
    runs = sampled_steps(name, SEEDS, STEPS, rate, k=K, staleness=staleness, replay=replay, ratio=ratio, seed=7)
    return np.array([BETA * distance(r) if np.isfinite(r).all() else math.inf for r in runs])


def run() -> dict[str, Any]:
    cells: dict[str, list[float]] = {}
    columns = [(f"stale {s}", s, 0) for s in STALENESS] + [("replay", 0, REPLAY)]
    for label, (name, ratio) in METHODS.items():
        for column, staleness, replay in columns:
            values = regrets(name, ratio, staleness, replay, RATES[name])
            cells[f"{label}|{column}"] = [float(max(values.mean(), 0.0)), mean_half_width(values)]
    fast = {}  # the same with ten times the rate
    for label, (name, ratio) in METHODS.items():
        for column, staleness, replay in columns:
            values = regrets(name, ratio, staleness, replay, 10 * RATES[name])
            fast[f"{label}|{column}"] = float(np.median(values))
    return {"cells": cells, "fast": fast, "columns": [c[0] for c in columns], "start": BETA * distance(LOG_REF)}


def draw(result: dict[str, Any], axes: Any) -> None:
    for label in METHODS:
        points = np.array([result["cells"][f"{label}|{c}"] for c in result["columns"]])
        axes.errorbar(
            range(len(points)), np.maximum(points[:, 0], 1e-16), points[:, 1], marker="o", label=label, capsize=3
        )
    axes.set_yscale("log")
    axes.set_xticks(range(len(result["columns"])), result["columns"], fontsize=7)
    axes.axhline(result["start"], color="grey", linewidth=0.8)
    axes.set(ylabel="regret at the end", title=f"off-policy, {SEEDS} seeds", ylim=(1e-17, 1))
    axes.legend(fontsize=7)


def text(result: dict[str, Any]) -> str:
    columns = result["columns"]
    show = lambda x: number(x[0]) + (f" +- {number(x[1])}" if x[0] > 1e-12 else "")
    rows = [[label, *(show(result["cells"][f"{label}|{c}"]) for c in columns)] for label in METHODS]
    fast = [[label, *(number(result["fast"][f"{label}|{c}"]) for c in columns)] for label in METHODS]
    return f"""GVPO's optimum does not depend on who drew the responses, so old ones serve without importance weights.

Run: {SEEDS} seeds, {STEPS} steps of sampled groups of {K}, drawn by the policy of 0, 1, 4 or 16 steps
ago, or half of them from the last {REPLAY} steps (replay); beta = {BETA}, clip 0.2, rates
{", ".join(f"{k} {v:g}" for k, v in RATES.items())}. Regret of Eq. 5 at the end, mean and 95 %
interval; pi_ref has {number(result["start"])}:

{table(["", *columns], rows)}

The same at ten times the rates, median of the seeds:

{table(["", *columns], fast)}

Shows: GVPO ends at pi\\* at every staleness and with replay, at both rates: the weight of an old
response is computed from the policy now, so only which responses are seen is old. The ratio methods
take the KL penalty where the responses were drawn, and clip: they end off pi\\* once responses are
old, GRPO the more the staler. GRPO without the ratio ends at its noise floor, which its rate sets.
Does not show: a neural network, where one response's step moves others, nor cold starts: all policies
here cover all responses.
"""


def holds(result: dict[str, Any]) -> dict[str, bool]:
    cell = lambda label, column: result["cells"][f"{label}|{column}"][0]
    return {
        "GVPO ends at pi* at every staleness and with replay": all(cell("GVPO", c) < 1e-6 for c in result["columns"]),
        "RLOO with the ratio ends off pi* with old responses": cell("RLOO, clipped ratio", "stale 16") > 1e-4,
        "GRPO ends at a noise floor": min(cell("GRPO, no ratio", c) for c in result["columns"]) > 1e-6,
        "at ten times the rate, too": max(result["fast"][f"GVPO|{c}"] for c in result["columns"]) < 1e-6,
        "the ratio with old responses is worse than none": cell("GRPO, clipped ratio", "stale 16")
        > 10 * cell("GRPO, no ratio", "stale 16"),
    }
