"""GVPO++: distillation to the teacher from any sampler, and weights f = |y|^-alpha of responses."""

from typing import Any

import numpy as np

from evidence.page import number, table
from evidence.problem import BETA, LOG_REF, REFERENCE, REWARDS, expected_step, kl, optimum, softmax_log

CHEAP = False
TITLE = "8. GVPO++: distillation, and weights of responses"
TEACHER = np.log(np.array([[0.05, 0.1, 0.15, 0.3, 0.4], [0.5, 0.2, 0.15, 0.1, 0.05], [0.02, 0.08, 0.1, 0.2, 0.6]]))
LENGTHS = np.array([2.0, 4.0, 8.0, 16.0, 32.0])
ALPHAS = (0.0, 0.5, 1.0)
SAMPLERS = ("own", "pi_ref", "teacher", "uniform")
STEPS, RATE = 400, 8.0


def weighted_optimum(alpha: float) -> np.ndarray:
    """Returns (P, Y) log pi_ref exp((R + c) / (beta f)). Bisection finds the c for which it sums to 1."""
    f = LENGTHS**-alpha
    out = []
    for log_ref, rewards in zip(LOG_REF, REWARDS, strict=True):
        low, high = -60.0, 60.0
        for _ in range(200):
            c = (low + high) / 2
            low, high = (low, c) if np.logaddexp.reduce(log_ref + (rewards + c) / (BETA * f)) > 0 else (c, high)
        out.append(log_ref + (rewards + c) / (BETA * f))
    return np.array(out)


def descend(
    sampler: str, alpha: float, reference: np.ndarray, rewards: np.ndarray, goal: np.ndarray, beta: float
) -> list[float]:
    """Returns KL(pi || goal) before each exact step and at the end.

    Groups of 4, from pi_ref. The learning rate is scaled by 1 / f^2.
    """
    f = LENGTHS**-alpha
    logits, path = LOG_REF, []
    for _ in range(STEPS * (1 if alpha == 0 else 10)):
        path.append(float(kl(softmax_log(logits), goal).mean()))
        pi = np.exp(softmax_log(logits))
        draws = {"own": pi, "pi_ref": REFERENCE, "teacher": np.exp(TEACHER), "uniform": np.full_like(pi, 0.2)}[sampler]
        options: dict[str, Any] = {"beta": beta, "rewards": rewards, "log_ref": reference}
        step = expected_step("gvpo", logits, draws, weights=f if alpha else None, **options)
        logits = logits + RATE / beta / float((f**2).mean()) ** 0.5 * step * BETA
    return [*path, float(kl(softmax_log(logits), goal).mean())]


def run() -> dict[str, Any]:
    distilled, curves, rewarded = {}, {}, {}
    for sampler in SAMPLERS:
        for alpha in ALPHAS:
            path = descend(sampler, alpha, TEACHER, 0 * REWARDS, TEACHER, 1.0)
            distilled[f"{sampler}|{alpha:g}"] = max(path[-1], 0.0)
            curves[f"{sampler}|{alpha:g}"] = [max(x, 1e-17) for x in path[:300:5]]
    for alpha in ALPHAS:
        goal = weighted_optimum(alpha)
        path = descend("pi_ref", alpha, LOG_REF, REWARDS, goal, BETA)
        moved = float(kl(goal, np.log(optimum())).mean())
        length = float((np.exp(goal) * LENGTHS).sum(axis=1).mean())
        rewarded[f"{alpha:g}"] = [max(path[-1], 0.0), max(moved, 0.0), length]
    start = float(kl(LOG_REF, TEACHER).mean())
    return {"distilled": distilled, "curves": curves, "rewarded": rewarded, "start": start}


def draw(result: dict[str, Any], axes: Any) -> None:
    for i, sampler in enumerate(SAMPLERS):
        for alpha, style in zip(ALPHAS, ("-", "--", ":"), strict=True):
            path = result["curves"][f"{sampler}|{alpha:g}"]
            label = f"{sampler} draws" if alpha == 0 else None
            axes.semilogy(5 * np.arange(len(path)), path, style, color=f"C{i}", label=label)
    for alpha, style in zip(ALPHAS, ("-", "--", ":"), strict=True):
        axes.plot([], [], style, color="grey", label=f"alpha = {alpha:g}")
    axes.set(xlabel="step", ylabel="KL(pi || teacher), nats", title="distillation, R = 0", ylim=(1e-16, 3))
    axes.legend(fontsize=6, ncols=2)


def text(result: dict[str, Any]) -> str:
    rows = [[s, *(number(result["distilled"][f"{s}|{a:g}"]) for a in ALPHAS)] for s in SAMPLERS]
    reward_rows = [[f"{a:g}", *(number(x) for x in result["rewarded"][f"{a:g}"])] for a in ALPHAS]
    header = ["alpha", "KL(pi \\|\\| its optimum)", "KL(its optimum \\|\\| pi\\*)", "tokens"]
    return f"""With a teacher as reference and R = 0, the teacher is the only minimum, for any sampler and any weights
f > 0 (arXiv 2609.21432).

Run: exact steps in groups of 4 from pi_ref; KL(pi_ref || teacher) is {number(result["start"])} nats. There
are {STEPS} steps with alpha = 0 and {10 * STEPS} otherwise. f = n^-alpha for responses of n =
{", ".join(f"{n:g}" for n in LENGTHS)} tokens. KL(pi || teacher) at the end:

{table(["sampler", *(f"alpha = {a:g}" for a in ALPHAS)], rows)}

With rewards, beta = {BETA} and responses of pi_ref, the optimum is pi_ref exp((R + c) / (beta f)). The table
has the KL of pi to this optimum, the KL of the optimum to pi\\*, and the optimum's mean length in tokens:

{table(header, reward_rows)}

Shows: the student becomes the teacher with every sampler, and f does not move this optimum. With rewards
f moves the optimum: a small f makes implicit reward cheap, so long responses can move farther from pi_ref, up
if R + c > 0 and down otherwise.
Does not show: speed. With alpha = 1 the smallest f is 1/{LENGTHS.max():g}, and the descent in its direction
is that much slower.
"""


def holds(result: dict[str, Any]) -> dict[str, bool]:
    rewarded = result["rewarded"]
    return {
        "the student is the teacher": max(result["distilled"].values()) < 1e-3,
        "alpha = 0 to rounding": max(result["distilled"][f"{s}|0"] for s in SAMPLERS) < 1e-12,
        "each alpha ends at its optimum": max(x[0] for x in rewarded.values()) < 1e-2,
        "f moves the optimum with rewards": rewarded["1"][1] > 1e-2 and rewarded["0"][1] < 1e-12,
    }
