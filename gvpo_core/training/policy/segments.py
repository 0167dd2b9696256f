"""Episodes of several segments: a model scores a row for each; all rows of an episode share a sum and a coefficient."""

from collections.abc import Sequence

import numpy as np

from gvpo_core.training.policy.prefixes import common
from gvpo_core.training.policy.protocol import Batch, Coefficients, Tokens
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
    """The same tokens, cut elsewhere into prompts and responses, so that packed rows compute a group's beginning once.

    As a rule the prompt of a later segment begins with its episode's prompt, which all rows of the group then have as
    theirs. What follows in a later segment's prompt goes before its response, as tokens that are not the policy's own.

    Args:
      batch: of `Batch.by_segment`, with the first segments of `responses` episodes.
    """
    if len(batch) == responses:
        return batch
    members: dict[int, list[int]] = {}
    for i, label in enumerate(batch.groups):
        members.setdefault(label, []).append(i)
    prompts, texts, masks = list(batch.prompts), list(batch.responses), list(batch.masks or [None] * len(batch))
    for rows in members.values():
        beginning, chosen = _beginning([batch.prompts[i] for i in rows])
        for i in (rows[n] for n in chosen):
            context = batch.prompts[i][beginning:]
            if context:
                mask = masks[i] or (True,) * len(texts[i])
                prompts[i], texts[i], masks[i] = (
                    prompts[i][:beginning],
                    context + texts[i],
                    (False,) * len(context) + mask,
                )
    return Batch(prompts, texts, batch.groups, masks, complete=batch.complete)


def _beginning(prompts: Sequence[Tokens]) -> tuple[int, list[int]]:
    """How many tokens of the first prompt are best computed once, and the prompts that begin with them.

    Chosen so that the fewest tokens are computed: the beginning once, the rest of each prompt that has it, and each
    other prompt once. (0, []) where that is no less than each prompt once.
    """
    together = [common(prompt, prompts[0]) for prompt in prompts]
    best, fewest = (0, list[int]()), sum(map(len, {*prompts}))
    for length in sorted({*together} - {0}, reverse=True):
        chosen = [n for n, n_together in enumerate(together) if n_together >= length]
        others = {prompt for prompt, n_together in zip(prompts, together, strict=True) if n_together < length}
        tokens = length + sum(len(prompts[n]) - length for n in chosen) + sum(map(len, others))
        if tokens < fewest:
            best, fewest = (length, chosen), tokens
    return best


def spread(coefficients: Coefficients, owners: np.ndarray) -> Coefficients:
    """Coefficients of responses as those of their rows. A call has all rows of each response that it touches."""

    def of_rows(logprobs: np.ndarray, rows: np.ndarray) -> np.ndarray:
        members, places = np.unique(owners[rows], return_inverse=True)
        sums = np.zeros(len(members))
        np.add.at(sums, places, logprobs)
        result: np.ndarray = factors_of(coefficients, sums, members)[places]
        return result

    return of_rows
