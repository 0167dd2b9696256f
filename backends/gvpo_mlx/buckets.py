"""Rounds up the shapes of micro-batches, so that few programs are compiled."""

import numpy as np

from gvpo_core.training.policy.layout import Arrays


def bucket(size: int) -> int:
    """Rounds up to 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, ...: four sizes per octave."""
    step = max(8, 1 << max(0, (size - 1).bit_length() - 3))
    return -(-size // step) * step


def padded(arrays: Arrays, budget: int) -> Arrays:
    """Returns the micro-batch with tokens and targets padded to bucket sizes; tokens up to the budget if it fits.

    Added tokens are padding for the layout. Added targets predict token 0 from the first hidden state; their factor
    must be 0.
    """
    b, t = arrays.ids.shape
    width = max(t, min(bucket(t), budget // b))
    count = bucket(len(arrays.targets))
    pad = lambda x, value: np.pad(x, ((0, 0), (0, width - t)), constant_values=value)
    ids, segments, last = pad(arrays.ids, 0), pad(arrays.segments, -1), pad(arrays.last, -1)
    added = np.arange(1, width - t + 1) + arrays.positions[:, -1:]
    positions = np.concatenate([arrays.positions, added], axis=1)
    row, place = arrays.predict // t, arrays.predict % t
    predict = np.zeros(count, dtype=np.int64)
    predict[: len(arrays.predict)] = row * width + place
    targets = np.zeros(count, dtype=np.int64)
    targets[: len(arrays.targets)] = arrays.targets
    return Arrays(ids, positions, segments, last, predict, targets, arrays.own, arrays.responses, arrays.lengths)
