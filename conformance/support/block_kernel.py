"""FlexAttention's result and gradients on CPU, where torch has no gradient: from a mask of blocks, pair by pair."""

from typing import Any

import torch
from torch import Tensor

calls: list[tuple[int, float]] = []  # tokens of each row, and the blocks visited, of all


def visible(mask: Any, queries: int, keys: int) -> Tensor:
    """(B, 1, T, T) bool: pairs in full blocks, and those of partial blocks that the mask's function lets through."""
    inside = torch.zeros(2, *mask.kv_indices.shape[:2], mask.kv_indices.shape[2], mask.kv_indices.shape[2]).bool()
    lists = ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices))
    for kind, (counts, indices) in enumerate(lists):
        for b, h, row in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
            inside[kind, b, h, row, indices[b, h, row, : counts[b, h, row]].long()] = True
    calls.append((queries, float(inside.any(0).float().mean())))
    size = mask.BLOCK_SIZE[0]
    partial, full = (x.repeat_interleave(size, -1).repeat_interleave(size, -2)[..., :queries, :keys] for x in inside)
    b, h, q, k = (torch.arange(n) for n in (partial.shape[0], 1, queries, keys))
    pairs = mask.mask_mod(b[:, None, None, None], h[None, :, None, None], q[None, None, :, None], k[None, None, None])
    return full | (partial & pairs)


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    score_mod: Any,
    block_mask: Any,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """In place of `torch.nn.attention.flex_attention.flex_attention`."""
    assert score_mod is None
    seen = visible(block_mask, query.shape[2], key.shape[2])
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query.float() @ key.float().mT * (scale or query.shape[-1] ** -0.5)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights @ value.float()).to(value.dtype)
