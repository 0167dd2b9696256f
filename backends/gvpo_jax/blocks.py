"""Attention within rows by a Pallas kernel for TPUs. It stores no scores and skips blocks without a visible pair.

JAX's splash attention cannot express this mask. It needs equal segments; here a token also sees the segments that its
own segment continues. Its results for several masks cannot be differentiated together either. In all kernels, a block
has keys along the first axis and queries along the second, so a query's maximum, sum and segment are rows of numbers.
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

NARROWEST = 256  # tokens of a row; shorter rows have little to skip
MOST_PAIRS = 2**17  # of blocks, in all rows of a device; their codes are in its scalar memory
_HIDDEN = -1e30  # lower than any query's maximum score


@dataclass(frozen=True)
class Kernel:
    """What the kernels are compiled for, besides the shapes of their arguments."""

    mesh: Mesh
    heads: Any  # mesh axes over which heads are split
    block: int  # tokens
    scale: float
    cap: float | None
    windowed: bool  # some layer has a sliding window
    interpret: bool  # for tests on devices other than TPUs


def block_size(length: int) -> int:
    """Tokens per block, for rows of `length` tokens. Small blocks are skipped more often, large ones are faster."""
    return 128 if length <= 512 else 256 if length <= 2048 else 512


def fits(mesh: Mesh, rows: int, length: int) -> bool:
    """Whether the kernel can process rows of this shape."""
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
    """Returns the softmax-weighted values of the tokens that each token sees, as defined in `model.attention`.

    Args:
      q: (B, T, heads, width); k, v: (B, T, key heads, width).
      positions, segments, last: (B, T) int32, see `model.attention`. Segments rise along a row; padding is -1.
      window: () int32, size of the sliding window in tokens; used only if `windowed`.
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
    padding = -length % block
    pad = lambda x, value=0: jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2)), constant_values=value)
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
    """Returns the (keys, queries) bool mask of a pair of blocks."""
    i, j = blocks_of(code)
    sees = tokens["query_segments"][...] <= tokens["key_last"][...]
    shape = (kernel.block, kernel.block)
    order = lax.broadcasted_iota(jnp.int32, shape, 1) - lax.broadcasted_iota(jnp.int32, shape, 0)
    sees &= order >= (j - i) * kernel.block
    if kernel.windowed:
        sees &= tokens["query_positions"][...] - tokens["key_positions"][...] < window[0]
    return sees


def _each(code: Array, body: Callable[[bool], None]) -> None:
    """Runs `body`, with a mask if some pairs of tokens in the blocks are hidden."""
    pl.when(code & (REAL | WHOLE) == REAL)(lambda: body(True))
    pl.when(code & WHOLE > 0)(lambda: body(False))


def _forward_kernel(kernel: Kernel, slots: int, codes: Any, window: Any, refs: Any, out: Any, scratch: Any) -> None:
    code = codes[pl.program_id(0) * slots + pl.program_id(2)]
    highest, total, mixed = scratch

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
    """Returns (keys, queries) softmax weights, and the gradient of the scores before scale and cap."""
    scores = _scores(kernel, refs["q"][...], refs["k"][...])
    shares = jnp.exp(scores - refs["normaliser"][...])
    if masked:
        shares = jnp.where(_sees(kernel, code, window, refs), shares, 0.0)
    gradient = shares * (_product(refs["v"][...], refs["out_gradient"][...], 1, 1) - refs["mean"][...])
    if kernel.cap is not None:
        gradient = gradient * (1.0 - (scores / kernel.cap) ** 2)
    return shares, gradient * kernel.scale


def _query_kernel(kernel: Kernel, slots: int, codes: Any, window: Any, refs: Any, out: Any, scratch: Any) -> None:
    code = codes[pl.program_id(0) * slots + pl.program_id(2)]
    (total,) = scratch

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


def _key_kernel(kernel: Kernel, slots: int, codes: Any, window: Any, refs: Any, out: Any, scratch: Any) -> None:
    code, member = codes[pl.program_id(0) * slots + pl.program_id(2)], pl.program_id(3)

    @pl.when((code & FIRST > 0) & (member == 0))
    def _() -> None:
        for total in scratch:
            total[...] = jnp.zeros_like(total)

    def body(masked: bool) -> None:
        q, out_gradient = refs["q"][...], refs["out_gradient"][...]
        shares, gradient = _gradients(kernel, code, window, refs, masked)
        scratch[0][...] += _product(gradient.astype(q.dtype), q, 1, 0)
        scratch[1][...] += _product(shares.astype(out_gradient.dtype), out_gradient, 1, 0)

    _each(code, body)

    @pl.when((code & LAST > 0) & (member == pl.num_programs(3) - 1))
    def _() -> None:
        for result, total in zip(out, scratch, strict=True):
            result[...] = total[...].astype(result.dtype)


# -- calls on the arrays of one device: q, k, v (B, heads, T, width)


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
    """Runs a kernel over the visible pairs of blocks in every row and head.

    Args:
      arrays, out: inputs, and shapes and dtypes of the results. The name decides whether a block is read or written at
        the query's or at the key's place.
    """
    block, rows, heads = kernel.block, of_blocks.shape[0], arrays["q"].shape[1]
    key_heads = arrays["k"].shape[1]
    group = heads // key_heads
    codes, longest_list = pairs(of_blocks, by_key=by_key)
    slots = codes.shape[0] // rows  # codes per row

    def spec(name: str, shape: tuple[int, ...]) -> pl.BlockSpec:
        of_key = name in ("k", "v") or name.startswith("key_")

        def at(b: Array, h: Array, p: Array, *others: Any) -> tuple[Any, ...]:
            i, j = blocks_of(others[-2][b * slots + p])
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
        body(kernel, slots, codes_ref, window_ref, given, results, refs[len(arrays) + len(out) :])

    grid: tuple[Any, ...] = (rows, key_heads, longest_list, group) if by_key else (rows, heads, longest_list)
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
    """Returns the inputs of the mask: (B, 1, T) for queries, (B, T, 1) for keys."""
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
    out_gradient: Array,
) -> tuple[Array, Array, Array]:
    mean = _heads_first((mixed.astype(jnp.float32) * out_gradient.astype(jnp.float32)).sum(-1))[:, :, None]
    q, k, v, out_gradient = map(_heads_first, (q, k, v, out_gradient))
    arrays = {"q": q, "k": k, "v": v, "out_gradient": out_gradient, "normaliser": normaliser, "mean": mean}
    arrays |= _tokens(kernel, segments, last, positions)
    of_blocks, width = _blocks(kernel, segments, last, positions, window), q.shape[-1]
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    common = (kernel, of_blocks, window, arrays)
    (to_q,) = _call(_query_kernel, "gvpo_flash_queries", *common, {"q": like(q)}, [(width, kernel.block)])
    scratch, out = [(kernel.block, width)] * 2, {"k": like(k), "v": like(v)}
    to_k, to_v = _call(_key_kernel, "gvpo_flash_keys", *common, out, scratch, by_key=True)
    return _heads_first(to_q), _heads_first(to_k), _heads_first(to_v)


# -- over the mesh


def _sharded(kernel: Kernel, body: Any, arguments: str, results: str) -> Any:
    """Returns `body` as a function of sharded arrays, run on each device's rows and heads.

    Letters, one per array: r = split by rows only; h = also by heads, third axis; s = also by heads, second axis;
    1 = one number.
    """
    specs = {
        "r": PartitionSpec(BATCH),
        "h": PartitionSpec(BATCH, None, kernel.heads),
        "s": PartitionSpec(BATCH, kernel.heads),
        "1": PartitionSpec(),
    }
    of = lambda letters: tuple(specs[letter] for letter in letters)
    body = partial(body, kernel)
    return jax.shard_map(body, mesh=kernel.mesh, in_specs=of(arguments), out_specs=of(results), check_vma=False)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(kernel: Kernel, *arrays: Array) -> Array:
    out: Array = _sharded(kernel, _local_forward, "hhhrrr1", "hs")(*arrays)[0]
    return out


def _forward(kernel: Kernel, *arrays: Array) -> tuple[Array, tuple[Array, ...]]:
    mixed, normaliser = _sharded(kernel, _local_forward, "hhhrrr1", "hs")(*arrays)
    return mixed, (*arrays, mixed, normaliser)


def _backward(kernel: Kernel, saved: tuple[Array, ...], out_gradient: Array) -> tuple[Array | None, ...]:
    gradients = _sharded(kernel, _local_backward, "hhhrrr1hsh", "hhh")(*saved, out_gradient)
    return (*gradients, None, None, None, None)


_attend.defvjp(_forward, _backward)
