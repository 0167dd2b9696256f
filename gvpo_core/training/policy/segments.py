"""Episodes of several segments: a model scores a row for each; all rows of an episode share a sum and a coefficient."""

import numpy as np

from gvpo_core.training.policy.protocol import Coefficients
from gvpo_core.training.policy.step import factors_of


def summed(values: np.ndarray, owners: np.ndarray, count: int) -> np.ndarray:
    """(count,) float64: the sum of each response's rows.

    Args:
      values: (M,) of rows.
      owners: (M,) int64, the response of each row; see `Batch.by_segment`.
    """
    if len(owners) == count:
        return values
    sums = np.zeros(count)
    np.add.at(sums, owners, values)
    return sums


def firsts(values: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """(M,) float64: numbers of rows that have the given sums: each sum at the response's first row, 0 at the others."""
    rows = np.zeros(len(owners))
    rows[: len(values)] = values
    return rows


def spread(coefficients: Coefficients, owners: np.ndarray) -> Coefficients:
    """Coefficients of responses as those of their rows. A call has all rows of each response that it touches."""

    def of_rows(logprobs: np.ndarray, rows: np.ndarray) -> np.ndarray:
        members, places = np.unique(owners[rows], return_inverse=True)
        sums = np.zeros(len(members))
        np.add.at(sums, places, logprobs)
        result: np.ndarray = factors_of(coefficients, sums, members)[places]
        return result

    return of_rows
