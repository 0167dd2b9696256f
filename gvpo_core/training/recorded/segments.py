"""Columns of recorded episodes: which tokens are the policy's own, and the segments after the first."""

from collections.abc import Mapping, Sequence
from typing import Any

from gvpo_core.training.policy import Mask, Segment
from gvpo_core.training.recorded.conversation import plain_list
from gvpo_core.training.rows import DataError


def read_masks(given: Any, count: int, where: str) -> Sequence[Mask | None]:
    """The column response_mask: of each response a 0 or 1 a token, 1 = the policy's own; null: all are.

    Raises: DataError: a mask of another form, or another number of masks than `count`.
    """
    if given is None:
        return ()
    column = f"{where}, column 'response_mask'"
    masks = _of_each(given, count, column, f"{where} has {count} responses and %d response_mask")
    checked = [None if mask is None else _mask(mask, f"{column}, entry {j}") for j, mask in enumerate(masks)]
    return checked if any(mask is not None for mask in checked) else ()


def later_segments(given: Any, count: int, where: str) -> Sequence[Sequence[Segment]]:
    """The column response_segments: of each response the segments after the first, as a list; null: none.

    A segment is {"prompt_ids": [...], "response_ids": [...], "response_mask": [...]}, the mask being optional.

    Raises: DataError: a segment of another form, or another number of lists than `count`.
    """
    if given is None:
        return ()
    column = f"{where}, column 'response_segments'"
    lists = _of_each(given, count, column, f"{where} has {count} responses and %d response_segments")
    segments = [
        tuple(_segment(one, f"{column}, entry {j}") for one in plain_list(() if of_one is None else of_one, column))
        for j, of_one in enumerate(lists)
    ]
    return segments if any(segments) else ()


def _of_each(given: Any, count: int, column: str, counted: str) -> list[Any]:
    values = plain_list(given, column)
    if len(values) != count:
        raise DataError(f"{counted % len(values)}; expected equal numbers")
    return values


def _segment(given: Any, where: str) -> Segment:
    if not isinstance(given, Mapping) or not (given.get("prompt_ids") and given.get("response_ids")):
        raise DataError(f"{where} is {given!r:.60}; expected {{'prompt_ids': [...], 'response_ids': [...]}}")
    prompt, response = (plain_list(given[key], f"{where}, {key}") for key in ("prompt_ids", "response_ids"))
    mask = given.get("response_mask")
    return Segment(tuple(prompt), tuple(response), None if mask is None else _mask(mask, f"{where}, response_mask"))


def _mask(given: Any, where: str) -> Mask:
    mask = plain_list(given, where)
    if not all(mine in (0, 1) for mine in mask):
        raise DataError(f"{where} is {mask!r:.40}; expected a 0 or 1 for each token")
    return tuple(map(bool, mask))
