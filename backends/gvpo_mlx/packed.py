"""Runs packed rows through mlx-lm's models, which accept neither masks nor positions, by replacing their cache.

Attention in mlx-lm asks the cache for the mask and for RoPE's offset, and adds keys and values to it. `Packed` returns
the mask of the rows, a position for every token, and the keys and values unchanged.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn


class Packed:
    """Replaces a layer's cache for rows of a prompt and its responses. A token does not see other responses."""

    def __init__(self, positions: mx.array, segments: mx.array, last: mx.array) -> None:
        """positions, segments, last: (B, T) integers, see `layout.Arrays`."""
        self.offset = positions
        visible = segments[:, :, None] <= last[:, None, :]
        place = mx.arange(segments.shape[1])
        # Padding sees itself, because a mask row that is all False gives NaN.
        self.mask = (visible & (place[:, None] >= place[None]))[:, None]

    def make_mask(self, length: int, *, window_size: int | None = None, **_: Any) -> mx.array:
        """(B, 1, T, T) bool, True = seen."""
        if window_size is not None:
            raise ValueError(f"a sliding window of {window_size} would count other responses' tokens")
        return self.mask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Returns the arguments: there are no earlier tokens."""
        return keys, values


class _Positions(nn.Module):
    """A RoPE module that takes a position for every token; mlx-lm's modules take one for every row."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __call__(self, x: mx.array, offset: Any = 0, **options: Any) -> mx.array:
        if not isinstance(offset, mx.array) or offset.ndim < 2:
            return self.inner(x, offset=offset, **options)
        b, h, t, d = x.shape
        alone = x.transpose(0, 2, 1, 3).reshape(b * t, h, 1, d)
        turned = self.inner(alone, offset=offset.reshape(-1), **options)
        return turned.reshape(b, t, h, d).transpose(0, 2, 1, 3)


def take_positions(lm: nn.Module) -> None:
    """Wraps the module `rope` of every attention layer. Models without such modules are not packed."""
    for module in lm.modules():
        inner = module.get("rope") if isinstance(module, dict) else None
        if isinstance(inner, nn.Module) and not isinstance(inner, _Positions):
            module.rope = _Positions(inner)
