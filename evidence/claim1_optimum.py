"""Theorem 3.1 and Corollary 3.2: one optimum for any sampler."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from evidence.page import number, table
from evidence.problem import (
    BETA,
    LOG_REF,
    PROMPTS,
    REFERENCE,
    RESPONSES,
    REWARDS,
    distance,
    expected_step,
    optimum,
    softmax_log,
)
from gvpo_core import dpo_loss, gvpo_loss

CHEAP = False
TITLE = "1. One optimum from any sampler (Theorem 3.1, Corollary 3.2)"
STEPS, RATE, STALE = 600, 10.0, 16
CUT = 3  # the response that the sampler "cut" never draws
SAMPLERS = ("own", "pi_ref", "uniform", "stale", "mixture", "cut")
# name in the table -> objective, whether its ratio uses the sampler's log-probabilities, learning rate
METHODS: dict[str, tuple[str, bool, float]] = {
    "GVPO": ("gvpo", False, RATE),
    "TBA": ("trajectory_balance", False, RATE),
    "Kimi's mirror descent": ("mirror_descent", False, RATE),
    "A*-PO": ("a_star_po", True, RATE),
    "RLOO, no ratio": ("rloo", False, RATE),
    "RLOO, PPO's ratio": ("rloo", True, RATE),
    "GRPO, no ratio": ("grpo", False, RATE / 4),
    "GRPO, PPO's ratio": ("grpo", True, RATE / 4),
    "MaxRL": ("maxrl", False, RATE / 4),
    "reject sampling": ("reject_sampling", False, RATE / 4),
    "DPO": ("dpo", False, RATE),
}


def descend(name: str, sampler: str, ratio: bool, rate: float, steps: int = STEPS) -> tuple[np.ndarray, list[float]]:
    """Returns (P, Y) logits after exact steps in groups of 4 from pi_ref, and KL(pi || pi*) before each step."""
    logits, history, path = LOG_REF, [LOG_REF], []
    cut = np.where(np.arange(RESPONSES) == CUT, 0.0, REFERENCE)
    for _ in range(steps):
        path.append(distance(logits))
        pi = np.exp(softmax_log(logits))
        draws = {
            "own": pi,
            "pi_ref": REFERENCE,
            "uniform": np.full_like(pi, 1 / RESPONSES),
            "stale": np.exp(softmax_log(history[0])),
            "mixture": (pi + REFERENCE) / 2,
            "cut": cut / cut.sum(axis=1, keepdims=True),
        }[sampler]
        log_old = np.log(np.where(draws > 0, draws, pi)) if ratio else None  # never drawn: weight 0
        logits = logits + rate * expected_step(name, logits, draws, log_old=log_old)
        history = [*history[-STALE:], logits]
    return logits, [*path, distance(logits)]


def two_minimisers_of_dpo() -> dict[str, float]:
    """Returns DPO's and GVPO's loss at two policies, and the policies' KL to pi*.

    DPO's data are the pairs a-b and c-d only, each labelled 3 to 1. The policies have the same log-ratios within {a, b}
    and within {c, d}. They differ in the probability of the two pairs.
    """
    margin = np.log(3) / BETA
    s = np.array([margin, 0.0, margin, 0.0])
    reference = np.full(4, 0.25)
    log_pi = [softmax_log(np.log(reference) + s + shift * np.array([1, 1, 0, 0])) for shift in (0.0, 3.0)]
    rows, ids = np.array([0, 1] * 4 + [2, 3] * 4), np.repeat(np.arange(8), 2)
    rewards = np.array([1.0, 0.0] * 3 + [0.0, 1.0] + [1.0, 0.0] * 3 + [0.0, 1.0])
    reward_of = BETA * s  # the reward for which the first policy is pi*
    everyone = np.arange(4)
    values: dict[str, float] = {}
    for name, now in zip(("first", "second"), log_pi, strict=True):
        values[f"dpo_{name}"] = float(dpo_loss(now[rows], np.log(reference)[rows], rewards, ids, beta=BETA))
        group = gvpo_loss(now, np.log(reference), reward_of, 0 * everyone, beta=BETA)
        values[f"gvpo_{name}"] = float(group.loss)
        values[f"kl_{name}"] = float((np.exp(now) * (now - log_pi[0])).sum())
    return values


def own_loop(steps: int = 250) -> float:
    """Returns KL to pi* after a run of `gvpo.train` itself, on-policy with sampled groups of 16."""
    import contextlib
    import io

    from gvpo_core.training.config import (
        Config,
        DataConfig,
        ObjectiveConfig,
        OptimizerConfig,
        RewardConfig,
        RolloutConfig,
        RunConfig,
    )
    from gvpo_core.training.loop import train
    from gvpo_core.training.policy.table import TablePolicy

    prompts, responses = [f"p{i}" for i in range(PROMPTS)], [f"r{i}" for i in range(RESPONSES)]
    optimizer = OptimizerConfig(learning_rate=12.0, max_gradient_norm=0.0)
    rows = {p: dict(zip(responses, row, strict=True)) for p, row in zip(prompts, REFERENCE.tolist(), strict=True)}
    policy = TablePolicy(rows, optimizer)

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [float(REWARDS[int(p[1:]), int(c[1:])]) for p, c in zip(prompts, completions, strict=True)]

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config = Config(
            run=RunConfig(folder=str(Path(folder) / "run"), backend="table", steps=steps, checkpoint_every=0),
            data=DataConfig(train="given"),
            rollout=RolloutConfig(prompts=PROMPTS, responses=16, max_tokens=2),
            objective=ObjectiveConfig(beta=BETA),
            optimizer=optimizer,
            rewards={"value": RewardConfig(function="given")},
        )
        train(config, policy, train_rows=[{"prompt": p} for p in prompts], rewards={"value": reward})
    return distance(policy.logits)


def run() -> dict[str, Any]:
    ends, curves = {}, {}
    for label, (name, ratio, rate) in METHODS.items():
        for sampler in SAMPLERS:
            logits, path = descend(name, sampler, ratio, rate)
            value = float((np.exp(softmax_log(logits)) * REWARDS).sum(axis=1).mean())
            ends[f"{label}|{sampler}"] = [max(path[-1], 0.0), value]
            if label == "GVPO":
                curves[sampler] = [max(x, 1e-17) for x in path[:61]]
    return {
        "ends": ends,
        "curves": curves,
        "start": distance(LOG_REF),
        "mirror_predicted": distance(LOG_REF + 3 / 4 * REWARDS / BETA),
        "best_response": float(-np.log(optimum())[np.arange(PROMPTS), REWARDS.argmax(axis=1)].mean()),
        "reward_of_the_optimum": float((optimum() * REWARDS).sum(axis=1).mean()),
        "dpo": two_minimisers_of_dpo(),
        "own_loop": own_loop(),
    }


def draw(result: dict[str, Any], axes: Any) -> None:
    for sampler, path in result["curves"].items():
        axes.semilogy(path, label=sampler, linestyle="--" if sampler == "cut" else "-")
    title = "GVPO from six samplers (cut: without one response)"
    axes.set(xlabel="step", ylabel="KL(pi || pi*), nats", ylim=(1e-16, 1))
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)


def text(result: dict[str, Any]) -> str:
    rows = [[label, *(number(result["ends"][f"{label}|{s}"][0]) for s in SAMPLERS)] for label in METHODS]
    dpo = result["dpo"]
    return f"""GVPO's loss has one minimum, pi\\* = pi_ref exp(R / beta) / Z, for every sampler that covers pi_ref.

Run: {STEPS} exact expected steps in groups of 4, from pi_ref, with beta = {BETA}. KL(pi_ref || pi\\*) is
{number(result["start"])} nats. The samplers are the policy itself (own), pi_ref, uniform, the policy of
{STALE} steps ago (stale), half policy and half pi_ref (mixture), and pi_ref without one response (cut).
The table has KL(pi || pi\\*) at the end. The regret in J is beta times this KL. Values below 1e-12 are
rounding errors, shown as 0:

{table(["", *SAMPLERS], rows)}

Shows: GVPO and TBA reach pi\\* from every sampler that covers pi_ref. With the cut support they end
elsewhere, as the corollary's condition predicts. Sampled groups of 16 in `gvpo.train` also end at
pi\\*: KL {number(result["own_loop"])} after 250 steps. RLOO with the KL penalty in the reward and
without a ratio takes exactly GVPO's steps (Eq. 20 and 21). With PPO's clipped ratio it reaches pi\\* only
on-policy: off-policy, its KL penalty is computed with the sampler's log-probabilities. On-policy, GRPO
ends near pi\\* but not at it: it divides by the group's spread, so its expected step at pi\\* is not
zero. On-policy, mirror descent ends at pi_ref exp((k-1)/k R / beta), because its mean reward includes the
response itself. A*-PO reaches pi\\* from responses of the policy, new or old. From the other samplers its
estimate of V is wrong in groups of 4. MaxRL, DPO and on-policy reject sampling go to the best response,
whose KL is {number(result["best_response"], 3)}. With the cut support MaxRL and DPO go to the best of
the other responses.

DPO has several minimisers. On the pairs a-b and c-d, labelled 3 to 1, two policies have the losses
{dpo["dpo_first"]:.6f} and {dpo["dpo_second"]:.6f}. Their KL to pi\\* is {number(dpo["kl_first"])} and
{number(dpo["kl_second"])}. Both losses are the lowest possible one, the entropy of the 3 to 1 labels.
GVPO's loss on a group of all four responses separates the two policies:
{number(dpo["gvpo_first"])} and {number(dpo["gvpo_second"])}. With groups of a-b and c-d only, GVPO would
have several minimisers too. Its minimum is unique because a group can hold any responses of the sampler.
"""


def holds(result: dict[str, Any]) -> dict[str, bool]:
    end = lambda label, sampler: result["ends"][f"{label}|{sampler}"][0]
    covered, start, dpo = SAMPLERS[:-1], result["start"], result["dpo"]
    return {
        "GVPO and TBA reach pi* from every covering sampler": all(
            end(m, s) < 1e-12 for m in ("GVPO", "TBA") for s in covered
        ),
        "a cut support ends elsewhere": end("GVPO", "cut") > 1e-4,
        "train reaches pi*": result["own_loop"] < 1e-9,
        "RLOO without ratio is GVPO": all(abs(end("RLOO, no ratio", s) - end("GVPO", s)) < 1e-12 for s in SAMPLERS),
        "RLOO with the ratio: on-policy only": end("RLOO, PPO's ratio", "own") < 1e-12
        and all(end("RLOO, PPO's ratio", s) > 1e-4 for s in covered[1:]),
        "GRPO is near pi* on-policy, not at it": 1e-4 < end("GRPO, no ratio", "own") < start,
        "A*-PO reaches pi* only from responses of the policy": max(end("A*-PO", s) for s in ("own", "stale")) < 1e-12
        and min(end("A*-PO", s) for s in ("pi_ref", "uniform", "mixture")) > 1e-4,
        "MaxRL, reject sampling, DPO go to the best response": all(
            0.95 < end(m, "own") / result["best_response"] < 1.001 for m in ("MaxRL", "reject sampling", "DPO")
        ),
        "mirror descent ends where predicted": abs(end("Kimi's mirror descent", "own") - result["mirror_predicted"])
        < 1e-12,
        "DPO: two minimisers": abs(dpo["dpo_first"] - dpo["dpo_second"]) < 1e-12 and dpo["kl_second"] > 0.1,
        "DPO: both are minimisers": abs(dpo["dpo_first"] + 0.75 * np.log(0.75) + 0.25 * np.log(0.25)) < 1e-12,
        "GVPO separates them": dpo["gvpo_first"] < 1e-12 < 0.1 < dpo["gvpo_second"],
    }
