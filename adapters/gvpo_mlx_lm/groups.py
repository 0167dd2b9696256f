"""Recorded groups: prompts with scored responses, as token ids."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gvpo_core.training.data import DataError, Row, checked_prompt, encodable, load_rows
from gvpo_core.training.policy import Prompt, ResponseError
from gvpo_core.training.policy.text import (
    ASSISTANT,
    chat_tokens,
    encode_responses,
    end_tokens,
    text_tokens,
    turn_end,
)
from gvpo_core.training.recorded import RecordedRow, recorded_rows
from gvpo_core.training.recorded.shapes import GROUPS


@dataclass(frozen=True)
class Group:
    """One prompt and its k >= 2 scored responses."""

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]  # k, each with its end token, where it has one
    rewards: tuple[float, ...]  # k, finite
    ref_logprobs: tuple[float, ...] | None = None  # k, nats, of whole responses

    def __len__(self) -> int:
        return len(self.responses)

    def reference(self, response: int) -> float:
        """The reference's log-prob of a response; `iterate_batches` refuses groups without it."""
        assert self.ref_logprobs is not None
        return self.ref_logprobs[response]


def load_groups(
    source: str | Path | Iterable[Row], tokenizer: Any, *, max_seq_length: int = 2048, name: str = "train"
) -> list[Group]:
    """Groups of a .jsonl or .parquet file, a folder saved by `datasets`, or rows given in Python.

    A row has `prompt`, text or chat messages; `responses`, each text, messages or token ids; `rewards`, a number each,
    or None where there is no score; and may have `finished`, a bool each, `prompt_ids` and `response_ids`, which are
    read as `gvpo train` reads recorded groups. A finished text gets an end token, for the policy's log-probability of a
    response is that of ending there too: after chat messages the one with which the chat template closes an
    assistant's turn, else the tokenizer's. Token ids are taken as they are. A response without a score leaves its group
    (Cor. 3.4), a group with fewer than two is left out.

    Args:
      tokenizer: mlx-lm's, or any of transformers.
      max_seq_length: tokens of prompt and response; mlx-lm would cut longer ones, which would be another response.
      name: of the data, for messages.
    Raises: DataError: a row that cannot be used, and why, or no group left.
    """
    rows = load_rows(source, name)
    for i, row in enumerate(rows):
        for column in ("prompt", *GROUPS.needs):
            if row.get(column) is None:
                found = ", ".join(str(key) for key, value in row.items() if value is not None) or "none"
                raise DataError(f"{name} row {i} has no column {column!r}; it has {found}")
    known = getattr(tokenizer, "eos_token_ids", None)  # a set, of mlx-lm's tokenizers
    end = end_tokens(sorted(known) if isinstance(known, set | list | tuple) else known, tokenizer)
    groups = [_group(row, tokenizer, end, max_seq_length) for row in recorded_rows(rows, GROUPS, name).rows]
    kept = [group for group in groups if len(group) >= 2]
    if not kept:
        raise DataError(f"{name}: none of {len(rows)} groups has two scored responses; GVPO compares them")
    return kept


def _group(row: RecordedRow, tokenizer: Any, end: Sequence[int], longest: int) -> Group:
    where = row.where
    if any(mask is not None and not all(mask) for mask in row.masks):
        raise DataError(
            f"{where} has a response_mask, tokens that the policy did not draw; mlx-lm's trainer scores every token."
            " Train on it with gvpo_mlx (docs/recorded.md)"
        )
    if any(row.later):
        raise DataError(
            f"{where} has response_segments, episodes of several prompts, which mlx-lm's trainer does not add up."
            " Train on it with gvpo_mlx (docs/recorded.md)"
        )
    prompt = checked_prompt(row.prompt, f"{where}, column 'prompt'")
    asked = _prompt(prompt, row.prompt_ids, tokenizer, where)
    _check_end(prompt, tokenizer, where)
    tokens, scores = [], []
    for j, (response, reward, ended) in enumerate(zip(row.responses, row.rewards, row.finished, strict=True)):
        if math.isnan(reward):
            continue
        if isinstance(response, str):
            encodable(response, f"{where}, response {j}")
        try:
            ids = encode_responses(tokenizer, prompt, [response], [ended], end)[0].tokens
        except ResponseError as error:
            raise DataError(f"{where}, response {j} cannot be used: {error}") from error
        if len(asked) + len(ids) > longest:
            raise DataError(
                f"{where}, response {j}: prompt and response have {len(asked)} + {len(ids)} tokens, more than"
                f" max_seq_length = {longest}; raise it, or leave the response out"
            )
        tokens.append(tuple(ids))
        scores.append(reward)
    return Group(asked, tuple(tokens), tuple(scores))


def _prompt(prompt: Prompt, known: Sequence[int] | None, tokenizer: Any, where: str) -> tuple[int, ...]:
    if known is not None:
        ids = tuple(known)
    elif isinstance(prompt, str):
        ids = text_tokens(tokenizer, prompt)
    elif getattr(tokenizer, "chat_template", None) is None:
        raise DataError(f"{where}: the prompt is chat messages, and the tokenizer has no chat template")
    else:
        try:
            ids = chat_tokens(tokenizer, prompt)
        except Exception as error:  # what a template raises is its own
            raise DataError(f"{where}, column 'prompt' cannot be encoded: {type(error).__name__}: {error}") from error
    if not ids:
        raise DataError(f"{where}, column 'prompt': the prompt is empty once tokenized")
    return ids


def _check_end(prompt: Prompt, tokenizer: Any, where: str) -> None:
    """Raises: DataError: the chat template does not say with which token an answer ends, often another than eos."""
    if isinstance(prompt, str) or getattr(tokenizer, "chat_template", None) is None:
        return
    before = prompt[:-1] if prompt[-1].get("role") in ASSISTANT else prompt  # a last answer is being continued
    try:
        turn_end(tokenizer, before)
    except Exception as error:  # what a template raises is its own
        raise DataError(
            f"{where}: the chat template does not take an answer after the prompt ({error}), so it does not say"
            " with which token one ends; give the prompt as text"
        ) from error
