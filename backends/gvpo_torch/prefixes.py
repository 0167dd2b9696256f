"""Keys and values of conversations between turns, as tensors; `policy.prefixes` decides which are kept."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from gvpo_core.training.policy.prefixes import Part
from gvpo_torch.cache import is_plain
from gvpo_torch.model import Scorer

States = list[tuple[Tensor, Tensor]]  # of each layer, keys and values (heads, tokens, width)


def copied(states: States) -> States:
    """Returns copies of the states, so that their cache can be freed."""
    return [(keys.clone(), values.clone()) for keys, values in states]


def fill(cache: Any, part: Part) -> None:
    """Fills an empty cache with the kept states of the prompts, padded on the left."""
    width = max(part.filled)
    if width <= 0:
        return
    rows = [(b, states, n) for b, (states, n) in enumerate(zip(part.states, part.filled, strict=True)) if n > 0]
    for number, of_layer in enumerate(rows[0][1]):
        pair = []
        for which, like in enumerate(of_layer):
            filled = like.new_zeros((len(part.prompts), like.shape[0], width, like.shape[2]))
            for b, states, count in rows:
                filled[b, :, width - count :] = states[number][which][:, :count]
            pair.append(filled)
        cache.update(*pair, number)


def unfit(scorer: Scorer, cache: Any) -> str:
    """Returns why turns cannot start from kept states, by the model's settings and a filled cache; empty: no reason."""
    if scorer.rope is not None:
        return "RoPE depends on the length of the row"
    if is_plain(cache):
        return ""
    kinds = ", ".join(sorted({type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer}))
    return f"its cache has {kinds}, which may not hold every token"
