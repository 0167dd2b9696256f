"""Attention of rows that hold several prompts with their responses, pair by pair in float64."""

import numpy as np

PARTS = 2**16  # segments of the n-th prompt of a row and of its responses start at n * PARTS


def row(groups: list[tuple[int, list[int]]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """(T,) int32 segments and positions of prompts, each with the tokens of its responses, then padding."""
    segments, positions = [], []
    for n, (prompt, responses) in enumerate(groups):
        segments += [n * PARTS] * prompt
        positions += range(prompt)
        for i, tokens in enumerate(responses, 1):
            segments += [n * PARTS + i] * tokens
            positions += range(prompt, prompt + tokens)
    padding = length - len(segments)
    assert padding >= 0
    segments += [-1] * padding
    positions += range(length - padding, length)
    return np.asarray(segments, np.int32), np.asarray(positions, np.int32)


def sees(segments: np.ndarray, positions: np.ndarray, window: int) -> np.ndarray:
    """(T, T) bool of queries and keys: a token sees its own segment and its prompt's, up to itself."""
    length = len(segments)
    seen = np.zeros((length, length), bool)
    for i in range(length):
        for j in range(i + 1):
            mine, theirs = int(segments[i]), int(segments[j])
            shared = mine == theirs or (mine >= 0 and theirs == mine // PARTS * PARTS)
            seen[i, j] = shared and positions[i] - positions[j] < window
    return seen


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
