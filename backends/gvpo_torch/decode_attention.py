"""Attention and cache layers for rows of transformers models that are decoded in fixed buffers."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import CacheLayerMixin

from gvpo_torch.decode_prompts import Prompts, attended, merged
from gvpo_torch.model import Scorer

ATTENTION = "gvpo_decode"
_prompts: ContextVar[Prompts] = ContextVar("prompts")  # the prompts that a forward pass attends to


def fits(scorer: Scorer) -> bool:
    """Whether the model may be decoded in fixed buffers; `check` then compares that with scoring."""
    config, base = scorer.config, scorer.base
    layers = getattr(config, "layer_types", None)
    kinds = set(layers or ()) - {"full_attention"}
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    plain = scorer.rope is None and not scorer.same_length and not kinds and not (window and not layers)
    able = getattr(base, "_can_set_attn_implementation", lambda: False)()
    return bool(plain and able and base.config is config)


class Layer(CacheLayerMixin):
    """A layer's keys and values (L, heads, S, D) of the tokens that the lines drew, written at slot `at`."""

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor, at: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.at = keys, values, at
        self.is_initialized = True

    def lazy_initialization(self, *states: Tensor) -> None:
        """Does nothing: the layer is made with its buffers."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.at, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.at, value_states.to(self.values.dtype))
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        return int(self.keys.shape[2]) - 1  # not used here: positions and the mask are given

    def get_max_length(self) -> int:
        return int(self.keys.shape[2])

    get_max_cache_shape = get_max_length  # its name before transformers 5.2x


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attends with one query per line, (L, H, 1, D), to the line's prompt and to its own keys and values (L, G, S, D).

    The H / G heads of a group share its keys, which are read once.
    """
    if sliding_window is not None or softcap is not None or s_aux is not None or query.shape[2] != 1:
        raise NotImplementedError("attention with a window, a cap or sinks is not decoded in fixed buffers")
    lines, groups = key.shape[:2]
    shared = query.reshape(lines, groups, -1, query.shape[-1])  # the heads of a group go on the axis of queries
    drawn_part = attended(shared, key, value, attention_mask, scaling)
    prompt_part = _prompts.get().attended(module.layer_idx, shared, scaling)
    return merged(drawn_part, prompt_part).to(value.dtype).reshape(lines, 1, -1, value.shape[-1]), None


AttentionInterface.register(ATTENTION, _attention)


@contextlib.contextmanager
def attending(base: Any, by: str) -> Iterator[None]:
    """Uses another attention implementation of a transformers model within the block."""
    before = base.config._attn_implementation
    base.set_attn_implementation(by)
    try:
        yield
    finally:
        base.set_attn_implementation(before)


@contextlib.contextmanager
def attending_to(prompts: Prompts) -> Iterator[None]:
    """Sets the prompts to which lines attend in forward passes within the block."""
    token = _prompts.set(prompts)
    try:
        yield
    finally:
        _prompts.reset(token)
