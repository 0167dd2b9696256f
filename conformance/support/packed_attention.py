"""Attention of rows that hold several prompts with their responses, pair by pair in float64."""

from typing import NamedTuple

import numpy as np


class Laid(NamedTuple):
    """A row of T tokens."""

    segments: np.ndarray  # (T,) int32, as `layout.Arrays` has them, those of a later prompt after those of an earlier
    last: np.ndarray  # (T,) int32
    positions: np.ndarray  # (T,) int32
    before: np.ndarray  # (T, T) bool: the tokens before each in its own response and prompt, and itself


def row(groups: list[tuple[int, list[int | tuple[int, int]]]], length: int) -> Laid:
    """A row of prompts, each with the tokens of its branches, then padding.

    Args:
      groups: tokens of a prompt, and of each branch: its own, or those shared with the branch before and its own.
    """
    segments, last, positions = (np.full(length, -1, np.int32) for _ in range(3))
    before = np.eye(length, dtype=bool)
    at, number = 0, -1
    for prompt, sizes in groups:
        path: list[int] = []
        for size in [(0, prompt), *sizes]:
            shared, own = size if isinstance(size, tuple) else (0, size)
            number += 1
            path = path[: shared + (prompt if path else 0)]
            for _ in range(own):
                segments[at], positions[at] = number, len(path)
                before[at, path] = True
                path.append(at)
                at += 1
            if own:
                last[path] = number
    positions[at:] = range(length - at)
    before[at:, at:] = np.tri(length - at, dtype=bool)
    return Laid(segments, last, positions, before)


def sees(of: Laid, window: int) -> np.ndarray:
    """(T, T) bool of queries and keys: what each token sees, pair by pair."""
    return of.before & (of.positions[:, None] - of.positions[None, :] < window)


def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, seen: np.ndarray, above: np.ndarray, scale: float, cap: float | None
) -> tuple[np.ndarray, ...]:
    """Attention of one row in float64, and the gradients of sum(result * above) by q, k and v.

    Args:
      q, above: (T, heads, width); k, v: (T, key heads, width); seen: (T, T).
    """
    q, k, v, above = (np.asarray(x, np.float64) for x in (q, k, v, above))
    out, to_q, to_k, to_v = (np.zeros(x.shape) for x in (q, q, k, v))
    group = q.shape[1] // k.shape[1]
    for head in range(q.shape[1]):
        of = head // group
        scores = q[:, head] @ k[:, of].T * scale
        slope = np.ones(scores.shape)
        if cap is not None:
            scores = cap * np.tanh(scores / cap)
            slope = 1 - (scores / cap) ** 2
        weights = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0.0)
        shares = weights / weights.sum(-1, keepdims=True)
        out[:, head] = shares @ v[:, of]
        to_shares = above[:, head] @ v[:, of].T
        to_scores = shares * (to_shares - (shares * to_shares).sum(-1, keepdims=True)) * slope * scale
        to_q[:, head] = to_scores @ k[:, of]
        to_k[:, of] += to_scores.T @ q[:, head]
        to_v[:, of] += shares.T @ above[:, head]
    return out, to_q, to_k, to_v
