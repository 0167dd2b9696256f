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
RATES = {"gvpo": 3.0, "rloo": 3.0, "grpo": 0.3}  # rates at which on-policy runs are stable in claim 5
METHODS = {
    "GVPO": ("gvpo", False),
    "RLOO, clipped ratio": ("rloo", True),
    "GRPO, no ratio": ("grpo", False),
    "GRPO, clipped ratio": ("grpo", True),
}


def regrets(name: str, ratio: bool, staleness: int, replay: int, rate: float) -> np.ndarray:
    """Returns the (S,) regret of Eq. 5 at the end, in reward units; infinite for runs that overflow."""
    runs = sampled_steps(name, SEEDS, STEPS, rate, k=K, staleness=staleness, replay=replay, ratio=ratio, seed=7)
    return np.array([BETA * distance(r) if np.isfinite(r).all() else math.inf for r in runs])


def run() -> dict[str, Any]:
    cells: dict[str, list[float]] = {}
    columns = [(f"stale {s}", s, 0) for s in STALENESS] + [("replay", 0, REPLAY)]
    for label, (name, ratio) in METHODS.items():
        for column, staleness, replay in columns:
            values = regrets(name, ratio, staleness, replay, RATES[name])
            cells[f"{label}|{column}"] = [float(max(values.mean(), 0.0)), mean_half_width(values)]
    fast = {}  # at ten times the rate
    for label, (name, ratio) in METHODS.items():
        for column, staleness, replay in columns:
            values = regrets(name, ratio, staleness, replay, 10 * RATES[name])
            fast[f"{label}|{column}"] = float(np.median(values))
    return {"cells": cells, "fast": fast, "columns": [c[0] for c in columns], "start": BETA * distance(LOG_REF)}


def draw(result: dict[str, Any], axes: Any) -> None:
    floor = 1e-6  # values that are rounding errors are drawn here and labelled 0
    for i, label in enumerate(METHODS):
        points = np.array([result["cells"][f"{label}|{c}"] for c in result["columns"]])
        zero = points[:, 0] < 1e-12
        x, y = np.arange(len(points)) + 0.16 * (i - 1.5), np.where(zero, floor, points[:, 0])
        axes.errorbar(x, y, np.where(zero, 0, points[:, 1]), fmt="osD^"[i], markersize=5, label=label, capsize=3)
    axes.set_yscale("log")
    axes.set_yticks([floor, 1e-5, 1e-4, 1e-3, 1e-2], ["0", *(f"$10^{{{n}}}$" for n in (-5, -4, -3, -2))])
    axes.minorticks_off()
    axes.set_xticks(range(len(result["columns"])), result["columns"], fontsize=8)
    axes.axhline(result["start"], color="grey", linewidth=0.8, label="pi_ref")
    axes.set(ylabel="regret at the end", ylim=(floor / 2, 1))
    axes.set_title(f"responses of older policies: mean of {SEEDS} seeds, 95 %", fontsize=10)
    axes.legend(fontsize=7, ncols=3, loc="upper center")


def text(result: dict[str, Any]) -> str:
    columns = result["columns"]
    show = lambda x: number(x[0]) + (f" +- {number(x[1])}" if x[0] > 1e-12 else "")
    rows = [[label, *(show(result["cells"][f"{label}|{c}"]) for c in columns)] for label in METHODS]
    fast = [[label, *(number(result["fast"][f"{label}|{c}"]) for c in columns)] for label in METHODS]
    return f"""GVPO's optimum does not depend on the sampler, so old responses need no importance weights.

Run: {SEEDS} seeds, {STEPS} steps of sampled groups of {K}. The groups are drawn by the policy of 0, 1, 4 or
16 steps ago, or half of them come from the last {REPLAY} steps (replay). beta = {BETA}, clip 0.2, rates
{", ".join(f"{k} {v:g}" for k, v in RATES.items())}. The table has the regret (Eq. 5) at the end, mean and
95 % interval. For pi_ref it is {number(result["start"])}:

{table(["", *columns], rows)}

At ten times the rates, median over the seeds:

{table(["", *columns], fast)}

Shows: GVPO ends at pi\\* at every staleness and with replay, at both rates. It computes the weight of an
old response from the current policy, so only the choice of responses is old. The methods with a ratio clip it,
and compute the KL penalty with the sampler's log-probabilities. The older the responses are, the farther
GRPO with the ratio ends from pi\\*. RLOO with the ratio misses pi\\* only at 16 steps at the lower rate,
and with all old responses at ten times the rate. GRPO without the ratio ends at its noise floor, which depends
on its rate.
Does not show: that RLOO's ratio does harm at a low rate and a small age: there it ends at pi\\*. The runs
also have no neural network, in which a step on one response changes others, and no cold starts: all policies
here cover all responses.
"""


def holds(result: dict[str, Any]) -> dict[str, bool]:
    cell = lambda label, column: result["cells"][f"{label}|{column}"][0]
    stale = [cell("GRPO, clipped ratio", f"stale {s}") for s in STALENESS]
    return {
        "GVPO ends at pi* at every staleness and with replay": all(cell("GVPO", c) < 1e-6 for c in result["columns"]),
        "RLOO with the ratio misses pi* only at 16 steps": [
            c for c in result["columns"] if cell("RLOO, clipped ratio", c) > 1e-6
        ]
        == ["stale 16"],
        "and with all old responses at ten times the rate": [
            c for c in result["columns"] if result["fast"][f"RLOO, clipped ratio|{c}"] > 1e-6
        ]
        == result["columns"][1:],
        "GRPO with the ratio ends farther from pi* the older the responses are": stale == sorted(stale),
        "GRPO ends at a noise floor": min(cell("GRPO, no ratio", c) for c in result["columns"]) > 1e-6,
        "at ten times the rate, too": max(result["fast"][f"GVPO|{c}"] for c in result["columns"]) < 1e-6,
        "the ratio with old responses is worse than none": cell("GRPO, clipped ratio", "stale 16")
        > 10 * cell("GRPO, no ratio", "stale 16"),
    }
