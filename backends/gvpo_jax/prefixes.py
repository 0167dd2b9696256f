"""Keys and values of conversations between their turns, on the host; `policy.prefixes` says which are kept."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gvpo_core.training.policy import Response, Tokens
from gvpo_core.training.policy.prefixes import Part, Prefixes
from gvpo_jax.model import Caches

# Of each stack of layers, keys and values (members, tokens, key heads, width); None where it reads another's.
States = list[tuple[np.ndarray, np.ndarray] | None]


def filled_caches(part: Part, groups: int, width: int) -> tuple[list[Any], np.ndarray]:
    """Caches (members, `groups`, `width`, ...) with what is kept of the prompts, and how many tokens that is."""
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
    prefixes: Prefixes, prompts: Sequence[Tokens], responses: Sequence[Sequence[Response]], before: Caches, own: Caches
) -> None:
    """Keeps what is wanted of prompts and their responses.

    Args:
      before: the prompts' caches (members, G, S, ...); own: the responses' (members, G, K, R, ...), without those of
        the last token that was drawn.
    """
    wanted = [
        (g, j, (*prompt, *response.tokens[:-1]), len(prompt), len(response.tokens) - 1)
        for g, (prompt, row) in enumerate(zip(prompts, responses, strict=True))
        for j, response in enumerate(row)
    ]
    on_host = lambda caches: [None if pair is None else tuple(map(np.asarray, pair)) for pair in caches]
    before_all, own_all = on_host(before), on_host(own)
    for g, j, tokens, first, later in wanted:
        if prefixes.wants(tokens):
            states: States = [
                None if pair is None else _joined(pair, mine, (g, j), first, later)
                for pair, mine in zip(before_all, own_all, strict=True)
            ]
            prefixes.keep(tokens, states)


def _joined(prompt: Any, response: Any, row: tuple[int, int], first: int, later: int) -> tuple[np.ndarray, np.ndarray]:
    g, j = row
    keys, values = (
        np.concatenate([a[:, g, :first], b[:, g, j, :later]], 1) for a, b in zip(prompt, response, strict=True)
    )
    return keys, values
