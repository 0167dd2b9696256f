"""Prompts of episodes, and their method that plays the episodes."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from gvpo_core.training.config import Config, ConfigError
from gvpo_core.training.data import DataError, Prompts, Row, encode_prompts
from gvpo_core.training.episodes.environments import Environments, Operation
from gvpo_core.training.episodes.play import Draw, Episode, play
from gvpo_core.training.episodes.transcript import Chat
from gvpo_core.training.policy import Policy
from gvpo_core.training.sampling import Sampling

_log = logging.getLogger("gvpo")


@dataclass(frozen=True)
class EpisodePrompts(Prompts):
    """Prompts that start episodes."""

    environments: Environments = None  # type: ignore[assignment]
    chat: Chat = None  # type: ignore[assignment]
    column: str = "prompt"
    system_prompt: str = ""

    def play(
        self, policy: Policy, rows: Sequence[int], seeds: Sequence[Sequence[int]], sampling: Sampling, draw: Draw
    ) -> list[list[Episode]]:
        """Plays an episode for each seed of each row; see `play`."""
        inputs = [(self.prompts[r], self.tokens[r], {**self.columns[r], self.column: self.prompts[r]}) for r in rows]
        environments, chat, system = self.environments, self.chat, self.system_prompt
        return play(policy, environments, chat, inputs, seeds, sampling, draw, system_prompt=system)  # type: ignore[arg-type]


def episode_prompts(
    policy: Policy, environments: Environments, rows: Sequence[Row], config: Config, name: str = "data.train"
) -> EpisodePrompts:
    """Encodes the prompts of the rows: those of the prompt column, or else those that `reset(row)` returns.

    A text in the column becomes a message of the user.

    Raises: DataError: see `encode_prompts`; a row without a prompt from either. ConfigError: no chat template.
    """
    tokenizer = getattr(policy, "tokenizer", None)
    chat = Chat(tokenizer, environments.tools, history=config.environment.history)
    if chat.tools and not chat.shows_tools() and policy.rank == 0:
        _log.warning(
            "the chat template does not show the tools to the model: list them in data.system_prompt"
            ' (%s), and say that a call is <tool_call>{"name": ..., "arguments": {...}}</tool_call>',
            ", ".join(tool["function"]["name"] for tool in chat.tools),
        )
    column = config.data.prompt
    missing = [i for i, row in enumerate(rows) if row.get(column) is None]
    made = dict(zip(missing, _prompts_of(environments, [rows[i] for i in missing], missing, name, column), strict=True))
    with_prompts = [dict(row) | {column: _messages(made.get(i, row.get(column)))} for i, row in enumerate(rows)]
    encode = lambda i, prompt: chat.tokens(prompt)
    encoded = encode_prompts(
        policy, with_prompts, config.data, name, max_tokens=config.rollout.max_tokens, encode=encode
    )
    return EpisodePrompts(
        **{f.name: getattr(encoded, f.name) for f in fields(Prompts)},
        environments=environments,
        chat=chat,
        column=column,
        system_prompt=config.data.system_prompt,
    )


def _messages(prompt: Any) -> Any:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _prompts_of(
    environments: Environments, rows: Sequence[Mapping[str, Any]], numbers: Sequence[int], name: str, column: str
) -> list[Any]:
    """Returns the prompts that `reset` gives for the rows; 64 environments are open at a time."""
    prompts: list[Any] = []
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        operations = [Operation("reset", -1 - i, (dict(row),)) for i, row in enumerate(part)]
        for i, result in enumerate(environments.ask(operations)):
            where = f"{name} row {numbers[start + i]}"
            if "error" in result:
                raise ConfigError(f"{where}: reset failed: {result['error']}\n{result['traceback']}".strip())
            if not result["messages"]:
                raise DataError(f"{where} has no column {column!r}, and the environment's reset gave no messages")
            prompts.append(result["messages"])
        environments.ask([Operation("close", -1 - i) for i in range(len(part))])
    return prompts
