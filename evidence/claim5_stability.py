"""Stability over learning rate and beta, with many seeds."""

from typing import Any

import numpy as np

from evidence.page import table
from evidence.problem import LOG_REF, distance, entropy, optimum, sampled_steps
from gvpo_core.training.intervals import wilson

CHEAP = False
PANELS = 2
TITLE = "5. Stability over learning rate and beta"
METHODS = {"GVPO": "gvpo", "Dr. GRPO": "dr_grpo", "GRPO": "grpo", "MaxRL": "maxrl"}
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
BETAS = (0.1, 0.5, 2.0)
SEEDS, STEPS, K = 40, 300, 8
FIRST_SEED = 998  # of the lowest rate; each higher rate uses the next seed


def outcome(logits: np.ndarray, beta: float) -> tuple[int, int]:
    """Returns how many of the (S, P, Y) runs failed, and how many reached pi*.

    Failed: numbers overflow, or KL to pi* is above pi_ref's. Reached: at most a tenth of pi_ref's KL to pi*.
    """
    start, failed, reached = distance(LOG_REF, beta), 0, 0
    for run in logits:
        left = distance(run, beta) if np.isfinite(run).all() else np.inf
        failed += not left <= start
        reached += left <= start / 10
    return failed, reached


def run() -> dict[str, Any]:
    cells, collapsed = {}, {}
    for label, name in METHODS.items():
        for beta in BETAS:
            optimum_entropy = entropy(np.log(optimum(beta))).mean()
            for i, rate in enumerate(RATES):
                logits = sampled_steps(name, SEEDS, STEPS, rate, beta=beta, k=K, seed=FIRST_SEED + i)
                cells[f"{label}|{beta:g}|{rate:g}"] = outcome(logits, beta)
                entropies = np.where(
                    np.isfinite(logits).all(axis=(1, 2)), entropy(np.nan_to_num(logits)).mean(axis=1), 0.0
                )
                collapsed[f"{label}|{beta:g}|{rate:g}"] = int((entropies < optimum_entropy / 4).sum())
    return {"cells": cells, "collapsed": collapsed}


def shares(result: dict[str, Any], label: str, which: str) -> list[tuple[float, float, float]]:
    """Returns, for each learning rate, the share of all runs over the betas and its 95 % interval (Wilson).

    Args:
      which: failed, reached or collapsed.
    """
    out = []
    for rate in RATES:
        names = [f"{label}|{beta:g}|{rate:g}" for beta in BETAS]
        if which == "collapsed":
            hits = sum(result["collapsed"][name] for name in names)
        else:
            hits = sum(result["cells"][name][which == "reached"] for name in names)
        total = SEEDS * len(BETAS)
        out.append((hits / total, *wilson(hits, total)))
    return out


def draw(result: dict[str, Any], panels: Any) -> None:
    for axes, which in zip(panels, ("failed", "collapsed"), strict=True):
        for label, style in zip(METHODS, ("o-", "s--", "D-", "^-"), strict=True):
            points = np.array(shares(result, label, which))
            axes.semilogx(RATES, points[:, 0], style, markersize=5, label=label)
            axes.fill_between(RATES, points[:, 1], points[:, 2], alpha=0.15)
        axes.set(xlabel="learning rate", ylabel=f"share of {which} runs", title="120 runs a point, 95 %")
        axes.set_ylim(-0.05, 1.05)
    panels[0].legend(fontsize=8, loc="upper left")


def text(result: dict[str, Any]) -> str:
    shown = lambda x: f"{x[0]:.2f} ({x[1]:.2f}-{x[2]:.2f})"
    high = [r for r in RATES if r >= 1]
    failed, collapsed = (
        [[label, *(shown(x) for x in shares(result, label, which)[-len(high) :])] for label in METHODS]
        for which in ("failed", "collapsed")
    )
    reached = [[label, *(f"{x[0]:.2f}" for x in shares(result, label, "reached"))] for label in METHODS]
    by_beta = [[label, *(_range(result, label, beta) for beta in BETAS)] for label in METHODS]
    return f"""Paper: GRPO is sensitive to the learning rate and the KL coefficient; GVPO is not.

Run: {SEEDS} seeds x beta in {", ".join(f"{b:g}" for b in BETAS)} at each rate, {STEPS} on-policy steps
of groups of {K}, plain gradient descent without clipping. A run fails if it overflows, or ends farther from
that beta's pi\\* than pi_ref is. The table has the share of failed runs over the three betas with 95 % Wilson
intervals. Below a rate of 1 only runs of MaxRL fail:

{table(["learning rate", *(f"{r:g}" for r in high)], failed)}

Share of collapsed runs (entropy below a quarter of that of pi\\*, or overflow). Below a rate of 1 no run collapses:

{table(["learning rate", *(f"{r:g}" for r in high)], collapsed)}

Share of runs that reach pi\\*, with at most a tenth of pi_ref's KL to it:

{table(["learning rate", *(f"{r:g}" for r in RATES)], reached)}

Rates at which at least 90 % of the seeds reach pi\\*, by beta:

{table(["beta", *(f"{b:g}" for b in BETAS)], by_beta)}

Shows: GRPO's highest working rate is about 30 times below GVPO's at each beta, because it divides by the
group's spread. Both limits fall as beta grows. On-policy and with beta in the reward, Dr. GRPO takes GVPO's
steps times (k-1)/k, so it is as stable as GVPO: dividing by the spread is what lowers GRPO's limit.
MaxRL has no beta and goes to the best response, which is nearer to pi\\* than pi_ref only for beta = 0.1.
At the rate 0.3 its runs are still on the way there and near that pi\\*.
Does not show: that GVPO needs no tuning. Its working rates span {_spans(result, "GVPO")} decades, and
GRPO's, which are lower, span {_spans(result, "GRPO")}. At low rates runs end before they reach pi\\*. Above
its range every run of GVPO fails or collapses, as with any gradient descent. At a low enough rate GRPO gets
near pi\\* too, down to the noise floor of claim 6.
"""


def _working(result: dict[str, Any], label: str, beta: float) -> list[float]:
    """Returns the rates at which at least 90 % of the seeds reach pi*."""
    return [r for r in RATES if result["cells"][f"{label}|{beta:g}|{r:g}"][1] >= 0.9 * SEEDS]


def _decades(result: dict[str, Any], label: str, beta: float) -> float:
    rates = _working(result, label, beta)
    return float(np.log10(rates[-1] / rates[0])) if rates else 0.0


def _spans(result: dict[str, Any], label: str) -> str:
    spans = [_decades(result, label, beta) for beta in BETAS]
    low, high = f"{min(spans):.1f}", f"{max(spans):.1f}"
    return low if low == high else f"{low} to {high}"


def _range(result: dict[str, Any], label: str, beta: float) -> str:
    rates = _working(result, label, beta)
    return f"{rates[0]:g} to {rates[-1]:g}" if rates else "none"


def holds(result: dict[str, Any]) -> dict[str, bool]:
    works = lambda label: sum(len(_working(result, label, b)) for b in BETAS)
    same = all(
        abs(result["cells"][f"GVPO|{b:g}|{r:g}"][1] - result["cells"][f"Dr. GRPO|{b:g}|{r:g}"][1]) <= 0.3 * SEEDS
        for b in BETAS
        for r in RATES
        if r >= 0.3
    )
    return {
        "GRPO's highest working rate is 30 times below GVPO's": all(
            29 < _working(result, "GVPO", b)[-1] / _working(result, "GRPO", b)[-1] < 34 for b in BETAS
        ),
        "GVPO's range is at least as wide": all(
            _decades(result, "GVPO", b) >= _decades(result, "GRPO", b) - 1e-9 for b in BETAS
        ),
        "below a rate of 1 only runs of MaxRL fail": all(
            result["cells"][f"{m}|{b:g}|{r:g}"][0] == 0
            for m in METHODS
            if m != "MaxRL"
            for b in BETAS
            for r in RATES
            if r < 1
        ),
        "Dr. GRPO is as stable as GVPO": abs(works("GVPO") - works("Dr. GRPO")) <= 1 and same,
        "above its range every run of GVPO fails or collapses": all(
            max(result["cells"][f"GVPO|{b:g}|{r:g}"][0], result["collapsed"][f"GVPO|{b:g}|{r:g}"]) == SEEDS
            for b in BETAS
            for r in RATES
            if r > _working(result, "GVPO", b)[-1]
        ),
        "below a rate of 1 no run collapses": not any(
            result["collapsed"][f"{m}|{b:g}|{r:g}"] for m in METHODS for b in BETAS for r in RATES if r < 1
        ),
        "no range begins at the lowest rate tried": all(
            _working(result, m, b)[0] > RATES[0] for m in ("GVPO", "Dr. GRPO", "GRPO") for b in BETAS
        ),
        "MaxRL is near the pi* of beta = 0.1 on the way": result["cells"]["MaxRL|0.1|0.3"][1] == SEEDS,
        "the best response is nearer to pi* than pi_ref only for beta = 0.1": all(
            (result["cells"][f"MaxRL|{b:g}|100"][0] == 0) == (b == 0.1) for b in BETAS
        ),
        "MaxRL fails at every rate for the larger betas": all(
            result["cells"][f"MaxRL|{b:g}|{r:g}"][0] >= 0.9 * SEEDS for b in BETAS[1:] for r in RATES if r >= 0.1
        ),
    }
