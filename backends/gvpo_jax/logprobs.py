"""Log-probabilities of given tokens from hidden states, without ever holding a [tokens, vocabulary] array."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gvpo_jax.mesh import BATCH, vocabulary_axes

CHUNK_BYTES = {"cpu": 48 * 2**20}
DEVICE_CHUNK_BYTES = 256 * 2**20


def token_logprobs(
    hidden: Array,
    head_weight: Array,
    targets: Array,
    *,
    chunk_bytes: int | None = None,
    frozen: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    mesh: Mesh | None = None,
) -> Array:
    """Returns the log-probability of each target under the head's softmax, computed in chunks of tokens.

    logits = hidden @ head_weight.T * scale, then softcap * tanh(logits / softcap) if a softcap is given
    result = logits[target] - logsumexp(logits)

    The backward pass recomputes each chunk's logits. If the head is frozen, the forward pass computes the gradient of
    `hidden` instead. Works under jit and grad, with either argument sharded.

    On a mesh, each device computes the logits of its part of the vocabulary. The head moves once, before all chunks,
    and its gradient is summed once, after them. A chunk moves only hidden states.

    Args:
      hidden: (..., T, H) float; differentiated. Chunks are cut along T.
      head_weight: (V, H) float; differentiated unless `frozen`.
      targets: (..., T) integer ids in [0, V).
      chunk_bytes: size of one chunk of logits over all leading axes. Default: 48 MiB if CPU is JAX's default
        backend, else 256 MiB.
      frozen: whether head_weight gets no gradient.
      scale, softcap: of the logits; softcap None: no cap.
      mesh: with the axes of `gvpo_jax.mesh`; `hidden` is then (B, T, H), rows sharded over data and fsdp. Default:
        the compiler chooses shardings.
    Returns: (..., T) float32, nats; float64 for float64 arguments.
    Raises: ValueError: shapes do not fit, or chunk_bytes < 1.
    """
    if hidden.ndim < 2 or head_weight.ndim != 2 or hidden.shape[-1] != head_weight.shape[1]:
        raise ValueError(
            f"hidden has shape {hidden.shape} and head_weight {head_weight.shape}; expected (..., T, H) and (V, H)"
        )
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets has shape {targets.shape}; expected {hidden.shape[:-1]}")
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES.get(jax.default_backend(), DEVICE_CHUNK_BYTES)
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes is {chunk_bytes}; expected at least 1")
    wide = jnp.promote_types(jnp.promote_types(hidden.dtype, head_weight.dtype), jnp.float32)
    length = targets.shape[-1]
    token = math.prod(targets.shape[:-1]) * head_weight.shape[0] * np.dtype(wide).itemsize
    rows = max(1, min(length, chunk_bytes // max(1, token)))
    parts = -(-length // rows)
    rows = -(-length // parts)  # even chunks: less padding
    padding = parts * rows - length
    if padding:
        hidden = jnp.pad(hidden, [(0, 0)] * (hidden.ndim - 2) + [(0, padding), (0, 0)])
        targets = jnp.pad(targets, [(0, 0)] * (targets.ndim - 1) + [(0, padding)])
    chunked = lambda x: jnp.moveaxis(x.reshape(*targets.shape[:-1], parts, rows, *x.shape[targets.ndim :]), -3, 0)
    axes = () if mesh is None else vocabulary_axes(mesh, head_weight.shape[0])
    head = _Head(np.dtype(wide).name, frozen, scale, softcap, mesh if axes else None, axes)
    chunks = _chunks(head, chunked(hidden), head_weight, chunked(targets[..., None])[..., 0])
    return jnp.moveaxis(chunks, 0, -2).reshape(targets.shape)[..., :length]


@dataclass(frozen=True)
class _Head:
    """The head's arithmetic on one chunk: products in the arguments' dtype, all else in float32 or wider."""

    wide: str
    frozen: bool
    scale: float
    softcap: float | None
    mesh: Mesh | None  # None: the compiler chooses shardings
    axes: tuple[str, ...]  # of the mesh, over which the vocabulary is split

    def place(self, x: Array, *axes: Any) -> Array:
        """Splits the axes of x over these axes of the mesh."""
        if self.mesh is None:
            return x
        return lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*axes)))

    def narrow(self, x: Array) -> Array:
        """Splits the last axis of x (B, t, V) over the vocabulary's axes of the mesh."""
        if self.mesh is None:
            return x
        return self.place(x, self.batch, *(None,) * (x.ndim - 2), self.axes)

    @property
    def batch(self) -> tuple[str, ...]:
        """The batch axes of the mesh that do not split the vocabulary."""
        return tuple(a for a in BATCH if a not in self.axes)

    def gathered(self, x: Array) -> Array:
        """Gathers the rows of x (B, t, ...) for a part of the vocabulary: split over the axes of `batch` only."""
        return self.place(x, self.batch)

    def spread(self, x: Array) -> Array:
        """Splits the rows of x (B, t, ...) over all batch axes."""
        return self.place(x, BATCH)

    def parts(self) -> int:
        """Number of parts of the batch. Each sums its own gradient of the head until all chunks are done."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[a] for a in self.batch)

    def product(self, spec: str, a: Array, b: Array) -> Array:
        return product(spec, a, b, wide=jnp.dtype(self.wide))

    def logits(self, hidden: Array, weight: Array) -> Array:
        products = self.narrow(self.product("...h,vh->...v", hidden, weight))
        return capped(products if self.scale == 1.0 else products * self.scale, self.softcap)

    def chosen(self, logits: Array, targets: Array) -> Array:
        # A comparison instead of a gather: it fuses, and it stays local if the vocabulary is sharded.
        return jnp.sum(jnp.where(self._is(logits, targets), logits, 0.0), -1)

    def gradient(self, logits: Array, normaliser: Array, targets: Array) -> Array:
        """d logprob / d (hidden @ weight.T)."""
        gradient = jnp.where(self._is(logits, targets), 1.0, 0.0) - jnp.exp(logits - normaliser[..., None])
        if self.softcap is not None:
            gradient = gradient * (1.0 - (logits / self.softcap) ** 2)
        return gradient if self.scale == 1.0 else gradient * self.scale

    @staticmethod
    def _is(logits: Array, targets: Array) -> Array:
        return lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[..., None]


def capped(logits: Array, cap: float | None) -> Array:
    """cap * tanh(logits / cap); unchanged if cap is None."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def product(spec: str, a: Array, b: Array, *, wide: Any = None) -> Array:
    """einsum in the narrower of the two dtypes. float32 products keep float32 precision on every platform."""
    narrow = min(a.dtype, b.dtype, key=lambda dtype: jnp.dtype(dtype).itemsize)
    precision = lax.Precision.HIGHEST if jnp.dtype(narrow).itemsize >= 4 else lax.Precision.DEFAULT
    return jnp.einsum(spec, a.astype(narrow), b.astype(narrow), precision=precision, preferred_element_type=wide)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunks(head: _Head, hidden: Array, weight: Array, targets: Array) -> Array:
    """(parts, ..., t, H), (V, H), (parts, ..., t) -> (parts, ..., t)."""
    weight = head.place(weight, head.axes)

    def one(carry: None, x: tuple[Array, Array]) -> tuple[None, Array]:
        states, chunk_targets = map(head.gathered, x)
        logits = head.logits(states, weight)
        return carry, head.spread(head.chosen(logits, chunk_targets) - jax.nn.logsumexp(logits, -1))

    return lax.scan(one, None, (hidden, targets))[1]


def _forward(head: _Head, hidden: Array, weight: Array, targets: Array) -> tuple[Array, Any]:
    placed = head.place(weight, head.axes)

    def one(carry: None, x: tuple[Array, Array]) -> tuple[None, tuple[Array, Array]]:
        states, chunk_targets = map(head.gathered, x)
        logits = head.logits(states, placed)
        normaliser = jax.nn.logsumexp(logits, -1)
        kept = normaliser
        if head.frozen:
            g = head.narrow(head.gradient(logits, normaliser, chunk_targets).astype(weight.dtype))
            kept = head.product("...v,vh->...h", g, placed).astype(hidden.dtype)
        return carry, (head.spread(head.chosen(logits, chunk_targets) - normaliser), head.spread(kept))

    logprobs, kept = lax.scan(one, None, (hidden, targets))[1]
    return logprobs, (kept, weight, None, None) if head.frozen else (hidden, weight, targets, kept)


def _backward(head: _Head, saved: Any, factors: Array) -> tuple[Array, Array, None]:
    hidden, weight, targets, normalisers = saved
    if head.frozen:
        return (hidden * factors[..., None]).astype(hidden.dtype), jnp.zeros_like(weight), None
    placed = head.place(weight, head.axes)
    each = head.parts()

    def one(total: Array, x: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        states, chunk_targets, normaliser, factor = map(head.gathered, x)
        g = head.gradient(head.logits(states, placed), normaliser, chunk_targets) * factor[..., None]
        g = g.astype(min(states.dtype, weight.dtype, key=lambda dtype: jnp.dtype(dtype).itemsize))
        g = head.narrow(g)
        split = lambda x, *last: head.place(x.reshape(each, -1, x.shape[-1]), head.batch, None, *last)
        total = total + head.product("dnv,dnh->dvh", split(g, head.axes), split(states))
        moved = head.product("...v,vh->...h", g, placed).astype(hidden.dtype)
        return head.place(total, head.batch, head.axes), head.spread(moved)

    total = head.place(jnp.zeros((each, *weight.shape), factors.dtype), head.batch, head.axes)
    total, grad = lax.scan(one, total, (hidden, targets, normalisers, factors))
    return grad, head.place(total.sum(0), head.axes).astype(weight.dtype), None


_chunks.defvjp(_forward, _backward)
