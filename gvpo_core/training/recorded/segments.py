"""Reads columns of recorded episodes: masks of the policy's own tokens, and the segments after the first."""

from collections.abc import Mapping, Sequence
from typing import Any

from gvpo_core.training.policy import Mask, Segment
from gvpo_core.training.recorded.conversation import plain_list
from gvpo_core.training.rows import DataError


def read_masks(value: Any, count: int, where: str) -> Sequence[Mask | None]:
    """Reads the column response_mask: for each response, 0 or 1 per token, 1 = the policy's own; null: all are its own.

    Raises: DataError: a mask has another format, or the number of masks is not `count`.
    """
    if value is None:
        return ()
    column = f"{where}, column 'response_mask'"
    masks = _entries(value, count, column, f"{where} has {count} responses and %d response_mask")
    checked = [None if mask is None else _mask(mask, f"{column}, entry {j}") for j, mask in enumerate(masks)]
    return checked if any(mask is not None for mask in checked) else ()


def later_segments(value: Any, count: int, where: str) -> Sequence[Sequence[Segment]]:
    """Reads the column response_segments: for each response, a list of the segments after the first; null: none.

    A segment is {"prompt_ids": [...], "response_ids": [...], "response_mask": [...]}; the mask is optional.

    Raises: DataError: a segment has another format, or the number of lists is not `count`.
    """
    if value is None:
        return ()
    column = f"{where}, column 'response_segments'"
    lists = _entries(value, count, column, f"{where} has {count} responses and %d response_segments")
    segments = [
        tuple(_segment(item, f"{column}, entry {j}") for item in plain_list(() if items is None else items, column))
        for j, items in enumerate(lists)
    ]
    return segments if any(segments) else ()


def _entries(value: Any, count: int, column: str, message: str) -> list[Any]:
    entries = plain_list(value, column)
    if len(entries) != count:
        raise DataError(f"{message % len(entries)}; expected equal numbers")
    return entries


def _segment(value: Any, where: str) -> Segment:
    if not isinstance(value, Mapping) or not (value.get("prompt_ids") and value.get("response_ids")):
        raise DataError(f"{where} is {value!r:.60}; expected {{'prompt_ids': [...], 'response_ids': [...]}}")
    prompt, response = (plain_list(value[key], f"{where}, {key}") for key in ("prompt_ids", "response_ids"))
    mask = value.get("response_mask")
    return Segment(tuple(prompt), tuple(response), None if mask is None else _mask(mask, f"{where}, response_mask"))


def _mask(value: Any, where: str) -> Mask:
    mask = plain_list(value, where)
    if not all(entry in (0, 1) for entry in mask):
        raise DataError(f"{where} is {mask!r:.40}; expected a 0 or 1 for each token")
    return tuple(map(bool, mask))
