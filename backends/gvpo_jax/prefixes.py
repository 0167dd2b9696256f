"""Keys and values of conversations between turns, on the host; `policy.prefixes` decides which are kept."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gvpo_core.training.policy import Response, Tokens
from gvpo_core.training.policy.prefixes import Part, Prefixes
from gvpo_jax.model import Caches

# Keys and values of each stack of layers, (members, tokens, key heads, width); None if it reads another's.
States = list[tuple[np.ndarray, np.ndarray] | None]


def filled_caches(part: Part, groups: int, width: int) -> tuple[list[Any], np.ndarray]:
    """Returns caches (members, `groups`, `width`, ...) with the kept states of the prompts, and their token counts."""
    filled = np.maximum(part.filled, 0).astype(np.int32)
    caches: list[Any] = []
    for number, stack in enumerate(part.states[0]):
        if stack is None:
            caches.append(None)
            continue
        pair = []
        for which, one in enumerate(stack):
            cache = np.zeros((len(one), groups, width, *one.shape[2:]), one.dtype)
            for row, (states, count) in enumerate(zip(part.states, filled, strict=True)):
                cache[:, row, :count] = states[number][which][:, :count]
            pair.append(cache)
        caches.append(tuple(pair))
    return caches, filled


def keep(
    prefixes: Prefixes,
    prompts: Sequence[Tokens],
    responses: Sequence[Sequence[Response]],
    of_prompts: Caches,
    of_responses: Caches,
) -> None:
    """Keeps the states of prompts and responses that `prefixes` wants.

    Args:
      of_prompts: caches (members, G, S, ...).
      of_responses: caches (members, G, K, R, ...), without the last drawn token.
    """
    candidates = [
        (g, j, (*prompt, *response.tokens[:-1]), len(prompt), len(response.tokens) - 1)
        for g, (prompt, row) in enumerate(zip(prompts, responses, strict=True))
        for j, response in enumerate(row)
    ]
    on_host = lambda caches: [None if pair is None else tuple(map(np.asarray, pair)) for pair in caches]
    prompt_caches, response_caches = on_host(of_prompts), on_host(of_responses)
    for g, j, tokens, first, later in candidates:
        if prefixes.wants(tokens):
            states: States = [
                None if prompt is None else _joined(prompt, response, (g, j), first, later)
                for prompt, response in zip(prompt_caches, response_caches, strict=True)
            ]
            prefixes.keep(tokens, states)


def _joined(prompt: Any, response: Any, row: tuple[int, int], first: int, later: int) -> tuple[np.ndarray, np.ndarray]:
    g, j = row
    keys, values = (
        np.concatenate([a[:, g, :first], b[:, g, j, :later]], 1) for a, b in zip(prompt, response, strict=True)
    )
    return keys, values
