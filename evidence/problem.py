"""The policies of the experiments: softmax tables, for which optimum, KL and regret are exact sums.

`expected_step` is the exact expectation of an objective's step over all groups of k responses that a sampler can draw.
One call of `objective_coefficients` gets each multiset of k responses as a group, weighted by its probability.
`sampled_steps` samples the groups instead, for many seeds at once.
"""

import math
from collections.abc import Callable
from functools import cache
from itertools import combinations_with_replacement
from typing import Any

import numpy as np

from gvpo_core import objective_coefficients

BETA = 0.5
REFERENCE = np.array([[0.30, 0.25, 0.20, 0.15, 0.10], [0.2, 0.2, 0.2, 0.2, 0.2], [0.10, 0.15, 0.35, 0.25, 0.15]])
REWARDS = np.array([[0.0, 0.3, 0.6, 0.1, 0.5], [1.0, 0.8, 0.6, 0.4, 0.7], [0.2, 0.2, 0.0, 0.4, 0.3]])
PROMPTS, RESPONSES = REFERENCE.shape
LOG_REF = np.log(REFERENCE)


def softmax_log(logits: np.ndarray) -> np.ndarray:
    """Returns the log-probabilities of (..., Y) logits."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def optimum(beta: float = BETA, rewards: np.ndarray = REWARDS) -> np.ndarray:
    """Returns (P, Y) pi* of Eq. 6."""
    return np.exp(softmax_log(LOG_REF + rewards / beta))


def kl(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """Returns KL(p || q) in nats, (..., Y) -> (...)."""
    p = np.exp(log_p)
    result: np.ndarray = np.where(p > 0, p * (log_p - log_q), 0.0).sum(axis=-1)
    return result


def distance(logits: np.ndarray, beta: float = BETA) -> float:
    """Returns the mean of KL(pi || pi*) over the prompts. The regret of Eq. 5 is beta times this."""
    return float(kl(softmax_log(logits), np.log(optimum(beta))).mean())


def entropy(logits: np.ndarray) -> np.ndarray:
    """Returns the entropy in nats, (..., Y) -> (...)."""
    log_pi = softmax_log(logits)
    result: np.ndarray = -(np.exp(log_pi) * log_pi).sum(axis=-1)
    return result


@cache
def multisets(responses: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (M, k) all multisets of k responses, and (M,) the number of orders in which each can be drawn."""
    rows = np.array(list(combinations_with_replacement(range(responses), k)))
    counts = np.stack([(rows == y).sum(axis=1) for y in range(responses)], axis=1)
    orders = [math.factorial(k) // math.prod(math.factorial(int(c)) for c in row) for row in counts]
    return rows, np.array(orders, float)


def group_probabilities(sampler: np.ndarray, k: int) -> np.ndarray:
    """Returns the (P, M) probability of each multiset of k, from (P, Y) probabilities of the responses."""
    rows, orders = multisets(sampler.shape[1], k)
    return orders * np.prod(sampler[:, rows], axis=2)


def expected_step(
    name: str,
    logits: np.ndarray,
    sampler: np.ndarray,
    *,
    k: int = 4,
    beta: float = BETA,
    rewards: np.ndarray = REWARDS,
    log_ref: np.ndarray = LOG_REF,
    log_old: np.ndarray | None = None,
    lengths: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    coefficients: Callable[..., np.ndarray] | None = None,
    **options: Any,
) -> np.ndarray:
    """Returns the (P, Y) expected step in the logits, an ascent direction, averaged over the prompts.

    Args:
      sampler: (P, Y) probabilities of the responses.
      log_old: (P, Y) log-probabilities for the ratio; default: the policy itself (ratio 1).
      lengths, weights: (Y,) tokens of each response, and f of GVPO++.
      coefficients: replaces `objective_coefficients`; takes the same arguments.
    """
    prompts, responses = logits.shape
    rows, _ = multisets(responses, k)
    probabilities = group_probabilities(sampler, k)
    log_pi = softmax_log(logits)
    x = np.repeat(np.arange(prompts), rows.size)
    y = np.tile(rows.reshape(-1), prompts)
    ids = np.repeat(np.arange(prompts * len(rows)), k)
    cells = [table[x, y] for table in (log_pi, log_ref, log_pi if log_old is None else log_old, rewards)]
    if lengths is not None:
        options["lengths"] = lengths[y]
    if weights is not None:
        options["response_weights"] = weights[y]
    compute = coefficients or (lambda *arrays, **kw: objective_coefficients(name, *arrays, **kw))
    c = compute(*cells, ids, beta=beta, num_groups=prompts * len(rows), **options)
    if name == "dpo":  # DPO averages over the groups that have a pair
        by_group = cells[3].reshape(-1, k)
        counted = int((by_group.max(axis=1) > by_group.min(axis=1)).sum())
    else:
        counted = prompts * len(rows)
    c = c * counted * np.repeat(probabilities.reshape(-1), k) / prompts
    return _in_logits(c, x, y, np.exp(log_pi))


def _in_logits(c: np.ndarray, x: np.ndarray, y: np.ndarray, pi: np.ndarray) -> np.ndarray:
    """Returns sum_i c_i grad log pi(y_i|x_i) with respect to the logits of a softmax table."""
    ascent = np.zeros_like(pi)
    np.add.at(ascent, (x, y), c)
    result: np.ndarray = ascent - pi * np.bincount(x, weights=c, minlength=len(pi))[:, None]
    return result


def sampled_steps(
    name: str,
    seeds: int,
    steps: int,
    rate: float,
    *,
    k: int = 8,
    beta: float = BETA,
    staleness: int = 0,
    replay: int = 0,
    ratio: bool = True,
    clip_norm: float = 0.0,
    seed: int = 0,
) -> np.ndarray:
    """Returns (S, P, Y) logits after `steps` sampled steps of `seeds` independent runs from the reference.

    Args:
      staleness: the groups are drawn by the policy of this many steps ago.
      replay: half of the prompts' groups are taken from this many last steps.
      ratio: the objective gets the log-probabilities at sampling; otherwise its ratio is 1.
    """
    rng = np.random.default_rng(seed)
    tables = np.tile(LOG_REF, (seeds, 1)).reshape(seeds * PROMPTS, RESPONSES)
    log_ref, rewards = tables, np.tile(REWARDS, (seeds, 1))
    logits, history, memory = tables, [], []
    cells = np.arange(seeds * PROMPTS)
    ids, x = np.repeat(cells, k), np.repeat(cells, k)
    with np.errstate(all="ignore"):
        for _ in range(steps):
            history = [*history[-staleness:], softmax_log(logits)] if staleness else [softmax_log(logits)]
            log_sampler = history[0]
            cumulative = np.exp(log_sampler).cumsum(axis=1)
            u = rng.random((len(cells), k, 1)) * cumulative[:, None, -1:]
            y = np.minimum((u > cumulative[:, None, :]).sum(axis=2), RESPONSES - 1)
            old = np.take_along_axis(log_sampler, y, axis=1)
            if replay:
                memory = [*memory[-replay + 1 :], (y, old)]
                chosen = rng.integers(0, len(memory), len(cells))
                again = rng.random(len(cells)) < 0.5
                y, old = (
                    np.where(again[:, None], np.stack([m[part] for m in memory])[chosen, cells], fresh)
                    for part, fresh in enumerate((y, old))
                )
            y, log_pi = y.reshape(-1), softmax_log(logits)
            arrays = (log_pi[x, y], log_ref[x, y], old.reshape(-1) if ratio else log_pi[x, y], rewards[x, y])
            c = objective_coefficients(name, *arrays, ids, beta=beta, num_groups=len(cells)) * len(cells) / PROMPTS
            step = _in_logits(c, x, y, np.exp(log_pi))
            if clip_norm:
                norm = np.sqrt((step.reshape(seeds, -1) ** 2).sum(axis=1))
                step = step * np.repeat(np.minimum(1.0, clip_norm / np.maximum(norm, 1e-300)), PROMPTS)[:, None]
            logits = logits + rate * step
    return logits.reshape(seeds, PROMPTS, RESPONSES)
