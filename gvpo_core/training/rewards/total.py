"""The total reward of responses from several functions, each of which may score only some groups."""

from collections.abc import Sequence

import numpy as np


def members(parts: np.ndarray, failed: np.ndarray, group_ids: np.ndarray) -> np.ndarray:
    """(F, N) bool: whether a function is part of the reward of a response's group.

    It is not if it gave None or NaN for every response of the group, as in a run on several tasks. A function that
    failed on a response (it raised an error or ran out of time) is part of the reward.

    Args:
      parts: (F, N) float; NaN = no score.
      failed: (F, N) bool: no score because the function failed.
      group_ids: (N,) int, any labels.
    """
    _, groups = np.unique(group_ids, return_inverse=True)
    count = int(groups.max()) + 1 if groups.size else 0
    scores_group = np.zeros((len(parts), count), bool)
    for function, answered in enumerate(~np.isnan(parts) | failed):
        scores_group[function, groups[answered]] = True
    return scores_group[:, groups]


def total_rewards(parts: np.ndarray, failed: np.ndarray, weights: Sequence[float], group_ids: np.ndarray) -> np.ndarray:
    """(N,) float64: the weighted sum over the functions that are part of the group's reward; NaN = no reward.

    A response without a score from such a function has no reward: the sum of the other scores is not comparable with
    the totals of its group. A group without any score has no reward. A function of weight 0 is only a metric and part
    of no reward. If all weights are 0, every response has reward 0. Args: see `members`.
    """
    factors = np.asarray(weights, np.float64)[:, None]
    if len(factors) and not factors.any():
        return np.zeros(len(group_ids))
    part_of = members(parts, failed, group_ids) & (factors != 0)
    total = (factors * np.where(part_of, parts, 0.0)).sum(axis=0)
    return np.where(part_of.any(axis=0), total, np.nan)
