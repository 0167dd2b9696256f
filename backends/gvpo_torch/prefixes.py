"""Keys and values of conversations between their turns, as tensors; `policy.prefixes` says which are kept."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from gvpo_core.training.policy.prefixes import Part
from gvpo_torch.cache import is_plain
from gvpo_torch.model import Scorer

States = list[tuple[Tensor, Tensor]]  # of each layer, keys and values (heads, tokens, width)


def copied(states: States) -> States:
    """Copies, so that the cache that they are of can be freed."""
    return [(keys.clone(), values.clone()) for keys, values in states]


def fill(cache: Any, part: Part) -> None:
    """Fills an empty cache with what is kept of the prompts, padded on the left."""
    width = max(part.filled)
    if width <= 0:
        return
    rows = [(b, states, n) for b, (states, n) in enumerate(zip(part.states, part.filled, strict=True)) if n > 0]
    for number, of_layer in enumerate(rows[0][1]):
        made = []
        for which, like in enumerate(of_layer):
            filled = like.new_zeros((len(part.prompts), like.shape[0], width, like.shape[2]))
            for b, kept, count in rows:
                filled[b, :, width - count :] = kept[number][which][:, :count]
            made.append(filled)
        cache.update(*made, number)


def unfit(scorer: Scorer, cache: Any) -> str:
    """Why a model's turns cannot start from what is kept, by its settings and a filled cache; empty: nothing found."""
    if scorer.rope is not None:
        return "RoPE depends on the length of the row"
    if is_plain(cache):
        return ""
    kinds = ", ".join(sorted({type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer}))
    return f"its cache has {kinds}, which may not hold every token"
