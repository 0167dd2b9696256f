"""Corrects loaded models where mlx-lm ignores or rounds a setting: sliding windows, Gemma 3's embedding factor.

A corrected module gets a subclass of its own class, so its parameters keep their names.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from gvpo_mlx import settings


def apply_window(lm: nn.Module, config: Mapping[str, Any]) -> int | None:
    """Gives every layer its own mask if config.json has a sliding window that mlx-lm's model ignores.

    Returns: the window if the layers accept no mask; rows must then not be longer. Else None.
    Raises: ConfigError: mlx-lm's model has a window in other layers than config.json.
    """
    window = settings.ignored_window(lm, config, str(config.get("model_type")))
    if window is None:
        return None
    for layer in lm.layers:
        names = list(inspect.signature(type(layer).__call__).parameters)[1:4]
        if names != ["x", "mask", "cache"]:
            return window
    kinds = config.get("layer_types") or ["sliding_attention"] * len(lm.layers)
    for layer, kind in zip(lm.layers, kinds, strict=True):
        _give_mask(layer, window if kind == "sliding_attention" else None)
    return None


def window_of(layer: nn.Module) -> int | None:
    """Returns the window that `apply_window` gave the layer, if any."""
    window: int | None = getattr(layer, "applied_window", None)
    return window


def _give_mask(layer: nn.Module, window: int | None) -> None:
    plain = type(layer)

    def call(self: Any, x: mx.array, mask: Any = None, cache: Any = None, **options: Any) -> mx.array:
        result: mx.array = plain.__call__(self, x, _mask(x.shape[1], mask, cache, window), cache, **options)
        return result

    layer.__class__ = type(plain.__name__, (plain,), {"__call__": call, "applied_window": window})


def _mask(tokens: int, mask: Any, cache: Any, window: int | None) -> Any:
    from mlx_lm.models.base import create_causal_mask

    if cache is not None:
        return cache.make_mask(tokens, window_size=window, return_array=True)
    if window is None or tokens <= window:
        return create_causal_mask(tokens) if mask is None and tokens > 1 else mask
    return create_causal_mask(tokens, window_size=window)


def scale_embedding_exactly(lm: nn.Module) -> None:
    """Corrects the embedding factor sqrt(hidden_size) of Gemma 3 and 4.

    mlx-lm rounds it to bfloat16 in every dtype, transformers only in 16 bits. The embedding is multiplied by
    exact / rounded before mlx-lm multiplies it by the rounded factor.
    """
    decoder = lm.get("model")
    if decoder is None or not _rounds(type(decoder)):
        return
    embedding = decoder.embed_tokens
    exact = float(lm.args.hidden_size) ** 0.5
    factor = exact / float(mx.array(exact, mx.bfloat16).astype(mx.float32))
    plain = type(embedding)

    def call(self: Any, ids: mx.array) -> mx.array:
        embedded: mx.array = plain.__call__(self, ids)
        return embedded * factor if embedded.dtype == mx.float32 else embedded

    embedding.__class__ = type(plain.__name__, (plain,), {"__call__": call})


def _rounds(kind: type) -> bool:
    return "hidden_size**0.5, mx.bfloat16" in inspect.getsource(kind.__call__)
