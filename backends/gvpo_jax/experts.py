"""Mixture of experts: each token goes through the experts with the highest router scores; no token is dropped."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from gvpo_jax.logprobs import product


def mixture(
    layer: Mapping[str, Array],
    h: Array,
    *,
    count: int,
    normalised: bool,
    activate: Callable[[Array], Array],
    compute: Any,
) -> Array:
    """sum over a token's experts e of share_e * down_e(activate(gate_e(h)) * up_e(h)).

    Tokens are sorted by expert, so the tokens of an expert are one block of a ragged product.

    Args:
      layer: mlp.gate.weight (E, H); mlp.experts.#.gate_proj, up_proj (E, M, H), down_proj (E, H, M).
      h: (B, T, H).
      count: experts per token.
      normalised: whether the shares of a token's experts sum to one.
    Returns: (B, T, H) in the dtype of `h`.
    """
    flat = h.reshape(-1, h.shape[-1])
    router = layer["mlp.gate.weight"].astype(compute)
    shares = jax.nn.softmax(product("ni,ei->ne", flat, router).astype(jnp.float32), -1)
    best, chosen = lax.top_k(shares, count)  # (n, count)
    if normalised:
        best = best / best.sum(-1, keepdims=True)
    best = best.astype(h.dtype)
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    sizes = jnp.zeros(router.shape[0], jnp.int32).at[chosen.reshape(-1)].add(1)
    inputs = jnp.take(flat, order // count, axis=0)
    ragged = lambda x, name: _ragged(x, layer[f"mlp.experts.#.{name}_proj.weight"].astype(compute), sizes)
    outputs = ragged(activate(ragged(inputs, "gate")) * ragged(inputs, "up"), "down")
    outputs = outputs * jnp.take(best.reshape(-1), order)[:, None]
    back = jnp.take(outputs, jnp.argsort(order), axis=0).reshape(len(flat), count, -1)
    return back.sum(1).reshape(h.shape).astype(h.dtype)


def _ragged(x: Array, weights: Array, sizes: Array) -> Array:
    """Multiplies the first sizes[0] rows of x (n, I) by weights[0].T (O, I), the next sizes[1] by weights[1].T, ..."""
    precision = lax.Precision.HIGHEST if x.dtype.itemsize >= 4 else lax.Precision.DEFAULT
    return lax.ragged_dot(x, jnp.swapaxes(weights, 1, 2), sizes, precision=precision)
