"""Programs of one optimizer step along -sum_i c_i grad log pi_i: score rows, sum their gradients, step."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from gvpo_jax.model import Parameters, Setup, score
from gvpo_jax.spec import EMBEDDING

# -- programs; the first argument is a compile-time constant


def score_rows(setup: Setup, parameters: Parameters, adapters: Parameters, rows: Mapping[str, Array]) -> Array:
    """(B, P) float32 token log-probs."""
    return score(setup, parameters, adapters, rows)


def score_with_gradient(
    setup: Setup, parameters: Parameters, adapters: Parameters, rows: Mapping[str, Array]
) -> tuple[Array, Array]:
    """(B, P) log-probs, and the gradient of their sum with respect to the embedding, through every layer."""

    def scored(embedding: Array) -> tuple[Array, Array]:
        values = score(setup, {**parameters, EMBEDDING: embedding}, adapters, rows)
        return values.sum(), values

    (_, values), gradient = jax.value_and_grad(scored, has_aux=True)(parameters[EMBEDDING])
    return values, gradient


def distance(a: Array, b: Array) -> Array:
    """norm(a - b) / norm(a), float32."""
    a, b = (x.astype(jnp.float32) for x in (a, b))
    return jnp.sqrt(jnp.sum((a - b) ** 2) / jnp.sum(a**2))


def no_gradient(mesh: Mesh, shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> dict[str, Array]:
    """Zeros, to which gradients are added. `mesh` only makes programs of different meshes distinct."""
    return {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes}


@partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["tree", "given"])
@dataclass(frozen=True)
class Saved:
    """Arrays that a backward pass needs besides the arguments of its forward pass. Returning those would copy them."""

    arrays: list[Array]
    tree: Any  # structure of the backward function
    given: tuple[int | None, ...]  # for each leaf of the tree, its argument's number; None: it is in `arrays`


def forward(setup: Setup, trained: Parameters, frozen: Parameters, rows: Mapping[str, Array]) -> tuple[Array, Saved]:
    """(B, P) token log-probs, and the arrays that `backward` needs."""
    values, pull = jax.vjp(lambda t: _score(setup, t, frozen, rows), trained)
    places = {id(a): i for i, a in enumerate(jax.tree.leaves((trained, frozen, rows)))}
    leaves, tree = jax.tree.flatten(pull)
    given = tuple(places.get(id(leaf)) for leaf in leaves)
    return values, Saved([leaf for leaf, at in zip(leaves, given, strict=True) if at is None], tree, given)


def backward(
    total: Parameters, saved: Saved, trained: Parameters, frozen: Parameters, rows: Mapping[str, Array], factors: Array
) -> dict[str, Array]:
    """total - the gradient of sum factors * log pi. The other arguments must be those of the `forward` of `saved`."""
    arguments, stored = jax.tree.leaves((trained, frozen, rows)), iter(saved.arrays)
    leaves = [next(stored) if at is None else arguments[at] for at in saved.given]
    (gradient,) = jax.tree.unflatten(saved.tree, leaves)(-factors)
    return {name: total[name] + gradient[name].astype(jnp.float32) for name in total}


def accumulate(
    setup: Setup,
    total: Parameters,
    trained: Parameters,
    frozen: Parameters,
    rows: Mapping[str, Array],
    factors: Array,
) -> dict[str, Array]:
    """total - the gradient of sum factors * log pi of a micro-batch; `factors`: (B, P)."""
    _, pull = jax.vjp(lambda t: _score(setup, t, frozen, rows), trained)
    (gradient,) = pull(-factors)
    return {name: total[name] + gradient[name].astype(jnp.float32) for name in total}


def _score(setup: Setup, trained: Parameters, frozen: Parameters, rows: Mapping[str, Array]) -> Array:
    return score(setup, frozen, trained, rows) if setup.scale else score(setup, trained, {}, rows)


def norms(total: Parameters) -> tuple[Array, dict[str, Array]]:
    """Returns the gradient's norm, and each parameter's norm: (1,), or (L,) for stacked layers."""
    squares = {}
    for name, g in total.items():
        by_row = jnp.sum(g * g, -1)  # in two steps: one long float32 sum would lose digits
        squares[name] = jnp.sum(by_row.reshape(g.shape[0] if "*" in name else 1, -1), -1)
    all_squares = sum(jnp.sum(s) for s in squares.values())
    return jnp.sqrt(all_squares), {name: jnp.sqrt(s) for name, s in squares.items()}


def step(
    b1: float,
    b2: float,
    eps: float,
    trained: Parameters,
    state: optax.ScaleByAdamState,
    total: Parameters,
    numbers: Mapping[str, Array],
) -> tuple[dict[str, Array], optax.ScaleByAdamState]:
    """AdamW as in PyTorch, with weight decay on matrices only.

    Args:
      numbers: from `adamw_numbers`; the gradient is `total` times its clip.
    """
    scaled = {name: g * numbers["clip"] for name, g in total.items()}
    mu = {name: b1 * state.mu[name] + (1 - b1) * g for name, g in scaled.items()}
    nu = {name: b2 * state.nu[name] + (1 - b2) * g * g for name, g in scaled.items()}

    def moved(name: str, p: Array) -> Array:
        kept = p * numbers["keep"] if p.ndim - ("*" in name) >= 2 else p
        return kept - numbers["size"] * mu[name] / (jnp.sqrt(nu[name]) / numbers["root"] + eps)

    state = optax.ScaleByAdamState(state.count + 1, mu, nu)
    return {name: moved(name, p) for name, p in trained.items()}, state


def adamw_numbers(
    b1: float, b2: float, decay: float, rate: float, clip: float, steps_taken: int
) -> dict[str, np.ndarray]:
    """Returns the scalars of `step`, computed in float64: in float32, 1 - 0.9999 has a relative error of 1e-4."""
    t = steps_taken + 1
    numbers = {
        "clip": clip,
        "size": rate / (1 - b1**t),
        "root": math.sqrt(1 - b2**t),
        "keep": 1 - rate * decay,
    }
    return {name: np.asarray(value, np.float32) for name, value in numbers.items()}


def copied(dtype: np.dtype[Any], trained: Parameters) -> Parameters:
    """Copies the parameters to `dtype`; the result never shares memory with `trained`."""
    return {name: jnp.copy(value).astype(dtype) for name, value in trained.items()}


def no_moments(trained: Parameters) -> optax.ScaleByAdamState:
    """AdamW's state before the first step."""
    zeros = lambda: {name: jnp.zeros(p.shape, jnp.float32) for name, p in trained.items()}
    return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros(), zeros())


def clip_scale(total_norm: float, norms: Mapping[str, np.ndarray], limit: float) -> float:
    """Returns the factor that scales a gradient down to norm `limit` (0: never).

    Args:
      norms: each parameter's norm, from `norms`.
    Raises: FloatingPointError: the gradient is not finite; the message names the parameters.
    """
    if not math.isfinite(total_norm):
        each = {
            name.replace("*", str(i)): norm
            for name, layers in norms.items()
            for i, norm in enumerate(np.asarray(layers))
        }
        bad = sorted((name for name, norm in each.items() if not math.isfinite(norm)), key=_by_layer)
        raise FloatingPointError(
            f"the gradient norm is {total_norm}: the gradients of {len(bad)} of {len(each)} parameters are not finite, "
            f"the first {', '.join(bad[:3]) or 'none alone (their sum overflows)'}; no step was taken"
        )
    return min(1.0, limit / (total_norm + 1e-6)) if limit > 0 else 1.0


def _by_layer(name: str) -> tuple[int, str]:
    number = name.removeprefix("model.layers.").partition(".")[0]
    return (int(number) if number.isdigit() else -1, name)
