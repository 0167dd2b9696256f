"""Section 3.4: a loss without log Z has a wrong optimum."""

from typing import Any

import numpy as np

from evidence.page import number, table
from evidence.problem import BETA, LOG_REF, REFERENCE, REWARDS, distance, expected_step, softmax_log

CHEAP = True
TITLE = "3. A loss without log Z has another optimum (Section 3.4)"
SHIFTS = (-1.0, 0.0, 1.0, 3.0)  # added to every reward
STEPS, RATE = 4000, 0.5


def misaligned(logits: np.ndarray, rewards: np.ndarray) -> np.ndarray:
    """Returns the (P, Y) exact descent step of E (beta s - R)^2 / (2 beta) over responses of pi_ref."""
    log_pi = softmax_log(logits)
    c = REFERENCE * (rewards - BETA * (log_pi - LOG_REF))
    return c - np.exp(log_pi) * c.sum(axis=1, keepdims=True)


def multiplier(logits: np.ndarray, rewards: np.ndarray) -> np.ndarray:
    """Returns (P, Y) pi_ref (R - beta s) / pi, which is constant within a prompt at a stationary point of that loss."""
    log_pi = softmax_log(logits)
    return REFERENCE * (rewards - BETA * (log_pi - LOG_REF)) / np.exp(log_pi)


def run() -> dict[str, Any]:
    ends: dict[str, list[float]] = {"misaligned": [], "spread": [], "gvpo": []}
    for shift in SHIFTS:
        wrong, right = LOG_REF, LOG_REF
        for _ in range(STEPS):
            wrong = wrong + RATE * misaligned(wrong, REWARDS + shift)
        for _ in range(STEPS // 10):
            right = right + 10 * RATE * expected_step("gvpo", right, REFERENCE, k=2, rewards=REWARDS + shift)
        ends["misaligned"].append(distance(wrong))
        ends["spread"].append(float(np.ptp(multiplier(wrong, REWARDS + shift), axis=1).max()))
        ends["gvpo"].append(max(distance(right), 0.0))
    return {"ends": ends, "start": distance(LOG_REF)}


def draw(result: dict[str, Any], axes: Any) -> None:
    axes.plot(SHIFTS, result["ends"]["misaligned"], "s-", label="without log Z")
    axes.plot(SHIFTS, result["ends"]["gvpo"], "o-", label="GVPO")
    axes.axhline(result["start"], color="grey", linewidth=0.8, label="pi_ref")
    axes.set(xlabel="constant added to every reward", ylabel="KL(pi || pi*) at the end", title="Section 3.4")
    axes.legend(fontsize=8)


def text(result: dict[str, Any]) -> str:
    ends = result["ends"]
    rows = [
        ["E(beta s - R)^2, end of the descent", *map(number, ends["misaligned"])],
        ["GVPO", *map(number, ends["gvpo"])],
    ]
    return f"""Minimising E(beta log(pi / pi_ref) - R)^2 over normalised policies ends where pi_ref (R - beta s) =
lambda pi, not at pi\\*.

Run: {STEPS} exact steps over responses of pi_ref, with a constant added to every reward. pi\\* does not
depend on this constant. KL(pi || pi\\*) in nats; for pi_ref it is {number(result["start"])}:

{table(["constant", *(f"{s:+g}" for s in SHIFTS)], rows)}

Shows: the loss without log Z ends at its own optimum, where pi_ref (R - beta s) / pi is the same for all
responses of a prompt (spread at most {number(max(ends["spread"]))}). This optimum moves with the
constant. GVPO always ends at pi\\*.
Does not show: that the error is always large. If beta log Z happens to be near 0 the error is small:
{number(min(ends["misaligned"]))} at {SHIFTS[int(np.argmin(ends["misaligned"]))]:+g}.
"""


def holds(result: dict[str, Any]) -> dict[str, bool]:
    ends = result["ends"]
    return {
        "the descent ends at a stationary point": max(ends["spread"]) < 1e-6,
        "GVPO ends at pi*": max(ends["gvpo"]) < 1e-12,
        "the constant matters": max(ends["misaligned"]) > 2 * min(ends["misaligned"]) > 1e-3,
    }
