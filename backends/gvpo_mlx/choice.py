"""Chooses tokens: the inverse of the cumulative distribution in vocabulary order, at a number in [0, 1).

The device computes an offer in float32, so that the next step can start. The host decides in float64.
"""

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from gvpo_core.training.sampling import Sampling

BLOCK = 256  # tokens of the vocabulary whose mass is summed on the device


class Offer(NamedTuple):
    """What the device computes for the choice of R tokens; queued, not awaited."""

    tokens: mx.array  # (R,) tokens that the device chooses in float32
    masses: mx.array | None = None  # (R, blocks, BLOCK) float32; None at temperature 0
    sums: mx.array | None = None  # (R, blocks) of the masses
    blocks: mx.array | None = None  # (R,) blocks of these tokens
    inside: mx.array | None = None  # (R, BLOCK) masses of these blocks


def offer(logits: mx.array, numbers: np.ndarray, sampling: Sampling) -> Offer | None:
    """Queues what `pick` needs. Returns None if settings cut the support; the host then reads all masses.

    Args:
      logits: (R, V) float32. numbers: (R,) float64 in [0, 1).
    """
    if sampling.temperature == 0:
        best = mx.argmax(logits, 1)
        mx.async_eval(best)
        return Offer(best)
    if sampling.truncated_support:
        return None
    masses = _masses(logits, sampling)
    rows, vocabulary = masses.shape
    count = -(-vocabulary // BLOCK)
    masses = mx.pad(masses, [(0, 0), (0, count * BLOCK - vocabulary)]).reshape(rows, count, BLOCK)
    sums, here = masses.sum(2), mx.arange(rows)
    cumulative = mx.cumsum(sums, 1)
    wanted = mx.array(numbers, mx.float32)[:, None] * cumulative[:, -1:]
    blocks = mx.minimum((cumulative <= wanted).sum(1), count - 1)
    inside = masses[here, blocks]
    within, below = mx.cumsum(inside, 1), (cumulative - sums)[here, blocks]
    place = mx.minimum((within <= wanted - below[:, None]).sum(1), mx.argmax(within, 1))
    tokens = blocks * BLOCK + place
    mx.async_eval(tokens, sums, blocks, inside)
    return Offer(tokens, masses, sums, blocks, inside)


def pick(logits: mx.array, numbers: np.ndarray, sampling: Sampling, offered: Offer | None = None) -> np.ndarray:
    """(R,) int64: one token per row.

    Masses and their sums over blocks of 256 tokens are float32. Cumulative sums are float64, on the host: first over
    the blocks, then within the block in which the number falls. The device finds this block too, in float32, so one
    wait brings both. If rounding gives another block, the host reads again. If settings cut the support, the host reads
    all masses.

    Args:
      logits: (R, V) float32. numbers: (R,) float64 in [0, 1).
      offered: the result of `offer` with the same arguments, if it was queued before.
    """
    offered = offered or offer(logits, numbers, sampling)
    if offered is None:
        cut = truncate(to_host(_masses(logits, sampling))[0].astype(np.float64), sampling)
        return _first(cut.cumsum(1), numbers * cut.sum(1))
    if offered.masses is None:
        (best,) = to_host(offered.tokens)
        return best.astype(np.int64)
    sums, expected, inside, _ = to_host(offered.sums, offered.blocks, offered.inside, offered.tokens)
    sums, here = sums.astype(np.float64), np.arange(len(numbers))
    cumulative = sums.cumsum(1)
    wanted = numbers * cumulative[:, -1]
    block = _first(cumulative, wanted)
    if not np.array_equal(block, expected):
        (inside,) = to_host(offered.masses[mx.array(here), mx.array(block)])
    below = cumulative[here, block] - sums[here, block]
    return block * BLOCK + _first(inside.astype(np.float64).cumsum(1), wanted - below)


def _masses(logits: mx.array, sampling: Sampling) -> mx.array:
    """(R, V) float32 masses; the largest of each row is 1."""
    return mx.exp((logits - logits.max(1, keepdims=True)) / sampling.temperature)


def to_host(*arrays: mx.array | None) -> list[np.ndarray]:
    """Evaluates the arrays and copies them. This is the only place in sampling that waits for the device."""
    mx.eval(*arrays)
    return [np.array(a) for a in arrays]


def _first(cumulative: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Index at which each row first exceeds `wanted`; the last index with mass if rounding prevents that."""
    chosen = (cumulative <= wanted[:, None]).sum(1)
    return np.minimum(chosen, cumulative.argmax(1))


def truncate(masses: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Zeroes the (R, V) masses that top-k, min-p and top-p cut, in this order. Ties at the border stay."""
    if sampling.top_k and sampling.top_k < masses.shape[1]:
        border = np.partition(masses, -sampling.top_k, 1)[:, -sampling.top_k, None]
        masses = np.where(masses < border, 0.0, masses)
    if sampling.min_p > 0:
        masses = np.where(masses < sampling.min_p * masses.max(1, keepdims=True), 0.0, masses)
    if sampling.top_p < 1:
        ordered = -np.sort(-masses, 1)
        before = ordered.cumsum(1) - ordered
        kept = before < sampling.top_p * ordered.sum(1, keepdims=True)
        border = np.take_along_axis(ordered, kept.sum(1, keepdims=True) - 1, 1)
        masses = np.where(masses < border, 0.0, masses)
    return masses
