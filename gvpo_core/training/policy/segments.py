"""Episodes of several segments: a model scores a row for each; all rows of an episode share a sum and a coefficient."""

import numpy as np

from gvpo_core.training.policy.prefixes import common
from gvpo_core.training.policy.protocol import Batch, Coefficients
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


def sharing_beginnings(batch: Batch, responses: int) -> Batch:
    """The same tokens, cut elsewhere into prompts and responses, so that packed rows compute a group's beginnings once.

    What all prompts of a group begin with becomes the prompt of them all; as a rule it is that of the episodes, with
    which prompts of later segments begin. What follows it in a prompt goes before the response, as tokens that are not
    the policy's own. Prompts whose first tokens differ stay apart.

    Args:
      batch: of `Batch.by_segment`, with the first segments of `responses` episodes.
    """
    if len(batch) == responses:
        return batch
    members: dict[tuple[int, int], list[int]] = {}
    for i, label in enumerate(batch.groups):
        members.setdefault((label, batch.prompts[i][0]), []).append(i)
    prompts, texts, masks = list(batch.prompts), list(batch.responses), list(batch.masks or [None] * len(batch))
    for rows in members.values():
        of_rows = {batch.prompts[i] for i in rows}
        beginning = common(min(of_rows), max(of_rows))
        for i in rows:
            context = batch.prompts[i][beginning:]
            if context:
                mask = masks[i] or (True,) * len(texts[i])
                prompts[i], texts[i], masks[i] = (
                    prompts[i][:beginning],
                    context + texts[i],
                    (False,) * len(context) + mask,
                )
    return Batch(prompts, texts, batch.groups, masks, complete=batch.complete)


def spread(coefficients: Coefficients, owners: np.ndarray) -> Coefficients:
    """Coefficients of responses as those of their rows. A call has all rows of each response that it touches."""

    def of_rows(logprobs: np.ndarray, rows: np.ndarray) -> np.ndarray:
        members, places = np.unique(owners[rows], return_inverse=True)
        sums = np.zeros(len(members))
        np.add.at(sums, places, logprobs)
        result: np.ndarray = factors_of(coefficients, sums, members)[places]
        return result

    return of_rows
