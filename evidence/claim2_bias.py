"""Theorem 3.3 and Corollary 3.4: 1/(k-1) is unbiased, 1/k is not."""

from typing import Any

import numpy as np

from evidence.page import number, table
from evidence.problem import BETA, LOG_REF, REWARDS, group_probabilities, multisets, softmax_log
from gvpo_core import gvpo_loss, gvpo_weights

CHEAP = True
TITLE = "2. 1/(k-1) is unbiased, 1/k is not (Theorem 3.3, Corollary 3.4)"
SIZES = tuple(range(2, 17))
MIXED = (2, 4, 16)  # one prompt of each size
THETA = softmax_log(np.array([0.4, -0.2, 0.1, -0.9]))
SAMPLER = np.array([0.4, 0.15, 0.1, 0.35])
REF, REWARD = softmax_log(LOG_REF[0, :4]), REWARDS[0, :4] * 4


def exact() -> float:
    """Returns Eq. 14: the variance of implicit minus actual reward under the sampler."""
    d = BETA * (THETA - REF) - REWARD
    return float((SAMPLER * (d - (SAMPLER * d).sum()) ** 2).sum())


def estimates(*sizes: int) -> tuple[float, float, float]:
    """Computes the contribution of one prompt of each group size, averaged over the sizes, in one call.

    Returns: the expectation of Eq. 16 over all groups that the sampler can draw; its standard deviation (if all groups
      have one size); the expectation of the same sum divided by k.
    """
    groups = [row for k in sizes for row in multisets(4, k)[0]]
    p = np.concatenate([group_probabilities(SAMPLER[None], k)[0] for k in sizes])
    k = np.array([len(row) for row in groups])
    y, ids = np.concatenate(groups), np.repeat(np.arange(len(groups)), k)
    loss = gvpo_loss(THETA[y], REF[y], REWARD[y], ids, beta=BETA, num_groups=len(groups)).group_loss
    weights = gvpo_weights(THETA[y], REF[y], REWARD[y], ids, beta=BETA, num_groups=len(groups))
    mean = float((p * loss).sum()) / len(sizes)
    over_k = float((p * np.bincount(ids, weights**2) / k).sum()) / len(sizes)
    return mean, float(np.sqrt((p * (loss - mean) ** 2).sum())), over_k


def run() -> dict[str, Any]:
    by_size, mixed = [estimates(k) for k in SIZES], estimates(*MIXED)
    columns = {name: [x[i] for x in by_size] for i, name in enumerate(("mean", "deviation", "mean_over_k"))}
    return {"exact": exact(), **columns, "mixed": [mixed[0], mixed[2]]}


def draw(result: dict[str, Any], axes: Any) -> None:
    exact_loss = result["exact"]
    axes.plot(SIZES, np.array(result["mean"]) / exact_loss, "o-", label="1/(k-1)")
    axes.plot(SIZES, np.array(result["mean_over_k"]) / exact_loss, "s-", label="1/k")
    axes.set(xlabel="k", ylabel="expected estimate / Eq. 14", ylim=(0.4, 1.1), title="bias of the group loss")
    axes.legend(fontsize=8)


def text(result: dict[str, Any]) -> str:
    exact_loss = result["exact"]
    shown = (2, 3, 4, 8, 16)
    at = lambda key: [result[key][SIZES.index(k)] for k in shown]
    rows = [
        ["1/(k-1), Eq. 15: bias", *(number(x / exact_loss - 1) for x in at("mean"))],
        ["1/k: bias", *(f"{100 * (x / exact_loss - 1):.0f} %" for x in at("mean_over_k"))],
        ["standard deviation of one group / Eq. 14", *(number(x / exact_loss) for x in at("deviation"))],
    ]
    unbiased, biased = result["mixed"]
    return f"""The expectation of the estimate with 1/(k-1) is Eq. 14 for every k. With 1/k it is (k-1)/k of Eq. 14.

Run: `gvpo_loss` over every group of k = 2..16 from four responses, weighted by its probability.

{table(["k", *map(str, shown)], rows)}

Shows: the relative bias of 1/k is exactly -1/k, half of the loss at k = 2. With prompts of 2, 4 and 16
responses in one call, Eq. 16 has a bias of {number(unbiased / exact_loss - 1)}, and 1/k(x) is
{100 * (1 - biased / exact_loss):.0f} % too low, mostly because of the smallest group. If all groups have
one size, the bias only changes the learning rate. With mixed sizes it changes the weight of each prompt.
It does not move the optimum, where every group's loss is 0.
Does not show: that 1/(k-1) has less noise. At k = 2 the standard deviation of a group's estimate is larger
than its mean.
"""


def holds(result: dict[str, Any]) -> dict[str, bool]:
    means, over_k = np.array(result["mean"]), np.array(result["mean_over_k"])
    sizes = np.array(SIZES)
    return {
        "1/(k-1) is exact": bool(np.abs(means / result["exact"] - 1).max() < 1e-12),
        "1/k is low by 1/k": bool(np.abs(over_k / result["exact"] - (1 - 1 / sizes)).max() < 1e-12),
        "noise at k = 2 exceeds the mean": result["deviation"][0] > result["exact"],
        "mixed": abs(result["mixed"][0] / result["exact"] - 1) < 1e-12 < 0.1 < 1 - result["mixed"][1] / result["exact"],
    }
