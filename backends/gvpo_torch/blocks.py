"""Attention of packed rows by blocks of 128 x 128 tokens, without a T x T mask: FlexAttention.

A block without a visible pair is skipped. A block in which all pairs are visible needs no mask. The host finds the kind
of each block from the segments of its queries and the last segments that see its keys.
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
WITHOUT_GRADIENT = ("cpu", "mps")  # types of devices on which FlexAttention has no gradient
NARROWEST = 2 * BLOCK  # tokens of a row: shorter rows have little to skip, and single blocks are compiled separately


def fits(base: Any) -> bool:
    """Whether the attention of a transformers model may be replaced; `check` then compares it with the dense mask."""
    able = getattr(base, "_can_set_attn_implementation", lambda: False)()
    return bool(able and base.config._attn_implementation in ("sdpa", ATTENTION))


def kinds(segments: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Returns (B, n, n) int8, the kind of each block (query, key): 0 no pair is visible, 1 some pairs are, 2 all are.

    Args:
      segments, last: (B, T), as in `layout.Arrays`.
    """
    segments, last = _above(segments, last)
    rows, width = segments.shape
    n = -(-width // BLOCK)
    cut = lambda x: np.pad(x, ((0, 0), (0, n * BLOCK - width)), mode="edge").reshape(rows, n, BLOCK)
    number, end = cut(segments), cut(last)  # segments never fall along a row
    query, key = np.arange(n)[:, None], np.arange(n)
    visible = (key <= query) & (number[:, :, None, 0] <= end.max(-1)[:, None])
    all_visible = (key < query) & (number[:, :, None, -1] <= end.min(-1)[:, None])
    kinds_of_blocks: np.ndarray = visible.astype(np.int8) + all_visible
    return kinds_of_blocks


def _above(segments: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns both arrays with padding as a last segment that sees only itself."""
    return np.where(segments < 0, segments.max() + 1, segments), np.where(segments < 0, segments.max() + 1, last)


def mask(segments: np.ndarray, last: np.ndarray, device: torch.device) -> BlockMask:
    """Returns the block mask of packed rows, from (B, T) arrays as in `layout.Arrays`; padding sees itself."""
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
    # `fullgraph` raises if it cannot compile: uncompiled, it would hold the scores of all pairs.
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
    """Attends by blocks if the mask is a `BlockMask`, else as transformers does."""
    if not isinstance(attention_mask, BlockMask):
        extras = {"softcap": softcap, "sliding_window": sliding_window, "s_aux": s_aux}
        sdpa_options = options | {name: value for name, value in extras.items() if value is not None}
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **sdpa_options)
    if sliding_window is not None or s_aux is not None:
        raise NotImplementedError("attention with a window or sinks is not computed by blocks")

    cap: Any = softcap  # a number when `capped` is called

    def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        result: Tensor = cap * torch.tanh(score / cap)
        return result

    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    # Nothing is compiled on CPU.
    attend = cast("Callable[..., Tensor]", flex_attention) if device == "cpu" else _compiled()
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
