"""The chunked head against log_softmax over full logits: values, gradients, and no [tokens, vocabulary] array."""

import math

import pytest
from required import require

require("jax", subject="jax")

import jax
import jax.numpy as jnp
import numpy as np
from gvpo_jax.logprobs import token_logprobs
from hlo import arrays_with

T, H, V = 13, 8, 50


def arguments(dtype=jnp.float32, leading: tuple[int, ...] = ()):
    draw = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(draw.standard_normal(shape), dtype)
    return make(*leading, T, H), make(V, H), jnp.asarray(draw.integers(0, V, (*leading, T)), jnp.int32)


def exactly(hidden, weight, targets, factors):
    """Values and gradients in float64, from the equations."""
    h, w, f = (np.asarray(a, np.float64) for a in (hidden, weight, factors))
    z = h @ w.T
    normaliser = np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1)) + z.max(-1)
    chosen = np.take_along_axis(z, np.asarray(targets)[..., None], -1)[..., 0]
    g = (np.eye(V)[np.asarray(targets)] - np.exp(z - normaliser[..., None])) * f[..., None]
    return chosen - normaliser, g @ w, g.reshape(-1, V).T @ h.reshape(-1, H)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("leading", [(), (3,)])
@pytest.mark.parametrize("tokens", [1, 3, 100])
def test_values_and_gradients(tokens: int, leading: tuple[int, ...], frozen: bool) -> None:
    hidden, weight, targets = arguments(leading=leading)
    factors = jnp.linspace(-1, 2, targets.size).reshape(targets.shape)
    chunk = tokens * math.prod(leading) * V * 4
    f = jax.jit(lambda h, w: token_logprobs(h, w, targets, chunk_bytes=chunk, frozen=frozen))
    values, pull = jax.vjp(f, hidden, weight)
    assert values.dtype == jnp.float32
    exact = exactly(hidden, weight, targets, factors)
    found = (values, *pull(factors))
    for a, b in list(zip(found, exact, strict=True))[: 2 if frozen else 3]:
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)
    if frozen:
        assert not found[2].any()


def test_bfloat16_arguments_are_upcast_before_any_sum() -> None:
    hidden, weight, targets = arguments(jnp.bfloat16)
    exact = exactly(hidden, weight, targets, np.ones(T))[0]
    values = token_logprobs(hidden, weight, targets)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, exact, rtol=0, atol=1e-4)


def test_float64_stays_float64() -> None:
    with jax.enable_x64(True):
        hidden, weight, targets = arguments(jnp.float64)
        values = token_logprobs(hidden, weight, targets, chunk_bytes=3 * V * 8)
        np.testing.assert_allclose(values, exactly(hidden, weight, targets, np.ones(T))[0], rtol=1e-12)


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, targets = arguments()
    values, pull = jax.vjp(lambda h: token_logprobs(h, weight, targets), hidden * 1e4)
    assert jnp.isfinite(values).all()
    assert jnp.isfinite(pull(jnp.ones(T))[0]).all()


@pytest.mark.parametrize("frozen", [False, True])
def test_the_compiled_program_holds_no_array_of_tokens_by_vocabulary(frozen: bool) -> None:
    vocabulary, tokens, rows = 1031, 64, 4  # a prime, so that only the vocabulary has this size
    hidden, weight = jnp.zeros((tokens, H)), jnp.zeros((vocabulary, H))
    targets = jnp.zeros(tokens, jnp.int32)

    def compiled(chunk_bytes: int) -> list[tuple[int, ...]]:
        def loss(h, w):
            return token_logprobs(h, w, targets, chunk_bytes=chunk_bytes, frozen=frozen).sum()

        return arrays_with(vocabulary, jax.jit(jax.grad(loss, (0, 1))).lower(hidden, weight).compile().as_text())

    largest = max(math.prod(shape) for shape in compiled(rows * vocabulary * 4))
    assert largest <= vocabulary * max(rows, H)
    assert max(math.prod(shape) for shape in compiled(1 << 30)) == vocabulary * tokens  # what is looked for is seen


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": np.zeros((T, H + 1))}, r"hidden has shape \(13, 9\) and head_weight \(50, 8\)"),
        ({"targets": np.zeros(T + 1, np.int32)}, r"targets has shape \(14,\); expected \(13,\)"),
        ({"chunk_bytes": 0}, "chunk_bytes is 0; expected at least 1"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message) -> None:
    hidden, weight, targets = arguments()
    with pytest.raises(ValueError, match=message):
        token_logprobs(**({"hidden": hidden, "head_weight": weight, "targets": targets} | change))


@pytest.mark.parametrize("frozen", [False, True])
def test_scaled_and_capped_logits_are_those_of_float64(frozen: bool) -> None:
    draw = np.random.default_rng(0)
    hidden, weight = draw.normal(size=(2, 5, 8)), draw.normal(size=(33, 8))
    targets, factors = draw.integers(0, 33, (2, 5)), draw.normal(size=(2, 5))

    def plain(h, w):
        z = 2.0 * jnp.tanh(h @ w.T * 0.7 / 2.0)
        chosen = jnp.take_along_axis(z, jnp.asarray(targets)[..., None], -1)[..., 0]
        return jnp.sum((chosen - jax.nn.logsumexp(z, -1)) * factors)

    def chunked(h, w):
        options = {"chunk_bytes": 33 * 8 * 4, "frozen": frozen, "scale": 0.7, "softcap": 2.0}
        return jnp.sum(token_logprobs(h, w, jnp.asarray(targets), **options) * factors)

    with jax.enable_x64(True):
        arguments = jnp.asarray(hidden), jnp.asarray(weight)
        (one, wanted), (two, found) = (jax.value_and_grad(f, (0, 1))(*arguments) for f in (plain, chunked))
        np.testing.assert_allclose(two, one, rtol=1e-12)
        np.testing.assert_allclose(found[0], wanted[0], rtol=0, atol=1e-12)
        np.testing.assert_allclose(found[1], np.zeros_like(weight) if frozen else wanted[1], rtol=0, atol=1e-12)
