"""Finds the pairs of blocks in a row that have a visible pair of tokens. The kernels of `blocks` loop over them."""

import jax.numpy as jnp
import numpy as np
from jax import Array

REAL, WHOLE, FIRST, LAST = 1, 2, 4, 8  # flags of a pair; FIRST, LAST: of the pairs with its query's or key's block
_FLAGS, _PLACE = 4, 14  # bits


PADDING = np.iinfo(np.int32).max  # segment number of padding tokens: above all others, so padding sees only itself


def kinds(segments: Array, last: Array, positions: Array, window: Array | None, block: int) -> Array:
    """Returns (B, n, n) int32 for pairs of blocks (query, key): 0 = no token pair is visible, 1 = some may be, 2 = all.

    Without a window, 1 means that at least one pair is visible. No T x T array is made. Padding has segment PADDING.
    """
    cut = lambda x: x.reshape(x.shape[0], -1, block)
    number, end = cut(segments), cut(last)
    query, key = (lambda x: x[:, :, None]), (lambda x: x[:, None, :])
    n = number.shape[1]
    before = np.arange(n)[None, :, None] >= np.arange(n)[None, None, :]
    visible = query(number.min(-1)) <= key(end.max(-1))
    all_visible = (query(number.max(-1)) <= key(end.min(-1))) & ~np.eye(n, dtype=bool)[None]
    if window is not None:
        place = cut(positions)
        visible &= query(place.min(-1)) - key(place.max(-1)) < window
        all_visible &= query(place.max(-1)) - key(place.min(-1)) < window
    return jnp.where(before & visible, jnp.where(all_visible, 2, 1), 0).astype(jnp.int32)


def pairs(of_blocks: Array, *, by_key: bool) -> tuple[Array, Array]:
    """Lists the visible pairs of blocks, grouped by the query's block or, with `by_key`, by the key's block.

    Returns: (B * n (n + 1) / 2,) int32, each row's pairs as codes that `blocks_of` reads; and the largest number of
      pairs in a row.
    """
    rows, n, _ = of_blocks.shape
    i, j = np.tril_indices(n)
    if by_key:
        by_column = np.lexsort((i, j))
        i, j = i[by_column], j[by_column]
    kind = of_blocks[:, i, j]
    order = jnp.argsort(kind == 0, axis=-1, stable=True)
    count = (kind > 0).sum(-1, keepdims=True)
    number = jnp.arange(len(i))[None]
    order = jnp.take_along_axis(order, jnp.minimum(number, count - 1), 1)  # after the last pair: repeat it
    taken = lambda x: jnp.asarray(x, jnp.int32)[order]
    outer = taken(j if by_key else i)
    end = jnp.full((rows, 1), -1, jnp.int32)
    first = outer != jnp.concatenate([end, outer[:, :-1]], 1)
    last = (outer != jnp.concatenate([outer[:, 1:], end], 1)) | (number == count - 1)
    all_visible = jnp.take_along_axis(kind, order, 1) == 2
    flags = REAL + jnp.where(all_visible, WHOLE, 0) + jnp.where(first, FIRST, 0) + jnp.where(last, LAST, 0)
    code = ((taken(i) << _PLACE | taken(j)) << _FLAGS) + jnp.where(number < count, flags, 0)
    return code.reshape(-1).astype(jnp.int32), count.max().astype(jnp.int32)


def blocks_of(code: Array) -> tuple[Array, Array]:
    """Returns the query's block and the key's block of a pair."""
    return code >> (_FLAGS + _PLACE), (code >> _FLAGS) & ((1 << _PLACE) - 1)
