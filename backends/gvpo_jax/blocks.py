"""Attention of rows by a Pallas kernel for TPUs: no scores in memory, and no block of them without a visible pair.

JAX's splash attention cannot express this mask: its segments must be equal, where here a token also sees those that
its own continues, and its results of several masks cannot be differentiated together. In all kernels keys are along the
first axis of a block and queries along the second, so that a query's maximum, sum and segment are rows of numbers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec

from gvpo_jax.block_pairs import FIRST, LAST, PADDING, REAL, WHOLE, blocks_of, kinds, pairs
from gvpo_jax.mesh import BATCH, fitting, is_tpu, parts, tensor_axes

NARROWEST = 256  # tokens of a row: below there is little to skip
MOST_PAIRS = 2**17  # of blocks, in all rows of a device: they are in its scalar memory
_HIDDEN = -1e30  # a score that no query's maximum is


@dataclass(frozen=True)
class Kernel:
    """What the kernels are compiled for beside the shapes of their arguments."""

    mesh: Mesh
    heads: Any  # axes of the mesh that heads are split over
    block: int  # tokens
    scale: float
    cap: float | None
    windowed: bool  # some layer does not see all tokens before
    interpret: bool  # on a device that is no TPU, in tests


def block_size(length: int) -> int:
    """Tokens of a block in rows of `length` tokens: small ones are skipped more often, large ones are faster."""
    return 128 if length <= 512 else 256 if length <= 2048 else 512


def fits(mesh: Mesh, rows: int, length: int) -> bool:
    """Whether rows of this shape go through the kernel."""
    shards, n = parts(mesh, BATCH), -(-length // block_size(length))
    return length >= NARROWEST and rows % shards == 0 and rows // shards * (n * (n + 1) // 2) <= MOST_PAIRS


def attend(
    mesh: Mesh,
    q: Array,
    k: Array,
    v: Array,
    positions: Array,
    segments: Array,
    last: Array,
    window: Array,
    *,
    scale: float,
    cap: float | None,
    windowed: bool,
) -> Array:
    """Softmax-weighted values of the tokens that each token sees, as `model.attention` says.

    Args:
      q: (B, T, heads, width); k, v: (B, T, key heads, width).
      positions, segments, last: (B, T) int32, see `model.attention`; segments rise along a row, but for -1 at its end.
      window: () int32, tokens that a token sees back; read if `windowed`.
    Returns: (B, T, heads, width).
    """
    length, heads, key_heads = q.shape[1], q.shape[2], k.shape[2]
    over = tensor_axes(mesh)
    common = math.lcm(key_heads, parts(mesh, over))
    if heads % common == 0 and common > key_heads:  # each part of the mesh needs a head of keys
        k, v = (jnp.repeat(x, common // key_heads, 2) for x in (k, v))
    block = block_size(length)
    axes = fitting(mesh, over, math.gcd(heads, k.shape[2]))
    kernel = Kernel(mesh, axes, block, scale, cap, windowed, not is_tpu(mesh))
    more = -length % block
    pad = lambda x, value=0: jnp.pad(x, ((0, 0), (0, more), *((0, 0),) * (x.ndim - 2)), constant_values=value)
    ends = (pad(jnp.where(segments < 0, PADDING, x), PADDING) for x in (segments, last))
    out = _attend(kernel, pad(q), pad(k), pad(v), *ends, pad(positions), window)
    return out[:, :length]


# -- kernels


def _product(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((axis_a,), (axis_b,)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _scores(kernel: Kernel, q: Array, k: Array) -> Array:
    scores = _product(k, q, 1, 1) * kernel.scale
    return scores if kernel.cap is None else kernel.cap * jnp.tanh(scores / kernel.cap)


def _sees(kernel: Kernel, code: Array, window: Any, tokens: Any) -> Array:
    """(keys, queries) bool of a pair of blocks."""
    i, j = blocks_of(code)
    sees = tokens["query_segments"][...] <= tokens["key_last"][...]
    shape = (kernel.block, kernel.block)
    order = lax.broadcasted_iota(jnp.int32, shape, 1) - lax.broadcasted_iota(jnp.int32, shape, 0)
    sees &= order >= (j - i) * kernel.block
    if kernel.windowed:
        sees &= tokens["query_positions"][...] - tokens["key_positions"][...] < window[0]
    return sees


def _each(code: Array, body: Callable[[bool], None]) -> None:
    """Runs the body with a mask where the pair of blocks needs one."""
    pl.when(code & (REAL | WHOLE) == REAL)(lambda: body(True))
    pl.when(code & WHOLE > 0)(lambda: body(False))


def _forward_kernel(kernel: Kernel, most: int, codes: Any, window: Any, refs: Any, out: Any, kept: Any) -> None:
    code = codes[pl.program_id(0) * most + pl.program_id(2)]
    highest, total, mixed = kept

    @pl.when(code & FIRST > 0)
    def _() -> None:
        highest[...] = jnp.full_like(highest, _HIDDEN)
        total[...] = jnp.zeros_like(total)
        mixed[...] = jnp.zeros_like(mixed)

    def body(masked: bool) -> None:
        scores = _scores(kernel, refs["q"][...], refs["k"][...])
        if masked:
            scores = jnp.where(_sees(kernel, code, window, refs), scores, _HIDDEN)
        top = jnp.maximum(highest[...], scores.max(0, keepdims=True))
        shares, less = jnp.exp(scores - top), jnp.exp(highest[...] - top)
        highest[...] = top
        total[...] = total[...] * less + shares.sum(0, keepdims=True)
        v = refs["v"][...]
        mixed[...] = mixed[...] * less + _product(v, shares.astype(v.dtype), 0, 0)

    _each(code, body)

    @pl.when(code & LAST > 0)
    def _() -> None:
        out[0][...] = (mixed[...] / total[...]).T.astype(out[0].dtype)
        out[1][...] = highest[...] + jnp.log(total[...])


def _gradients(kernel: Kernel, code: Array, window: Any, refs: Any, masked: bool) -> tuple[Array, Array]:
    """(keys, queries) shares of the softmax, and the gradient of the scores before their scale and cap."""
    scores = _scores(kernel, refs["q"][...], refs["k"][...])
    shares = jnp.exp(scores - refs["normaliser"][...])
    if masked:
        shares = jnp.where(_sees(kernel, code, window, refs), shares, 0.0)
    gradient = shares * (_product(refs["v"][...], refs["above"][...], 1, 1) - refs["mean"][...])
    if kernel.cap is not None:
        gradient = gradient * (1.0 - (scores / kernel.cap) ** 2)
    return shares, gradient * kernel.scale


def _query_kernel(kernel: Kernel, most: int, codes: Any, window: Any, refs: Any, out: Any, kept: Any) -> None:
    code = codes[pl.program_id(0) * most + pl.program_id(2)]
    (total,) = kept

    @pl.when(code & FIRST > 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    def body(masked: bool) -> None:
        k = refs["k"][...]
        _, gradient = _gradients(kernel, code, window, refs, masked)
        total[...] += _product(k, gradient.astype(k.dtype), 0, 0)

    _each(code, body)

    @pl.when(code & LAST > 0)
    def _() -> None:
        out[0][...] = total[...].T.astype(out[0].dtype)


def _key_kernel(kernel: Kernel, most: int, codes: Any, window: Any, refs: Any, out: Any, kept: Any) -> None:
    code, member = codes[pl.program_id(0) * most + pl.program_id(2)], pl.program_id(3)

    @pl.when((code & FIRST > 0) & (member == 0))
    def _() -> None:
        for total in kept:
            total[...] = jnp.zeros_like(total)

    def body(masked: bool) -> None:
        q, above = refs["q"][...], refs["above"][...]
        shares, gradient = _gradients(kernel, code, window, refs, masked)
        kept[0][...] += _product(gradient.astype(q.dtype), q, 1, 0)
        kept[1][...] += _product(shares.astype(above.dtype), above, 1, 0)

    _each(code, body)

    @pl.when((code & LAST > 0) & (member == pl.num_programs(3) - 1))
    def _() -> None:
        for one, total in zip(out, kept, strict=True):
            one[...] = total[...].astype(one.dtype)


# -- calls, of what one device holds: q, k, v (B, heads, T, width)


def _call(
    body: Any,
    name: str,
    kernel: Kernel,
    of_blocks: Array,
    window: Array,
    arrays: dict[str, Array],
    out: dict[str, Any],
    scratch: list[tuple[int, int]],
    *,
    by_key: bool = False,
) -> list[Array]:
    """Runs a kernel over the visible pairs of blocks of every row and head.

    Args:
      out: shapes and dtypes of the results, whose names say as those of `arrays` which of their blocks is at hand.
    """
    block, rows, heads = kernel.block, of_blocks.shape[0], arrays["q"].shape[1]
    key_heads = arrays["k"].shape[1]
    group = heads // key_heads
    codes, most_here = pairs(of_blocks, by_key=by_key)
    most = codes.shape[0] // rows

    def spec(name: str, shape: tuple[int, ...]) -> pl.BlockSpec:
        of_key = name in ("k", "v") or name.startswith("key_")

        def at(b: Array, h: Array, p: Array, *others: Any) -> tuple[Any, ...]:
            i, j = blocks_of(others[-2][b * most + p])
            place = j if of_key else i
            if len(shape) == 3:
                return (b, place, 0) if of_key else (b, 0, place)
            if by_key:
                head = h if of_key else h * group + others[0]
            else:
                head = h // group if of_key else h
            return (b, head, 0, place) if shape[2] == 1 else (b, head, place, 0)

        sizes = (block, shape[-1]) if shape[-2] != 1 else (1, block)
        return pl.BlockSpec((*(None,) * (len(shape) - 2), *sizes), at)

    def run(codes_ref: Any, window_ref: Any, *refs: Any) -> None:
        given, results = dict(zip(arrays, refs, strict=False)), refs[len(arrays) : len(arrays) + len(out)]
        body(kernel, most, codes_ref, window_ref, given, results, refs[len(arrays) + len(out) :])

    grid: tuple[Any, ...] = (rows, key_heads, most_here, group) if by_key else (rows, heads, most_here)
    semantics: tuple[Any, ...] = ("parallel", "parallel", *("arbitrary",) * (len(grid) - 2))
    results: list[Array] = pl.pallas_call(
        run,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid,
            in_specs=[spec(name, a.shape) for name, a in arrays.items()],
            out_specs=[spec(name, a.shape) for name, a in out.items()],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=list(out.values()),
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
        interpret=kernel.interpret,
        name=name,
    )(codes, window.reshape(1), *arrays.values())
    return results


def _tokens(kernel: Kernel, segments: Array, last: Array, positions: Array) -> dict[str, Array]:
    """What the mask is made of: of queries (B, 1, T), of keys (B, T, 1)."""
    of = {"query_segments": segments[:, None], "key_last": last[:, :, None]}
    if kernel.windowed:
        of |= {"query_positions": positions[:, None], "key_positions": positions[:, :, None]}
    return of


def _heads_first(x: Array) -> Array:
    return x.swapaxes(1, 2)


def _blocks(kernel: Kernel, segments: Array, last: Array, positions: Array, window: Array) -> Array:
    return kinds(segments, last, positions, window if kernel.windowed else None, kernel.block)


def _local_forward(
    kernel: Kernel, q: Array, k: Array, v: Array, segments: Array, last: Array, positions: Array, window: Array
) -> tuple[Array, Array]:
    q, k, v = map(_heads_first, (q, k, v))
    rows, heads, length, width = q.shape
    out = {"q": jax.ShapeDtypeStruct(q.shape, q.dtype)}
    out["normaliser"] = jax.ShapeDtypeStruct((rows, heads, 1, length), jnp.float32)
    arrays = {"q": q, "k": k, "v": v} | _tokens(kernel, segments, last, positions)
    scratch = [(1, kernel.block), (1, kernel.block), (width, kernel.block)]
    of_blocks = _blocks(kernel, segments, last, positions, window)
    mixed, normaliser = _call(_forward_kernel, "gvpo_flash", kernel, of_blocks, window, arrays, out, scratch)
    return _heads_first(mixed), normaliser


def _local_backward(
    kernel: Kernel,
    q: Array,
    k: Array,
    v: Array,
    segments: Array,
    last: Array,
    positions: Array,
    window: Array,
    mixed: Array,
    normaliser: Array,
    above: Array,
) -> tuple[Array, Array, Array]:
    mean = _heads_first((mixed.astype(jnp.float32) * above.astype(jnp.float32)).sum(-1))[:, :, None]
    q, k, v, above = map(_heads_first, (q, k, v, above))
    arrays = {"q": q, "k": k, "v": v, "above": above, "normaliser": normaliser, "mean": mean}
    arrays |= _tokens(kernel, segments, last, positions)
    of_blocks, width = _blocks(kernel, segments, last, positions, window), q.shape[-1]
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    given = (kernel, of_blocks, window, arrays)
    (to_q,) = _call(_query_kernel, "gvpo_flash_queries", *given, {"q": like(q)}, [(width, kernel.block)])
    scratch, out = [(kernel.block, width)] * 2, {"k": like(k), "v": like(v)}
    to_k, to_v = _call(_key_kernel, "gvpo_flash_keys", *given, out, scratch, by_key=True)
    return _heads_first(to_q), _heads_first(to_k), _heads_first(to_v)


# -- over the mesh


def _sharded(kernel: Kernel, body: Any, given: str, results: str) -> Any:
    """The body on each device's rows and heads; letters: r rows alone, h heads third, s heads second, 1 one number."""
    specs = {
        "r": PartitionSpec(BATCH),
        "h": PartitionSpec(BATCH, None, kernel.heads),
        "s": PartitionSpec(BATCH, kernel.heads),
        "1": PartitionSpec(),
    }
    of = lambda letters: tuple(specs[letter] for letter in letters)
    body = partial(body, kernel)
    return jax.shard_map(body, mesh=kernel.mesh, in_specs=of(given), out_specs=of(results), check_vma=False)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(kernel: Kernel, *given: Array) -> Array:
    out: Array = _sharded(kernel, _local_forward, "hhhrrr1", "hs")(*given)[0]
    return out


def _forward(kernel: Kernel, *given: Array) -> tuple[Array, tuple[Array, ...]]:
    mixed, normaliser = _sharded(kernel, _local_forward, "hhhrrr1", "hs")(*given)
    return mixed, (*given, mixed, normaliser)


def _backward(kernel: Kernel, kept: tuple[Array, ...], above: Array) -> tuple[Array | None, ...]:
    gradients = _sharded(kernel, _local_backward, "hhhrrr1hsh", "hhh")(*kept, above)
    return (*gradients, None, None, None, None)


_attend.defvjp(_forward, _backward)
