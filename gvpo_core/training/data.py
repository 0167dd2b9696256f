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
    """Data of which every row leaves: too long, or without the scores that are needed."""


@dataclass(frozen=True)
class Prompts:
    """The prompts of a run, encoded; `columns` go to the rewards."""

    prompts: Sequence[Prompt]
    tokens: Sequence[Tokens]
    columns: Sequence[Row]
    dropped: int = 0  # rows left out for their length
    rows: Sequence[int] | None = None  # of the data, one a prompt; None: all, in order

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The columns that any row has, in the order of their first appearance."""
        return column_names(self.columns)

    def columns_of(self, rows: Sequence[int]) -> dict[str, list[Any]]:
        """Every column's values in these rows; None where a row has none, so that a step's columns never differ."""
        return {name: [self.columns[row].get(name) for row in rows] for name in self.names}

    def row(self, i: int) -> int:
        """The row of the data that prompt `i` comes from."""
        return i if self.rows is None else self.rows[i]

    def batch(self, step: int, size: int, *, seed: int, shuffle: bool) -> list[int]:
        """The prompts of one step (from 0), where every step takes `size`; see `after`."""
        return self.after(step * size, size, seed=seed, shuffle=shuffle)

    def after(self, taken: int, size: int, *, seed: int, shuffle: bool) -> list[int]:
        """Prompts by number: the next `size` of an endless run of epochs, each in a new order, after the first `taken`.

        It depends on its arguments alone, so a resumed run sees the same prompts.
        """
        chosen = []
        for position in range(taken, taken + size):
            epoch, offset = divmod(position, len(self))
            chosen.append(int(_order(len(self), seed, epoch)[offset]) if shuffle else offset)
        return chosen


def column_names(rows: Iterable[Row]) -> tuple[str, ...]:
    """The columns that any row has, in the order of their first appearance."""
    return tuple(dict.fromkeys(name for row in rows for name in row))


@lru_cache(maxsize=2)  # an epoch's order is asked for once a row
def _order(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng(np.random.SeedSequence((seed, epoch))).permutation(n)


_PROMPTS = ("question", "problem", "instruction", "query", "input", "messages", "text")  # as data sets call them


def check_prompt_columns(rows: Sequence[Row], config: DataConfig, name: str) -> None:
    """Raises DataError: a row without the column of the prompts; naming it, and one that may be meant."""
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
      max_tokens: of a response, which the model's context must hold after the prompt. 0: not checked.
      wheres: of each row, for messages. Default: its number.
      encode: token ids of the prompt of row i. Default: by the policy.
    Raises: DataError: a missing column, a prompt of a wrong type, an empty one, one over the limit or beyond the
      model's context, or one with a token that the model does not have.
    """
    prompts, tokens, columns, kept = [], [], [], []
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
        except Exception as e:  # a model's chat template and tokenizer raise what they like
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
        kept.append(i)
        columns.append({key: value for key, value in row.items() if key != config.prompt})
    if not prompts:
        raise NothingLeft(
            f"{name}: all {len(rows)} prompts are longer than data.max_prompt_tokens = {config.max_prompt_tokens}"
        )
    return Prompts(prompts, tokens, columns, len(rows) - len(prompts), kept)


def checked_prompt(prompt: Any, where: str, system_prompt: str = "") -> Prompt:
    """The prompt as the model reads it: text, or messages with text contents. Raises: DataError: neither."""
    if isinstance(prompt, str):
        if system_prompt:
            raise DataError(
                f"{where} is text, and data.system_prompt is for chat messages; write it into the text, or"
                " give chat messages"
            )
        return encodable(prompt, where)
    prompt = prompt.tolist() if hasattr(prompt, "tolist") else prompt  # an array, as pandas reads lists
    if isinstance(prompt, Sequence) and prompt and all(isinstance(m, Mapping) for m in prompt):
        messages = [_message(m, where) for m in prompt]
        if system_prompt and messages[0]["role"] not in ("system", "developer"):
            messages.insert(0, {"role": "system", "content": system_prompt})
        return messages
    raise DataError(f"{where} is a {type(prompt).__name__} ({prompt!r:.60}); expected text or a list of chat messages")


def _message(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A chat message whose content is text. `datasets` gives every message the keys of all, as None: those are left
    out, since templates ask for them by their presence."""
    message = {key: value for key, value in given.items() if value is not None}
    content: Any = message.get("content")
    if isinstance(content, list | tuple) or hasattr(content, "tolist"):
        content = message["content"] = "".join(_part(part, where) for part in content)
    calls_tools = content is None and message.get("tool_calls")
    if not isinstance(message.get("role"), str) or not (isinstance(content, str) or calls_tools):
        raise DataError(f"{where}: the chat message {dict(given)!r:.200} needs a text role and a text content")
    encodable(message["role"] + (content or ""), where)
    return message


def _part(part: Any, where: str) -> str:
    """The text of one part of a message's content."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    what = f"of type {kind!r}" if kind else f"{part!r:.60}"
    raise DataError(f'{where}: a content part {what}; expected text only, as {{"type": "text", "text": ...}}')


def encodable(text: str, where: str) -> str:
    """The text. Raises: DataError: half of a surrogate pair in it, which no tokenizer and no file takes."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise DataError(f"{where} is not valid Unicode: {e.reason} at character {e.start}") from e
    return text


def training_rows(config: Config, given: Iterable[Row] | None) -> list[Row]:
    """The rows passed as `train_rows`, or those of the configured file. Raises: DataError: there are none."""
    name, data = "data.train" if given is None else "train_rows", config.data
    return load_rows(data.train if given is None else given, name, split=data.split, subset=data.subset)


def held_out_rows(config: Config, given: Iterable[Row] | None) -> list[Row]:
    """All rows handed over as `evaluation_rows`, else those of the configured file; none where there is neither.

    Raises: DataError: one of them is named and has no rows.
    """
    data, name = config.data, "data.evaluation" if given is None else "evaluation_rows"
    if given is None and not data.evaluation:
        return []
    source = data.evaluation if given is None else given
    return load_rows(source, name, split=data.evaluation_split, subset=data.subset)


def with_given(config: Config, rows: Iterable[Row] | None, rewards: Mapping[str, Callable[..., Any]] | None) -> Config:
    """Says in the settings, which the run folder keeps, what was handed over as Python objects."""
    if rows is not None and not config.data.train:
        config = replace(config, data=replace(config.data, train=_GIVEN))
    named = {name: RewardConfig(function=_GIVEN) for name in rewards or {}}
    return replace(config, rewards=named | config.rewards)
