"""Keys and values of conversations between turns, as arrays; `policy.prefixes` decides which are kept."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from gvpo_core.training.policy.layout import rope_by_length
from gvpo_core.training.policy.prefixes import Part
from gvpo_mlx.model import Scorer

States = list[tuple[mx.array, mx.array]]  # keys and values of each layer, (heads, tokens, width)


def copied(cache: Sequence[Any], row: int, count: int) -> States:
    """Copies the keys and values of a row's first `count` tokens."""
    start = cache[0].left_padding.tolist()[row]
    columns = slice(start, start + count)
    states = [(mx.contiguous(c.keys[row, :, columns]), mx.contiguous(c.values[row, :, columns])) for c in cache]
    mx.eval(states)  # else they would keep the whole cache alive
    return states


def fill(cache: Sequence[Any], part: Part) -> None:
    """Fills empty caches, one per layer, with the kept states of the prompts, padded on the left."""
    width = max(part.filled)
    if width <= 0:
        return
    rows = [(states, max(0, count)) for states, count in zip(part.states, part.filled, strict=True)]
    for number, c in enumerate(cache):
        c.keys, c.values = (
            mx.stack([_padded(states[number][which], count, width) for states, count in rows]) for which in (0, 1)
        )
        c.offset = c.offset + width
        c._idx = width


def _padded(states: mx.array, count: int, width: int) -> mx.array:
    return mx.pad(states[:, :count], [(0, 0), (width - count, 0), (0, 0)])


def unfit(scorer: Scorer, cache: Sequence[Any]) -> str:
    """Returns why turns cannot start from kept states, by the model's settings and caches; empty: no reason."""
    from mlx_lm.models.cache import BatchKVCache

    if rope_by_length(scorer.config) is not None:
        return "RoPE depends on the length of the row"
    kinds = sorted({type(c).__name__ for c in cache if type(c) is not BatchKVCache})
    return f"its cache has {', '.join(kinds)}, which may not hold every token" if kinds else ""
