"""Prompts: the rows of the data as the model reads them, their order over the epochs, and the checks before a run."""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from gvpo_core.training.config import Config, ConfigError, DataConfig, RewardConfig
from gvpo_core.training.policy import Policy, Prompt, Tokens
from gvpo_core.training.rows import DataError, Row, load_rows

__all__ = [
    "DataError",
    "NothingLeft",
    "Prompts",
    "Row",
    "column_names",
    "encodable",
    "encode_prompts",
    "held_out_rows",
    "load_rows",
    "training_rows",
    "with_given",
]

_GIVEN = "given in Python"


class NothingLeft(DataError):
    """Data without a usable row: all are too long, or lack the scores that are needed."""


@dataclass(frozen=True)
class Prompts:
    """The encoded prompts of a run; `columns` go to the rewards."""

    prompts: Sequence[Prompt]
    tokens: Sequence[Tokens]
    columns: Sequence[Row]
    dropped: int = 0  # rows left out because they are too long
    rows: Sequence[int] | None = None  # the data row of each prompt; None: all rows, in order

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The columns that any row has, in the order of their first appearance."""
        return column_names(self.columns)

    def columns_of(self, rows: Sequence[int]) -> dict[str, list[Any]]:
        """Returns every column's values in these rows. A missing value is None, so all steps have the same columns."""
        return {name: [self.columns[row].get(name) for row in rows] for name in self.names}

    def row(self, i: int) -> int:
        """Returns the data row that prompt `i` comes from."""
        return i if self.rows is None else self.rows[i]

    def batch(self, step: int, size: int, *, seed: int, shuffle: bool) -> list[int]:
        """Returns the prompts of one step (from 0) if every step takes `size`; see `after`."""
        return self.after(step * size, size, seed=seed, shuffle=shuffle)

    def after(self, taken: int, size: int, *, seed: int, shuffle: bool) -> list[int]:
        """Returns the numbers of the next `size` prompts after the first `taken`, over any number of epochs.

        With `shuffle` each epoch has a new order. The result depends only on the arguments, so a resumed run sees the
        same prompts.
        """
        chosen = []
        for position in range(taken, taken + size):
            epoch, offset = divmod(position, len(self))
            chosen.append(int(_order(len(self), seed, epoch)[offset]) if shuffle else offset)
        return chosen


def column_names(rows: Iterable[Row]) -> tuple[str, ...]:
    """The columns that any row has, in the order of their first appearance."""
    return tuple(dict.fromkeys(name for row in rows for name in row))


@lru_cache(maxsize=2)  # it is called for every row of an epoch
def _order(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng(np.random.SeedSequence((seed, epoch))).permutation(n)


_PROMPTS = ("question", "problem", "instruction", "query", "input", "messages", "text")  # common names in data sets


def check_prompt_columns(rows: Sequence[Row], config: DataConfig, name: str) -> None:
    """Raises DataError if a row has no prompt column. The message names the row, and a column that may be meant."""
    for i, row in enumerate(rows):
        _check_prompt_column(row, config, f"{name} row {i}")


def _check_prompt_column(row: Row, config: DataConfig, where: str) -> None:
    if config.prompt in row:
        return
    close = difflib.get_close_matches(config.prompt, list(row), n=1) or [name for name in _PROMPTS if name in row]
    hint = f"; did you mean data.prompt = {close[0]!r}?" if close else "; set data.prompt"
    raise DataError(f"{where} has no column {config.prompt!r}; it has {', '.join(map(str, row))}{hint}")


def encode_prompts(
    policy: Policy,
    rows: Sequence[Row],
    config: DataConfig,
    name: str = "data.train",
    *,
    max_tokens: int = 0,
    wheres: Sequence[str] | None = None,
    encode: Callable[[int, Any], Tokens] | None = None,
) -> Prompts:
    """Checks and encodes the prompt of every row.

    Args:
      max_tokens: the longest response, which must fit the model's context after the prompt. 0: not checked.
      wheres: the name of each row in messages. Default: its number.
      encode: (i, prompt) -> token ids of the prompt of row i. Default: the policy's.
    Raises: DataError: a missing column; or a prompt that has a wrong type, is empty, exceeds the limit or the
      model's context, or has a token that the model does not have.
    """
    prompts, tokens, columns, kept_rows = [], [], [], []
    facts = policy.describe()
    vocabulary, context = facts.vocabulary or math.inf, facts.context or math.inf
    for i, row in enumerate(rows):
        where = wheres[i] if wheres else f"{name} row {i}"
        _check_prompt_column(row, config, where)
        prompt = checked_prompt(row[config.prompt], f"{where}, column {config.prompt!r}", config.system_prompt)
        try:
            ids = tuple(policy.encode(prompt) if encode is None else encode(i, prompt))
        except ConfigError:
            raise
        except Exception as e:  # chat templates and tokenizers may raise any error
            reason = f"{type(e).__name__}: {e}".splitlines()[0]
            raise DataError(f"{where}, column {config.prompt!r} cannot be encoded: {reason}") from e
        if not ids:
            raise DataError(f"{where}, column {config.prompt!r}: the prompt is empty once tokenized")
        if max(ids) >= vocabulary:
            raise DataError(
                f"{where}, column {config.prompt!r} has the token id {max(ids)}, and the model's vocabulary ends"
                f" at {vocabulary - 1}: the tokenizer has tokens that the model was never resized for; resize its"
                " embeddings and save it again, or use its own tokenizer"
            )
        if len(ids) > config.max_prompt_tokens:
            if config.too_long == "drop":
                continue
            raise DataError(
                f"{where}: the prompt has {len(ids)} tokens, more than data.max_prompt_tokens ="
                f" {config.max_prompt_tokens}; raise it, or set data.too_long = 'drop'"
            )
        if max_tokens and len(ids) + max_tokens > context:
            raise DataError(
                f"{where}: the prompt's {len(ids)} tokens and rollout.max_tokens = {max_tokens} are more than"
                f" the {context} positions that the model supports; lower rollout.max_tokens, or leave long prompts"
                " out with data.max_prompt_tokens and data.too_long = 'drop'"
            )
        prompts.append(prompt)
        tokens.append(ids)
        kept_rows.append(i)
        columns.append({key: value for key, value in row.items() if key != config.prompt})
    if not prompts:
        raise NothingLeft(
            f"{name}: all {len(rows)} prompts are longer than data.max_prompt_tokens = {config.max_prompt_tokens}"
        )
    return Prompts(prompts, tokens, columns, len(rows) - len(prompts), kept_rows)


def checked_prompt(prompt: Any, where: str, system_prompt: str = "") -> Prompt:
    """Returns the prompt as the model reads it: text, or messages with text contents. Raises: DataError: neither."""
    if isinstance(prompt, str):
        if system_prompt:
            raise DataError(
                f"{where} is text, and data.system_prompt is for chat messages; write it into the text, or"
                " give chat messages"
            )
        return encodable(prompt, where)
    prompt = prompt.tolist() if hasattr(prompt, "tolist") else prompt  # pandas reads lists as arrays
    if isinstance(prompt, Sequence) and prompt and all(isinstance(m, Mapping) for m in prompt):
        messages = [_message(m, where) for m in prompt]
        if system_prompt and messages[0]["role"] not in ("system", "developer"):
            messages.insert(0, {"role": "system", "content": system_prompt})
        return messages
    raise DataError(f"{where} is a {type(prompt).__name__} ({prompt!r:.60}); expected text or a list of chat messages")


def _message(raw_message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns a chat message with its content as text, without keys whose value is None.

    `datasets` gives every message the keys of all messages, with None as value. Templates test whether a key exists.
    """
    message = {key: value for key, value in raw_message.items() if value is not None}
    content: Any = message.get("content")
    if isinstance(content, list | tuple) or hasattr(content, "tolist"):
        content = message["content"] = "".join(_part(part, where) for part in content)
    calls_tools = content is None and message.get("tool_calls")
    if not isinstance(message.get("role"), str) or not (isinstance(content, str) or calls_tools):
        raise DataError(f"{where}: the chat message {dict(raw_message)!r:.200} needs a text role and a text content")
    encodable(message["role"] + (content or ""), where)
    return message


def _part(part: Any, where: str) -> str:
    """Returns the text of one part of a message's content."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    what = f"of type {kind!r}" if kind else f"{part!r:.60}"
    raise DataError(f'{where}: a content part {what}; expected text only, as {{"type": "text", "text": ...}}')


def encodable(text: str, where: str) -> str:
    """Returns the text. Raises: DataError: it has half of a surrogate pair, which no tokenizer and no file accepts."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise DataError(f"{where} is not valid Unicode: {e.reason} at character {e.start}") from e
    return text


def training_rows(config: Config, train_rows: Iterable[Row] | None) -> list[Row]:
    """Returns the rows passed as `train_rows`, or those of the configured file. Raises: DataError: there are none."""
    name, data = "data.train" if train_rows is None else "train_rows", config.data
    return load_rows(data.train if train_rows is None else train_rows, name, split=data.split, subset=data.subset)


def held_out_rows(config: Config, evaluation_rows: Iterable[Row] | None) -> list[Row]:
    """Returns the rows passed as `evaluation_rows`, or those of the configured file; none if there is neither.

    Raises: DataError: the source has no rows.
    """
    data, name = config.data, "data.evaluation" if evaluation_rows is None else "evaluation_rows"
    if evaluation_rows is None and not data.evaluation:
        return []
    source = data.evaluation if evaluation_rows is None else evaluation_rows
    return load_rows(source, name, split=data.evaluation_split, subset=data.subset)


def with_given(config: Config, rows: Iterable[Row] | None, rewards: Mapping[str, Callable[..., Any]] | None) -> Config:
    """Records in the settings, which the run folder keeps, which inputs were passed as Python objects."""
    if rows is not None and not config.data.train:
        config = replace(config, data=replace(config.data, train=_GIVEN))
    named = {name: RewardConfig(function=_GIVEN) for name in rewards or {}}
    return replace(config, rewards=named | config.rewards)
