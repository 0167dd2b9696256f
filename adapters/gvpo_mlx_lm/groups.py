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
    responses: tuple[tuple[int, ...], ...]  # k, each with its end token if it has one
    rewards: tuple[float, ...]  # k, finite
    ref_logprobs: tuple[float, ...] | None = None  # k, nats, sums over each response

    def __len__(self) -> int:
        return len(self.responses)

    def reference(self, response: int) -> float:
        """Returns the reference's log-prob of a response. `iterate_batches` rejects groups without it."""
        assert self.ref_logprobs is not None
        return self.ref_logprobs[response]


def load_groups(
    source: str | Path | Iterable[Row], tokenizer: Any, *, max_seq_length: int = 2048, name: str = "train"
) -> list[Group]:
    """Returns the groups of a .jsonl or .parquet file, a folder saved by `datasets`, or rows given in Python.

    A row has `prompt` (text or chat messages), `responses` (each text, messages or token ids) and `rewards` (each a
    number, or None for no score). It may have `finished` (each a bool), `prompt_ids` and `response_ids`. All are read
    as `gvpo train` reads recorded groups. A finished text gets an end token, because the log-probability of a response
    includes that of its end: after chat messages the token that closes an assistant's turn in the chat template, else
    the tokenizer's. Token ids are used unchanged. Drops responses without a score (Cor. 3.4), then groups with fewer
    than two scored responses.

    Args:
      tokenizer: one of mlx-lm or transformers.
      max_seq_length: most tokens of prompt and response. mlx-lm would cut longer ones and so change the response.
      name: name of the data in messages.
    Raises: DataError: a row cannot be used, or no group is left.
    """
    rows = load_rows(source, name)
    for i, row in enumerate(rows):
        for column in ("prompt", *GROUPS.needs):
            if row.get(column) is None:
                columns = ", ".join(str(key) for key, value in row.items() if value is not None) or "none"
                raise DataError(f"{name} row {i} has no column {column!r}; it has {columns}")
    eos_ids = getattr(tokenizer, "eos_token_ids", None)  # mlx-lm's tokenizers have a set
    end = end_tokens(sorted(eos_ids) if isinstance(eos_ids, set | list | tuple) else eos_ids, tokenizer)
    groups = [_group(row, tokenizer, end, max_seq_length) for row in recorded_rows(rows, GROUPS, name).rows]
    usable_groups = [group for group in groups if len(group) >= 2]
    if not usable_groups:
        raise DataError(f"{name}: none of {len(rows)} groups has two scored responses; GVPO compares them")
    return usable_groups


def _group(row: RecordedRow, tokenizer: Any, end: Sequence[int], longest: int) -> Group:
    where = row.where
    if any(mask is not None and not all(mask) for mask in row.masks):
        raise DataError(
            f"{where} has a response_mask for tokens that the policy did not sample; mlx-lm's trainer scores every"
            " token. Train on it with gvpo_mlx (docs/recorded.md)"
        )
    if any(row.later):
        raise DataError(
            f"{where} has response_segments, parts of an episode that mlx-lm's trainer does not add up."
            " Train on it with gvpo_mlx (docs/recorded.md)"
        )
    prompt = checked_prompt(row.prompt, f"{where}, column 'prompt'")
    prompt_ids = _prompt(prompt, row.prompt_ids, tokenizer, where)
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
        if len(prompt_ids) + len(ids) > longest:
            raise DataError(
                f"{where}, response {j}: prompt and response have {len(prompt_ids)} + {len(ids)} tokens, more than"
                f" max_seq_length = {longest}; raise it, or leave the response out"
            )
        tokens.append(tuple(ids))
        scores.append(reward)
    return Group(prompt_ids, tuple(tokens), tuple(scores))


def _prompt(prompt: Prompt, recorded_ids: Sequence[int] | None, tokenizer: Any, where: str) -> tuple[int, ...]:
    if recorded_ids is not None:
        ids = tuple(recorded_ids)
    elif isinstance(prompt, str):
        ids = text_tokens(tokenizer, prompt)
    elif getattr(tokenizer, "chat_template", None) is None:
        raise DataError(f"{where}: the prompt is chat messages, and the tokenizer has no chat template")
    else:
        try:
            ids = chat_tokens(tokenizer, prompt)
        except Exception as error:  # a template may raise anything
            raise DataError(f"{where}, column 'prompt' cannot be encoded: {type(error).__name__}: {error}") from error
    if not ids:
        raise DataError(f"{where}, column 'prompt': the prompt is empty once tokenized")
    return ids


def _check_end(prompt: Prompt, tokenizer: Any, where: str) -> None:
    """Raises: DataError: the chat template does not show which token ends an answer; often this is not eos."""
    if isinstance(prompt, str) or getattr(tokenizer, "chat_template", None) is None:
        return
    before = prompt[:-1] if prompt[-1].get("role") in ASSISTANT else prompt  # the response continues a last answer
    try:
        turn_end(tokenizer, before)
    except Exception as error:  # a template may raise anything
        raise DataError(
            f"{where}: the chat template does not take an answer after the prompt ({error}), so the token that"
            " ends an answer is unknown; give the prompt as text"
        ) from error
