"""Which pairs of blocks of a row have a visible pair of tokens, in lists that the kernels of `blocks` go through."""

import jax.numpy as jnp
import numpy as np
from jax import Array

REAL, WHOLE, FIRST, LAST = 1, 2, 4, 8  # of a pair of blocks; FIRST and LAST of those with one query's or key's block
_FLAGS, _PLACE = 4, 14  # bits


PADDING = np.iinfo(np.int32).max  # its segment here: after all others, so that it sees itself alone


def kinds(segments: Array, last: Array, positions: Array, window: Array | None, block: int) -> Array:
    """(B, n, n) int32 of blocks (query, key): 0 nothing is visible, 1 something may be, 2 everything is.

    Without a window 1 says that something is. Nothing of T x T is made. `segments` of padding are PADDING.
    """
    cut = lambda x: x.reshape(x.shape[0], -1, block)
    number, end = cut(segments), cut(last)
    query, key = (lambda x: x[:, :, None]), (lambda x: x[:, None, :])
    n = number.shape[1]
    before = np.arange(n)[None, :, None] >= np.arange(n)[None, None, :]
    seen = query(number.min(-1)) <= key(end.max(-1))
    whole = (query(number.max(-1)) <= key(end.min(-1))) & ~np.eye(n, dtype=bool)[None]
    if window is not None:
        at = cut(positions)
        seen &= query(at.min(-1)) - key(at.max(-1)) < window
        whole &= query(at.max(-1)) - key(at.min(-1)) < window
    return jnp.where(before & seen, jnp.where(whole, 2, 1), 0).astype(jnp.int32)


def pairs(of_blocks: Array, *, by_key: bool) -> tuple[Array, Array]:
    """The visible pairs of blocks, those of a query's block one after another, or of a key's.

    Returns: (B * n (n + 1) / 2,) int32 of each row's pairs, as `blocks_of` reads them, and the most that a row has.
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
    order = jnp.take_along_axis(order, jnp.minimum(number, count - 1), 1)  # what follows the last pair repeats it
    taken = lambda x: jnp.asarray(x, jnp.int32)[order]
    outer = taken(j if by_key else i)
    end = jnp.full((rows, 1), -1, jnp.int32)
    first = outer != jnp.concatenate([end, outer[:, :-1]], 1)
    last = (outer != jnp.concatenate([outer[:, 1:], end], 1)) | (number == count - 1)
    whole = jnp.take_along_axis(kind, order, 1) == 2
    flags = REAL + jnp.where(whole, WHOLE, 0) + jnp.where(first, FIRST, 0) + jnp.where(last, LAST, 0)
    code = ((taken(i) << _PLACE | taken(j)) << _FLAGS) + jnp.where(number < count, flags, 0)
    return code.reshape(-1).astype(jnp.int32), count.max().astype(jnp.int32)


def blocks_of(code: Array) -> tuple[Array, Array]:
    """The blocks of a pair: query and key."""
    return code >> (_FLAGS + _PLACE), (code >> _FLAGS) & ((1 << _PLACE) - 1)
