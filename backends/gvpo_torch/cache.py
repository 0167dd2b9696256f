"""The cache of keys, values and states of a transformers decoder: the argument's name, the cache's class and rows."""

import inspect
import typing
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from gvpo_core.training.config import ConfigError

NAMES = ("cache", "past_key_values", "cache_params")  # transformers 5.24 renamed the others to the first


def cache_argument(decoder: nn.Module, config: Any) -> str:
    """Returns the name of the argument of `decoder.forward` that takes the cache.

    Reads it from the signature. If a decorator hides it behind `**kwargs`, decodes one token with each known name and
    takes the name that fills the cache.

    Raises: ConfigError: a decoder that takes no cache.
    """
    parameters = inspect.signature(decoder.forward).parameters
    for name in NAMES:
        if name in parameters:
            return name
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        for name in NAMES:
            if _fills(decoder, config, name):
                return name
    raise ConfigError(
        f"{type(decoder).__name__} takes no cache ({', '.join(NAMES)}), which sampling needs: it is not supported"
    )


@torch.no_grad()
def _fills(decoder: nn.Module, config: Any, name: str) -> bool:
    cache = new_cache(decoder, config)
    device = next(decoder.parameters()).device
    try:
        decoder(input_ids=torch.zeros((1, 1), dtype=torch.int64, device=device), use_cache=True, **{name: cache})
        return int(cache.get_seq_length()) == 1
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return False


def new_cache(decoder: nn.Module, config: Any) -> Any:
    """Returns an empty cache: transformers' DynamicCache, or the subclass that the decoder's signature names."""
    from transformers import DynamicCache

    parameters = inspect.signature(decoder.forward).parameters
    for name in NAMES:
        for kind in typing.get_args(parameters[name].annotation) if name in parameters else ():
            if inspect.isclass(kind) and issubclass(kind, DynamicCache) and kind is not DynamicCache:
                return kind()
    return DynamicCache(config=config)


def keep_rows(cache: Any, rows: Tensor) -> None:
    """Keeps the given rows of a cache, (n,) int64, in the given order; a row may be taken more than once."""
    cache.reorder_cache(rows)
    for name, states in vars(cache).items():  # MiniMax's class has states outside its layers, and does not reorder them
        if name != "layers" and isinstance(states, list):
            selected = [state.index_select(0, rows) if isinstance(state, Tensor) else state for state in states]
            setattr(cache, name, selected)


def is_plain(cache: Any) -> bool:
    """Whether every layer of a cache only concatenates keys and values."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)
