"""RoPE whose frequencies depend on the length of a row: finds it in the configuration, and resets it for each row.

With dynamic RoPE, transformers keeps the frequencies of the longest row so far. Here they are reset before each forward
pass, so that a row is scored as in a fresh model.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from gvpo_core.training.config import ConfigError
from gvpo_core.training.policy.layout import RopeByLength, rope_by_length


def by_length(decoder: nn.Module, config: Any) -> RopeByLength | None:
    """See `layout.rope_by_length`.

    Raises: ConfigError: a module with dynamic RoPE whose frequencies cannot be reset.
    """
    rope = rope_by_length(config.to_dict())
    if rope is not None and rope.kind == "dynamic" and not any(_turning(decoder)):
        raise ConfigError(
            f"{type(decoder).__name__} has dynamic RoPE of its own, which keeps the frequencies of the longest row so "
            "far: it cannot be trained exactly. Take the model with another rope_type"
        )
    return rope


def reset(decoder: nn.Module) -> None:
    """Resets the frequencies of every RoPE module to those of short rows."""
    for module in _turning(decoder):
        for name, frequencies in list(module.named_buffers(recurse=False)):
            if name.endswith("original_inv_freq"):
                prefix = name.removesuffix("original_inv_freq")  # the type of layer, if types differ
                # A copy: transformers writes the frequencies of LongRoPE in place.
                setattr(module, f"{prefix}inv_freq", frequencies.clone())
                setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _turning(decoder: nn.Module) -> Iterator[nn.Module]:
    for module in decoder.modules():
        names = [name for name, _ in module.named_buffers(recurse=False)]
        if hasattr(module, "original_max_seq_len") and any(name.endswith("original_inv_freq") for name in names):
            yield module
