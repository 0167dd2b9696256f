"""The regret gauge: `gvpo_regret` compared with the true regret."""

from typing import Any

import numpy as np

from evidence.page import number, table
from evidence.problem import group_probabilities, kl, multisets, softmax_log
from gvpo_core import gvpo_regret

CHEAP = True
PANELS = 2
TITLE = "7. The regret gauge and the true regret"
SIZES = (2, 4, 8, 16)
BETAS = (2.0, 0.5, 0.2, 0.1, 0.05, 0.02)  # a smaller beta means a larger distance from pi_ref to pi*
PROBLEMS = {  # pi_ref and R: the best response is common or rare
    "common": (np.array([0.3, 0.25, 0.2, 0.15, 0.1]), np.array([0.0, 0.3, 0.6, 0.1, 0.5])),
    "rare": (np.array([0.5, 0.3, 0.15, 0.04, 0.01]), np.array([0.0, 0.2, 0.1, 0.5, 1.0])),
}


def gauge(problem: str, log_pi: np.ndarray, sampler: np.ndarray, beta: float, k: int) -> tuple[float, float]:
    """Returns the expected second order and series over all groups of k from the sampler."""
    reference, rewards = PROBLEMS[problem]
    rows, _ = multisets(len(log_pi), k)
    p = group_probabilities(sampler[None], k)[0]
    y, ids = rows.reshape(-1), np.repeat(np.arange(len(rows)), k)
    cells = (log_pi[y], np.log(reference)[y], rewards[y], ids)
    estimate = gvpo_regret(*cells, beta=beta, num_groups=len(rows))
    return float((p * estimate.group_second_order).sum()), float((p * estimate.group_series).sum())


def run() -> dict[str, Any]:
    out: dict[str, Any] = {}
    for problem, (reference, rewards) in PROBLEMS.items():
        log_ref, uniform = np.log(reference), np.full(5, 0.2)
        series_of: dict[str, list[float]] = {"distance": [], "second": [], "off_second": [], "off_series": []}
        series_of |= {f"series {k}": [] for k in SIZES} | {"spread": []}
        for beta in BETAS:
            distance = float(kl(log_ref, softmax_log(log_ref + rewards / beta)))
            true = beta * distance
            series_of["distance"].append(distance)
            of_sizes = {k: gauge(problem, log_ref, reference, beta, k) for k in SIZES}
            for k, (_, series) in of_sizes.items():
                series_of[f"series {k}"].append(series / true)
            seconds = [second / true for second, _ in of_sizes.values()]
            series_of["second"].append(seconds[-1])
            series_of["spread"].append(max(seconds) - min(seconds))
            second, series = gauge(problem, log_ref, uniform, beta, 16)
            series_of["off_second"].append(second / true)
            series_of["off_series"].append(series / true)
        way = []  # from pi_ref to pi* at beta = 0.1
        best = softmax_log(log_ref + rewards / 0.1)
        for share in (0.0, 0.5, 0.8, 0.95):
            log_pi = softmax_log((1 - share) * log_ref + share * best)
            second, series = gauge(problem, log_pi, np.exp(log_pi), 0.1, 8)
            true = 0.1 * float(kl(log_pi, best))
            way.append([second / true, series / true])
        out[problem] = series_of | {"way": way}
    return out


def draw(result: dict[str, Any], panels: Any) -> None:
    shown = {"on-policy": ("second", "series 16"), "responses of a uniform sampler": ("off_second", "off_series")}
    for axes, (title, keys) in zip(panels, shown.items(), strict=True):
        for problem, style in (("common", "o-"), ("rare", "s--")):
            for key, name in zip(keys, ("second order", "series, k = 16"), strict=True):
                curve = result[problem][key]
                axes.loglog(result[problem]["distance"], curve, style, label=f"{name}, best response {problem}")
        axes.axhspan(0.8, 1.25, color="grey", alpha=0.2)
        axes.set_yticks([0.25, 0.5, 1, 2, 4], ["0.25", "0.5", "1", "2", "4"])
        axes.minorticks_off()
        axes.set(xlabel="KL(pi || pi*), nats", ylabel="gauge / true regret", title=title, ylim=(0.2, 7))
    panels[0].legend(fontsize=7)


def text(result: dict[str, Any]) -> str:
    rows = []
    for problem in PROBLEMS:
        curves = result[problem]
        rows += [
            [f"{problem}: KL(pi \\|\\| pi\\*), nats", *map(number, curves["distance"])],
            ["second order, any k", *map(number, curves["second"])],
            *([f"series, k = {k}", *map(number, curves[f"series {k}"])] for k in (2, 16)),
            ["second order, uniform sampler", *map(number, curves["off_second"])],
            ["series, k = 16, uniform sampler", *map(number, curves["off_series"])],
        ]
    way = [
        [f"{problem}: {name}", *(number(x[i]) for x in result[problem]["way"])]
        for problem in PROBLEMS
        for i, name in enumerate(("second order", "series, k = 8"))
    ]
    return f"""`gvpo_regret` estimates beta KL(pi || pi\\*) = J(pi\\*) - J(pi): to second order as Var(w) / (2 beta),
and as the full series beta log mean exp(w / beta).

Run: pi = pi_ref over five responses, with exact expectations over all groups. The response with the highest
reward has probability 0.2 (common) or 0.01 (rare). A smaller beta moves pi\\* away from pi_ref. The table
has gauge / true regret:

{table(["beta", *(f"{b:g}" for b in BETAS)], rows)}

On the way from pi_ref to pi\\* at beta = 0.1, after pi's logits have covered this share of the way:

{table(["share", "0", "0.5", "0.8", "0.95"], way)}

Shows: the second order does not depend on k. If good responses are common, it is within a tenth of the
true regret up to a KL of 0.6 nats, and too high beyond. The series is too low by about 1/k near pi\\*. If
the best response is rare, both report only a fraction of the true regret: a response that is in no group
cannot be seen, and the reported regret rises when the policy finds it. A falling gauge can be trusted near
pi\\* (share 0.95: within a fifth). A low gauge at the start does not mean that there is little to gain.
Does not show: a regret off-policy. If the best response is rare, gauge / true regret with a uniform sampler is at most
{max(result["rare"]["off_second"]):.1f} in second order and {max(result["rare"]["off_series"]):.1f} in the series.
"""


def holds(result: dict[str, Any]) -> dict[str, bool]:
    common, rare = result["common"], result["rare"]
    second, far = np.array(common["second"]), np.array(common["distance"])
    return {
        "common: within a tenth up to 0.65 nats, then too high": bool(
            (np.abs(second - 1)[far < 0.65] < 0.1).all() and second[-1] > 1.5
        ),
        "the series is too low by about 1/k near pi*": all(
            abs(common[f"series {k}"][0] - (1 - 1 / k)) < 0.02 for k in SIZES
        ),
        "rare: a fraction": max(rare["second"][3], rare["series 16"][3]) < 0.5,
        "share 0.95 within a fifth": all(abs(x - 1) < 0.2 for p in PROBLEMS for x in result[p]["way"][-1]),
        "off-policy is another number": max(rare["off_second"]) > 3 and max(rare["off_series"]) > 3,
        "the second order does not depend on k": max(common["spread"] + rare["spread"]) < 1e-9,
    }
