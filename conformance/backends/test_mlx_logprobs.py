"""MLX's chunked head against float64 NumPy over full logits: values, gradients, quantized heads, memory."""

import numpy as np
import pytest
from required import require

require("mlx.core", subject="mlx")

import mlx.core as mx
from gvpo_mlx.logprobs import Quantized, token_logprobs

T, H, V = 13, 64, 50
HEADS = {
    "plain": {},
    "softcap": {"softcap": 1.5},
    "scale": {"scale": 0.3},
    "both": {"softcap": 2.0, "scale": 1.7},
}
FACTORS = np.linspace(-1, 2, T)


def arguments(seed: int = 0) -> tuple[np.ndarray, ...]:
    draw = np.random.default_rng(seed)
    made = (draw.normal(size=shape) / 4 for shape in ((T, H), (V, H), (V,)))
    return (*(x.astype(np.float32) for x in made), draw.integers(0, V, T).astype(np.int32))


def plainly(hidden, weight, bias, targets, softcap=None, scale=1.0):
    """Values, and gradients of sum FACTORS * values by hand, float64."""
    h, w, b = (x.astype(np.float64) for x in (hidden, weight, bias))
    z = (h @ w.T + b) * scale
    slope = np.full_like(z, scale)
    if softcap is not None:
        z = softcap * np.tanh(z / softcap)
        slope = scale * (1 - (z / softcap) ** 2)
    highest = z.max(1, keepdims=True)
    lse = highest + np.log(np.exp(z - highest).sum(1, keepdims=True))
    rows = np.arange(T)
    g = -np.exp(z - lse)
    g[rows, targets] += 1.0
    g *= slope * FACTORS[:, None]
    return z[rows, targets] - lse[:, 0], g @ w, g.T @ h, g.sum(0)


def near(found: mx.array, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(np.array(found), expected, rtol=0, atol=tolerance * max(1.0, np.abs(expected).max()))


CASES = [(head, chunk, False) for head in HEADS for chunk in (1, 3, 100)] + [("both", 3, True)]  # g++ takes seconds


@pytest.mark.parametrize(("head", "chunk", "compiled"), CASES)
def test_values_and_gradients(head: str, chunk: int, compiled: bool) -> None:
    hidden, weight, bias, targets = arguments()
    on = mx.array(targets)

    def of(h, w, b, trained=True):
        values = token_logprobs(h, w, on, bias=b, trained=trained, chunk_bytes=chunk * V * 4, **HEADS[head])
        return (values * mx.array(FACTORS.astype(np.float32))).sum(), values

    grad = mx.value_and_grad(of, (0, 1, 2))
    grad = mx.compile(grad) if compiled else grad
    (_, values), grads = grad(*map(mx.array, (hidden, weight, bias)))
    expected = plainly(hidden, weight, bias, targets, **HEADS[head])
    for found, wanted in zip((values, *grads), expected, strict=True):
        near(found, wanted)
    frozen = mx.grad(lambda h: of(h, mx.array(weight), mx.array(bias), trained=False)[0])(mx.array(hidden))
    near(frozen, expected[1])


def test_a_frozen_head_has_no_gradient() -> None:
    hidden, weight, bias, targets = map(mx.array, arguments())
    of = lambda w: token_logprobs(hidden, w, targets, bias=bias, trained=False).sum()
    assert not np.array(mx.grad(of)(weight)).any()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_head_is_its_unpacked_self(bits: int) -> None:
    hidden, weight, bias, targets = arguments()
    packed, scales, biases = mx.quantize(mx.array(weight), group_size=32, bits=bits)
    quantized = Quantized(scales, biases, 32, bits, "affine")
    unpacked = np.array(mx.dequantize(packed, scales, biases, group_size=32, bits=bits))
    on = mx.array(targets)

    def of(h):
        values = token_logprobs(h, packed, on, bias=mx.array(bias), quantized=quantized, chunk_bytes=3 * V * 4)
        return (values * mx.array(FACTORS.astype(np.float32))).sum(), values

    (_, values), grad = mx.value_and_grad(of)(mx.array(hidden))
    expected = plainly(hidden, unpacked, bias, targets)
    near(values, expected[0])
    near(grad, expected[1])


def test_a_wide_head_under_narrow_hidden_stays_wide() -> None:
    hidden, weight, bias, targets = arguments()
    narrow = mx.array(hidden).astype(mx.bfloat16)
    values = token_logprobs(narrow, mx.array(weight), mx.array(targets))
    assert values.dtype == mx.float32
    near(values, plainly(np.array(narrow.astype(mx.float32)), weight, 0 * bias, targets)[0])


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, _, targets = arguments()
    of = lambda h: token_logprobs(h, mx.array(weight), mx.array(targets)).sum()
    value, grad = mx.value_and_grad(of)(mx.array(hidden * 1e4))
    assert np.isfinite(float(value)) and np.isfinite(np.array(grad)).all()


@pytest.mark.parametrize("trained", [True, False])
def test_a_chunk_is_let_go_before_the_next(trained: bool) -> None:
    """Peak memory beyond what was there: a part of the full logits, where plain log-softmax takes three times those."""
    tokens, vocabulary = 2048, 4096
    hidden, weight = mx.random.normal((tokens, 8), key=mx.random.key(0)), mx.zeros((vocabulary, 8))
    targets = mx.zeros((tokens,), dtype=mx.int32)
    mx.eval(hidden, weight, targets)
    whole = tokens * vocabulary * 4
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    of = lambda h, w: token_logprobs(h, w, targets, trained=trained, chunk_bytes=whole // 64).sum()
    mx.eval(mx.value_and_grad(of, (0, 1) if trained else 0)(hidden, weight))
    assert mx.get_peak_memory() - before < 3 * whole / 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": mx.zeros((T, H + 1))}, r"hidden has shape \(13, 65\) and head_weight \(50, 64\)"),
        ({"targets": mx.zeros((T + 1,), dtype=mx.int32)}, r"targets has shape \(14,\); expected \(13,\)"),
        ({"bias": mx.zeros((H,))}, r"bias has shape \(64,\); expected \(50,\)"),
        ({"chunk_bytes": 0}, "chunk_bytes is 0; expected at least 1"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message) -> None:
    hidden, weight, _, targets = map(mx.array, arguments())
    given = {"hidden": hidden, "head_weight": weight, "targets": targets} | change
    with pytest.raises(ValueError, match=message):
        token_logprobs(**given)
