"""Recorded groups: prompts with scored responses, as token ids."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gvpo_core.training.data import DataError, Row, load_rows
from gvpo_core.training.policy.text import ASSISTANT, chat_tokens, text_tokens, turn_end

_PER_RESPONSE = ("rewards", "finished")


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

    A row has `prompt`, text or chat messages; `responses`, each text or token ids; `rewards`, a number each, or None
    where there is no score; and may have `finished`, a bool each. A text that is finished, as all are by default, gets
    an end token, for the policy's log-probability of a response is that of ending there too: after chat messages the
    one with which the chat template closes an assistant's turn, else the tokenizer's. Token ids are taken as they are.
    A response without a score leaves its group (Cor. 3.4), a group with fewer than two is left out.

    Args:
      tokenizer: mlx-lm's, or any of transformers.
      max_seq_length: tokens of prompt and response; mlx-lm would cut longer ones, which would be another response.
      name: of the data, for messages.
    Raises: DataError: a row that cannot be used, and why, or no group left.
    """
    rows = load_rows(source, name)
    groups = [_group(row, tokenizer, max_seq_length, f"{name} row {i}") for i, row in enumerate(rows)]
    kept = [group for group in groups if len(group) >= 2]
    if not kept:
        raise DataError(f"{name}: none of {len(rows)} groups has two scored responses; GVPO compares them")
    return kept


def _group(row: Row, tokenizer: Any, longest: int, where: str) -> Group:
    for column in ("prompt", "responses", "rewards"):
        if column not in row:
            raise DataError(f"{where} has no column {column!r}; it has {', '.join(map(str, row)) or 'none'}")
    if any(mask is not None for mask in row.get("response_mask") or ()):
        raise DataError(
            f"{where} has a response_mask, tokens that the policy did not draw; mlx-lm's trainer scores every token."
            " Train on it with gvpo_mlx (docs/recorded.md)"
        )
    if any(row.get("response_segments") or ()):
        raise DataError(
            f"{where} has response_segments, episodes of several prompts, which mlx-lm's trainer does not add up."
            " Train on it with gvpo_mlx (docs/recorded.md)"
        )
    responses = _list(row["responses"], f"{where}, column 'responses'")
    rewards = _list(row["rewards"], f"{where}, column 'rewards'")
    finished = row.get("finished")
    finished = [True] * len(responses) if finished is None else _list(finished, f"{where}, column 'finished'")
    for column, values in zip(_PER_RESPONSE, (rewards, finished), strict=True):
        if len(values) != len(responses):
            raise DataError(f"{where} has {len(responses)} responses and {len(values)} {column}; expected as many")
    prompt = _prompt(row["prompt"], tokenizer, where)
    end = _end(row["prompt"], tokenizer, where)
    tokens, scores = [], []
    for j, (response, reward, ended) in enumerate(zip(responses, rewards, finished, strict=True)):
        score = _reward(reward, f"{where}, reward {j}")
        if math.isnan(score):
            continue
        ids = _response(response, end if ended else None, tokenizer, f"{where}, response {j}")
        if len(prompt) + len(ids) > longest:
            raise DataError(
                f"{where}, response {j}: prompt and response have {len(prompt)} + {len(ids)} tokens, more than"
                f" max_seq_length = {longest}; raise it, or leave the response out"
            )
        tokens.append(ids)
        scores.append(score)
    return Group(prompt, tuple(tokens), tuple(scores))


def _list(value: Any, where: str) -> list[Any]:
    if isinstance(value, str) or not (isinstance(value, Sequence) or hasattr(value, "tolist")):
        raise DataError(f"{where} is a {type(value).__name__}; expected a list, one entry a response")
    return list(value)


def _prompt(prompt: Any, tokenizer: Any, where: str) -> tuple[int, ...]:
    if isinstance(prompt, str):
        ids = text_tokens(tokenizer, prompt)
    elif isinstance(prompt, Sequence) and prompt and all(isinstance(m, dict) and "content" in m for m in prompt):
        if getattr(tokenizer, "chat_template", None) is None:
            raise DataError(f"{where}: the prompt is chat messages, and the tokenizer has no chat template")
        ids = chat_tokens(tokenizer, prompt)
    else:
        raise DataError(f"{where}, column 'prompt' is a {type(prompt).__name__}; expected text or chat messages")
    if not ids:
        raise DataError(f"{where}, column 'prompt': the prompt is empty once tokenized")
    return ids


def _end(prompt: Any, tokenizer: Any, where: str) -> int:
    """The token with which a finished response ends: many templates close a turn with another one than eos."""
    closing = None
    if not isinstance(prompt, str):
        before = prompt[:-1] if prompt[-1].get("role") in ASSISTANT else prompt  # a last answer is being continued
        try:
            closing = turn_end(tokenizer, before)
        except Exception as error:  # what a template raises is its own
            raise DataError(
                f"{where}: the chat template does not take an answer after the prompt ({error}), so it does not say"
                " with which token one ends; give responses as token ids"
            ) from error
    end = tokenizer.eos_token_id if closing is None else closing
    if end is None:
        raise DataError(f"{where}: the tokenizer has no end token; set its eos_token, or give responses as token ids")
    return int(end)


def _response(response: Any, end: int | None, tokenizer: Any, where: str) -> tuple[int, ...]:
    if isinstance(response, str):
        ids = list(tokenizer.encode(response, add_special_tokens=False))
        ids += [] if end is None else [end]
    elif isinstance(response, Sequence) and all(isinstance(i, int) and not isinstance(i, bool) for i in response):
        ids = list(response)
    else:
        raise DataError(f"{where} is a {type(response).__name__}; expected text or a list of token ids")
    if not ids:
        raise DataError(f"{where} has no tokens; a response has at least its end token")
    return tuple(int(i) for i in ids)


def _reward(reward: Any, where: str) -> float:
    """NaN: no score."""
    if reward is None:
        return math.nan
    if isinstance(reward, str | bytes) or not hasattr(reward, "__float__"):
        raise DataError(f"{where} is a {type(reward).__name__}; expected a number or None")
    if math.isinf(float(reward)):
        raise DataError(f"{where} is {reward}; expected a finite number, or None for no score")
    return float(reward)
