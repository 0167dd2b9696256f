"""Section 3.5: the three parts of GVPO's loss during training, and which part keeps the entropy."""

from typing import Any

import numpy as np

from evidence.page import number, table
from evidence.problem import (
    BETA,
    LOG_REF,
    REFERENCE,
    REWARDS,
    distance,
    entropy,
    expected_step,
    group_probabilities,
    kl,
    multisets,
    optimum,
    softmax_log,
)
from gvpo_core import gvpo_coefficients, gvpo_loss

CHEAP = False
TITLE = "4. The variance term keeps the entropy (Section 3.5)"
STEPS, RATE, K = 400, 5.0, 4
PARTS = ("Var(beta s)", "Var(R)", "Cov(beta s, R)", "loss")
BONUSES = (0.05, 0.2, 1.0, 4.0)
PANELS = 2


def without_variance(
    logprobs: np.ndarray, ref_logprobs: np.ndarray, old: Any, rewards: np.ndarray, ids: Any, **options: Any
) -> np.ndarray:
    """Returns GVPO's step without Var(log pi_theta) of Eq. 17, which leaves D(R) + beta D(log pi_ref)."""
    return np.asarray(gvpo_coefficients(0 * logprobs, ref_logprobs, rewards, ids, **options))


def parts(logits: np.ndarray) -> list[float]:
    """Returns expected Var(beta s), Var(R), Cov(beta s, R) and loss over all on-policy groups of K."""
    rows, _ = multisets(REFERENCE.shape[1], K)
    log_pi, p = softmax_log(logits), group_probabilities(np.exp(softmax_log(logits)), K).reshape(-1)
    x, y = np.repeat(np.arange(len(logits)), rows.size), np.tile(rows.reshape(-1), len(logits))
    ids = np.repeat(np.arange(len(p)), K)
    loss = gvpo_loss(log_pi[x, y], LOG_REF[x, y], REWARDS[x, y], ids, beta=BETA, num_groups=len(p))
    fields = (loss.group_implicit_variance, loss.group_reward_variance, loss.group_covariance, loss.group_loss)
    return [float((p * np.asarray(f)).sum() / len(logits)) for f in fields]


def entropy_bonus(logits: np.ndarray) -> np.ndarray:
    """Returns the (P, Y) gradient of the mean entropy with respect to the logits."""
    log_pi = softmax_log(logits)
    p = np.exp(log_pi)
    return -p * (log_pi + entropy(logits)[:, None]) / len(logits)


def descend(method: str, bonus: float = 0.0) -> tuple[np.ndarray, list[list[float]], list[float]]:
    """Returns the final logits, and the loss's parts and mean entropy at each step; on-policy, exact expectations."""
    logits, of_step, path = LOG_REF, [], []
    for _ in range(STEPS):
        if method == "gvpo" and not bonus:
            of_step.append(parts(logits))
        path.append(float(entropy(logits).mean()))
        pi = np.exp(softmax_log(logits))
        coefficients = without_variance if method == "no variance" else None
        name, beta = {"grpo": ("grpo", 0.0), "grpo kl": ("grpo", BETA)}.get(method, ("gvpo", BETA))
        step = expected_step(name, logits, pi, k=K, beta=beta, coefficients=coefficients)
        logits = logits + RATE * (step + bonus * entropy_bonus(logits))
    return logits, of_step, [*path, float(entropy(logits).mean())]


def run() -> dict[str, Any]:
    runs = {"GVPO": ("gvpo", 0.0), "GVPO without the variance": ("no variance", 0.0), "GRPO, beta = 0": ("grpo", 0.0)}
    runs |= {f"GRPO, beta = 0, bonus {b:g}": ("grpo", b) for b in BONUSES}
    runs |= {f"GRPO, beta = {BETA}": ("grpo kl", 0.0)}
    runs |= {f"GVPO, bonus {b:g}": ("gvpo", b) for b in BONUSES[1:3]}
    ends, curves, predicted, of_step = {}, {}, {}, []
    for label, (method, bonus) in runs.items():
        logits, metrics, path = descend(method, bonus)
        if method == "gvpo":  # Eq. 20 and 21 with the bonus: R - beta log pi / pi_ref - bonus log pi is constant
            goal = softmax_log((REWARDS + BETA * LOG_REF) / (BETA + bonus))
            predicted[label] = max(float(kl(softmax_log(logits), goal).mean()), 0.0)
        of_step = metrics or of_step
        top = np.exp(softmax_log(logits)).max(axis=1).mean()
        value = (np.exp(softmax_log(logits)) * REWARDS).sum(axis=1).mean()
        ends[label] = [path[-1], float(top), float(value), max(distance(logits), 0.0)]
        curves[label] = path[::4]
    return {
        "ends": ends,
        "curves": curves,
        "predicted": predicted,
        "parts": of_step[:40],
        "entropies": [float(entropy(LOG_REF).mean()), float(entropy(np.log(optimum())).mean())],
    }


def draw(result: dict[str, Any], panels: Any) -> None:
    left, right = panels
    for i, (name, style) in enumerate(zip(PARTS, ("-", "--", "-.", ":"), strict=True)):
        left.plot([x[i] for x in result["parts"]], style, label=name)
    left.set(xlabel="step", ylabel="reward^2", title="parts of GVPO's loss")
    left.legend(fontsize=8)
    for label, path in result["curves"].items():
        right.plot(4 * np.arange(len(path)), path, label=label, linestyle="-" if "GVPO" in label else "--")
    right.set(xlabel="step", ylabel="entropy, nats", title="entropy on-policy", ylim=(0, 1.75))
    right.legend(fontsize=6, ncols=2)


def text(result: dict[str, Any]) -> str:
    rows = [[label, *map(number, values)] for label, values in result["ends"].items()]
    shown = [0, 5, 10, 20, 39]
    of_step = [[name, *(number(result["parts"][i][j]) for i in shown)] for j, name in enumerate(PARTS)]
    start, end = result["entropies"]
    return f"""loss = Var(beta s) + Var(R) - 2 Cov(beta s, R) (Eq. 17): the covariance pulls the policy towards the
reward, and Var(beta s) holds it back.

Run: {STEPS} exact on-policy steps in groups of {K}. The parts of GVPO's loss by step, in reward^2:

{table(["step", *map(str, shown)], of_step)}

Policies at the end. The entropy of pi_ref is {start:.2f} nats, that of pi\\* {end:.2f}:

{table(["", "entropy", "largest pi(y)", "reward", "KL to pi*"], rows)}

Shows: at pi\\* the covariance equals both variances, so the loss is 0. Without the variance term
nothing stops the covariance, and GVPO collapses to the response with the largest R + beta log pi_ref, here
the best one. GRPO without KL collapses, even with an entropy bonus of 0.2. With a bonus of 4 its entropy is
higher than that of pi\\*, so the coefficient decides. GRPO with the KL penalty does not collapse. GVPO needs
no bonus: with a bonus b it ends at pi_ref^(beta / (beta + b)) exp(R / (beta + b)), normalised, which is not
pi\\*.
Does not show: that an entropy bonus cannot work. Some bonus between 1 and 4 gives the entropy of pi\\*. It also
does not show that a collapse costs reward: without KL, always giving the best response has the highest
reward, and beta = 0 asks for that. GVPO's beta must be chosen too.
"""


def holds(result: dict[str, Any]) -> dict[str, bool]:
    ends, (_, end) = result["ends"], result["entropies"]
    variance, reward, covariance, loss = result["parts"][-1]
    return {
        "the parts meet at pi*": loss < 1e-5 and abs(variance - covariance) + abs(reward - covariance) < 1e-3,
        "GVPO keeps pi*'s entropy": abs(ends["GVPO"][0] - end) < 1e-6,
        "without the variance it collapses": ends["GVPO without the variance"][0] < 0.1,
        "GRPO collapses": ends["GRPO, beta = 0"][0] < 0.1,
        "a bonus of 0.2 does not prevent it": ends["GRPO, beta = 0, bonus 0.2"][0] < 0.1,
        "pi*'s entropy lies between those of a bonus of 1 and of 4": ends["GRPO, beta = 0, bonus 1"][0]
        < end
        < ends["GRPO, beta = 0, bonus 4"][0],
        "GRPO with KL does not collapse": ends[f"GRPO, beta = {BETA}"][0] > 0.9 * end,
        "it collapses on the best response": ends["GVPO without the variance"][2] > 0.99 * REWARDS.max(axis=1).mean()
        and bool(((REWARDS + BETA * LOG_REF).argmax(axis=1) == REWARDS.argmax(axis=1)).all()),
        "GVPO with a bonus ends where predicted": max(result["predicted"].values()) < 1e-9,
        "which is not pi*": min(ends[f"GVPO, bonus {b:g}"][3] for b in BONUSES[1:3]) > 1e-3,
    }
