"""The choice of a token: the inverse of the cumulative distribution in vocabulary order, at a number in [0, 1).

The device offers a token that it finds in float32, with which the next step can begin; the host decides in float64.
"""

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from gvpo_core.training.sampling import Sampling

BLOCK = 256  # tokens of the vocabulary whose mass is summed on the device


class Offer(NamedTuple):
    """What the device computes for the choice of R tokens, queued and not waited for."""

    tokens: mx.array  # (R,) that it would choose, in float32
    masses: mx.array | None = None  # (R, blocks, BLOCK) float32; None at temperature 0
    sums: mx.array | None = None  # (R, blocks) of the masses
    blocks: mx.array | None = None  # (R,) in which the tokens are
    inside: mx.array | None = None  # (R, BLOCK), the masses of these blocks


def offer(logits: mx.array, numbers: np.ndarray, sampling: Sampling) -> Offer | None:
    """Queues what `pick` needs; None with settings that cut the support, where the host takes all masses.

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
    """(R,) int64: one token a row.

    Masses are float32, as are their sums over blocks of 256 tokens; what is cumulative is float64, on the host: first
    over the blocks, then within the one that the number falls in. The device finds that block too, in float32, so that
    one wait brings both; where rounding makes it another block, the host asks once more. Settings that cut the support
    take all masses there.

    Args:
      logits: (R, V) float32. numbers: (R,) float64 in [0, 1).
      offered: `offer` of the same arguments, where it was queued before.
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
    """(R, V) float32, of which the largest is 1."""
    return mx.exp((logits - logits.max(1, keepdims=True)) / sampling.temperature)


def to_host(*arrays: mx.array | None) -> list[np.ndarray]:
    """Waits once for the device: nothing else in sampling does."""
    mx.eval(*arrays)
    return [np.array(a) for a in arrays]


def _first(cumulative: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each row first exceeds what is wanted; where rounding keeps it from that, the last place with mass."""
    chosen = (cumulative <= wanted[:, None]).sum(1)
    return np.minimum(chosen, cumulative.argmax(1))


def truncate(masses: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The (R, V) masses with those zero that top-k, min-p and top-p cut, in this order; ties at the border stay."""
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
