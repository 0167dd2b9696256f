"""Episodes of several segments. The model scores a row per segment; rows of an episode share sum and coefficient."""

import numpy as np

from gvpo_core.training.policy.prefixes import common
from gvpo_core.training.policy.protocol import Batch, Coefficients
from gvpo_core.training.policy.step import factors_of


def summed(values: np.ndarray, owners: np.ndarray, count: int) -> np.ndarray:
    """(count,) float64: sum of the values of each response's rows.

    Args:
      values: (M,) one per row.
      owners: (M,) int64, response index of each row; see `Batch.by_segment`.
    """
    if len(owners) == count:
        return values
    sums = np.zeros(count)
    np.add.at(sums, owners, values)
    return sums


def firsts(values: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """(M,) float64: row values that add up to the given sums. The first row of a response has its sum, the others 0."""
    rows = np.zeros(len(owners))
    rows[: len(values)] = values
    return rows


def sharing_beginnings(batch: Batch, responses: int) -> Batch:
    """Moves the border between prompts and responses, so that packed rows compute a group's common beginning once.

    The longest common beginning of a group's prompts becomes their prompt. Usually it is the episode's prompt, since
    prompts of later segments begin with it. The rest of each prompt moves to the front of the response, as tokens that
    are not the policy's own. Prompts with different first tokens are handled separately.

    Args:
      batch: result of `Batch.by_segment`; its first rows are the first segments of `responses` episodes.
    """
    if len(batch) == responses:
        return batch
    members: dict[tuple[int, int], list[int]] = {}
    for i, label in enumerate(batch.groups):
        members.setdefault((label, batch.prompts[i][0]), []).append(i)
    prompts, texts, masks = list(batch.prompts), list(batch.responses), list(batch.masks or [None] * len(batch))
    for rows in members.values():
        row_prompts = {batch.prompts[i] for i in rows}
        beginning = common(min(row_prompts), max(row_prompts))
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
    """Converts coefficients of responses to coefficients of rows. A call must have all rows of each response in it."""

    def of_rows(logprobs: np.ndarray, rows: np.ndarray) -> np.ndarray:
        responses, places = np.unique(owners[rows], return_inverse=True)
        sums = np.zeros(len(responses))
        np.add.at(sums, places, logprobs)
        result: np.ndarray = factors_of(coefficients, sums, responses)[places]
        return result

    return of_rows
