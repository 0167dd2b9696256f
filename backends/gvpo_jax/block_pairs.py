"""Which pairs of blocks of a row have a visible pair of tokens, in lists that the kernels of `blocks` go through."""

import jax.numpy as jnp
import numpy as np
from jax import Array

PARTS = 2**16  # segments of a prompt and its responses: those of the n-th in a row start at n * PARTS
REAL, WHOLE, FIRST, LAST = 1, 2, 4, 8  # of a pair of blocks; FIRST and LAST of those with one query's or key's block
_FLAGS, _PLACE = 4, 14  # bits


def kinds(segments: Array, positions: Array, window: Array | None, block: int) -> Array:
    """(B, n, n) int32 of blocks (query, key): 0 nothing is visible, 1 something may be, 2 everything is.

    Without a window 1 says that something is. Nothing of T x T is made.
    """
    cut = lambda x: x.reshape(x.shape[0], -1, block)
    rising = cut(jnp.where(segments < 0, np.iinfo(np.int32).max, segments))
    first, last = rising.min(-1), rising.max(-1)
    prompts = jnp.where(rising % PARTS == 0, rising // PARTS, -1)  # of which a token is one's own prompt
    none = prompts < 0
    first_prompt = jnp.where(none, PARTS, prompts).min(-1)
    query, key = (lambda x: x[:, :, None]), (lambda x: x[:, None, :])
    n = first.shape[1]
    before = np.arange(n)[None, :, None] >= np.arange(n)[None, None, :]
    own = (key(first) <= query(last)) & (key(last) >= query(first))
    prompt = (key(first_prompt) <= query(last) // PARTS) & (key(prompts.max(-1)) >= query(first) // PARTS)
    one = key(first) == key(last)
    alone = one & (query(first) == query(last)) & (key(first) == query(first))
    of_prompt = one & key(~none.any(-1)) & (query(first) // PARTS == query(last) // PARTS)
    of_prompt &= key(first) // PARTS == query(first) // PARTS
    seen, whole = own | prompt, (alone | of_prompt) & ~np.eye(n, dtype=bool)[None]
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
        order = np.lexsort((i, j))
        i, j = i[order], j[order]
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
