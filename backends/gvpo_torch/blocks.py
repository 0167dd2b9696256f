"""Attention of packed rows by blocks of 128 x 128 tokens, without a T x T mask: FlexAttention.

A block without a visible pair is skipped, one in which all pairs are visible needs no mask. The host tells them apart
by which tokens of a block are seen the farthest.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "gvpo_blocks"
BLOCK = 128  # tokens
WITHOUT_GRADIENT = ("cpu", "mps")  # types of devices on which FlexAttention has none
NARROWEST = 2 * BLOCK  # tokens of a row: below there is little to skip, and single blocks are compiled separately


def fits(base: Any) -> bool:
    """Whether the attention of a transformers model may be replaced; `check` then compares it with the dense mask."""
    able = getattr(base, "_can_set_attn_implementation", lambda: False)()
    return bool(able and base.config._attn_implementation in ("sdpa", ATTENTION))


def kinds(segments: np.ndarray, last: np.ndarray) -> np.ndarray:
    """(B, n, n) int8 of blocks (query, key): 0 nothing is visible, 1 some pairs are, 2 all are.

    Args:
      segments, last: (B, T), as `layout.Arrays` has them.
    """
    segments, last = _above(segments, last)
    rows, width = segments.shape
    n = -(-width // BLOCK)
    cut = lambda x: np.pad(x, ((0, 0), (0, n * BLOCK - width)), mode="edge").reshape(rows, n, BLOCK)
    number, end = cut(segments), cut(last)  # segments only rise
    query, key = np.arange(n)[:, None], np.arange(n)
    visible = (key <= query) & (number[:, :, None, 0] <= end.max(-1)[:, None])
    whole = (key < query) & (number[:, :, None, -1] <= end.min(-1)[:, None])
    kinds_of_blocks: np.ndarray = visible.astype(np.int8) + whole
    return kinds_of_blocks


def _above(segments: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same with padding as the last segment, which sees itself alone."""
    return np.where(segments < 0, segments.max() + 1, segments), np.where(segments < 0, segments.max() + 1, last)


def mask(segments: np.ndarray, last: np.ndarray, device: torch.device) -> BlockMask:
    """What each token of packed rows sees, of (B, T) as `layout.Arrays` has them; padding sees itself."""
    segments, last = _above(segments, last)
    kinds_of_blocks, width = kinds(segments, last), segments.shape[1]

    def listed(kind: int) -> tuple[Tensor, Tensor]:
        chosen = kinds_of_blocks == kind
        counts = chosen.sum(-1, dtype=np.int32)[:, None]
        indices = np.argsort(~chosen, axis=-1, kind="stable").astype(np.int32)[:, None]
        return tuple(torch.from_numpy(x).to(device, non_blocking=True) for x in (counts, indices))  # type: ignore[return-value]

    number, end = (torch.from_numpy(x).to(device, non_blocking=True) for x in (segments, last))

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (number[b, q] <= end[b, k])

    return BlockMask.from_kv_blocks(*listed(1), *listed(2), BLOCK, sees, (width, width))


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    # Whole or an error: without being compiled it would hold all scores of all pairs.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """By blocks where the mask is one of blocks, else as transformers does."""
    if not isinstance(attention_mask, BlockMask):
        more = {"softcap": softcap, "sliding_window": sliding_window, "s_aux": s_aux}
        given = options | {name: value for name, value in more.items() if value is not None}
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **given)
    if sliding_window is not None or s_aux is not None:
        raise NotImplementedError("attention with a window or sinks is not computed by blocks")

    cap: Any = softcap  # a number where `capped` is called

    def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        result: Tensor = cap * torch.tanh(score / cap)
        return result

    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    attend = (
        cast("Callable[..., Tensor]", flex_attention) if device == "cpu" else _compiled()
    )  # nothing is compiled on CPU
    out = attend(
        query.to(dtype),
        key.to(dtype),
        value.to(dtype),
        score_mod=None if softcap is None else capped,
        block_mask=attention_mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
