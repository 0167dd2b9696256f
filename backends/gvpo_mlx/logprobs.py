"""Log-probabilities of given tokens from hidden states, without ever holding a [tokens, vocabulary] array."""

from typing import Any, NamedTuple

import mlx.core as mx

CPU_CHUNK_BYTES = 4 * 2**20
DEVICE_CHUNK_BYTES = 64 * 2**20  # about ten chunks are live at once: MLX keeps that many operations' buffers


class Quantized(NamedTuple):
    """What a quantized (V, H) matrix has besides its packed weight; see `mx.quantize`."""

    scales: mx.array
    biases: mx.array | None
    group_size: int
    bits: int
    mode: str


def token_logprobs(
    hidden: mx.array,
    head_weight: mx.array,
    targets: mx.array,
    *,
    bias: mx.array | None = None,
    quantized: Quantized | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    trained: bool = True,
    chunk_bytes: int | None = None,
) -> mx.array:
    """Returns the log-probability of each target under the head's softmax, computed in chunks of tokens.

    logits = softcap * tanh(scale * (hidden @ head_weight.T + bias) / softcap)
    result = logits[target] - logsumexp(logits)

    The backward pass recomputes each chunk's logits. Each chunk depends on the result of the one before, because MLX
    would otherwise evaluate the chunks side by side and store them all. Products use the wider dtype of `hidden` and
    `head_weight`, everything else float32.

    Args:
      hidden: (T, H) float; differentiated.
      head_weight: (V, H) float, or packed if `quantized` is given; differentiated if `trained`.
      targets: (T,) integer ids in [0, V).
      bias: (V,) float; differentiated if `trained`.
      quantized: how `head_weight` is packed; never trained. Default: not packed.
      softcap: caps the logits as Gemma 2 does. Default: off.
      scale: factor of the logits (Cohere's logit_scale, 1 / Granite's logits_scaling).
      trained: whether the head gets a gradient. False: its gradient is zero and costs nothing.
      chunk_bytes: size of one chunk of logits. Default: 4 MiB on CPU, 64 MiB on a GPU.
    Returns: (T,) float32, nats.
    Raises: ValueError: shapes do not fit, or chunk_bytes < 1.
    """
    if chunk_bytes is None:
        chunk_bytes = CPU_CHUNK_BYTES if mx.default_device() == mx.cpu else DEVICE_CHUNK_BYTES
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes is {chunk_bytes}; expected at least 1")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets has shape {targets.shape}; expected {hidden.shape[:1]}")
    width = head_weight.shape[1] if quantized is None else head_weight.shape[1] * 32 // quantized.bits
    if hidden.ndim != 2 or hidden.shape[1] != width:
        raise ValueError(
            f"hidden has shape {hidden.shape} and head_weight {(head_weight.shape[0], width)}; "
            "expected (T, H) and (V, H)"
        )
    if bias is not None and bias.shape != head_weight.shape[:1]:
        raise ValueError(f"bias has shape {bias.shape}; expected {head_weight.shape[:1]}")
    rows = max(1, chunk_bytes // (head_weight.shape[0] * 4))
    head = _Head(quantized, softcap, scale)
    if trained and quantized is None:
        weights = [head_weight] if bias is None else [head_weight, bias]
        return _trained(head, targets, rows)(hidden, *weights)
    return _frozen(head, targets, rows, head_weight, bias)(hidden)


def logsumexp(logits: mx.array) -> mx.array:
    """(..., V) float32 -> (...): log sum exp over the last axis, in pieces of at most 512.

    On CPU, `mx.logsumexp` adds float32 numbers one after another, and is 2.6e-4 too low for 152,000 logits.
    """
    vocabulary = logits.shape[-1]
    size = next((n for n in range(512, 31, -1) if vocabulary % n == 0), 0)
    if not size:
        size = 256
        added = -vocabulary % size
        logits = mx.pad(logits, [(0, 0)] * (logits.ndim - 1) + [(0, added)], constant_values=-mx.inf)
    return mx.logsumexp(mx.logsumexp(logits.reshape(*logits.shape[:-1], -1, size), -1), -1)


class _Head:
    """The head's arithmetic on one chunk."""

    def __init__(self, quantized: Quantized | None, softcap: float | None, scale: float) -> None:
        self.quantized, self.softcap, self.scale = quantized, softcap, scale

    def multiply(self, x: mx.array, weight: mx.array, *, transpose: bool) -> mx.array:
        """x @ weight.T, or x @ weight."""
        if self.quantized is None:
            return x @ (weight.T if transpose else weight)
        q = self.quantized
        options: dict[str, Any] = {"group_size": q.group_size, "bits": q.bits, "mode": q.mode}
        return mx.quantized_matmul(x, weight, q.scales, q.biases, transpose=transpose, **options)

    def logits(self, hidden: mx.array, weight: mx.array, bias: mx.array | None) -> mx.array:
        """(t, V) float32 logits."""
        z = self.multiply(hidden, weight, transpose=True).astype(mx.float32)
        if bias is not None:
            z = z + bias.astype(mx.float32)
        if self.scale != 1.0:
            z = z * self.scale
        return z if self.softcap is None else mx.tanh(z / self.softcap) * self.softcap

    def gradient(self, logits: mx.array, logprobs: mx.array, targets: mx.array, factors: mx.array) -> mx.array:
        """d (sum factors * logprobs) / d (hidden @ weight.T + bias), (t, V) float32."""
        chosen = mx.take_along_axis(logits, targets[:, None], 1)
        p = mx.exp(logits - (chosen - logprobs[:, None]))
        hit = mx.arange(logits.shape[1], dtype=targets.dtype)[None] == targets[:, None]
        factors = factors[:, None] * self.scale
        g = (hit - p) * factors
        return g if self.softcap is None else g * (1.0 - mx.square(logits / self.softcap))


def _logprobs(
    head: _Head, hidden: mx.array, weight: mx.array, bias: mx.array | None, targets: mx.array, rows: int
) -> mx.array:
    parts: list[mx.array] = []
    for start in range(0, len(targets), rows):
        part = hidden[start : start + rows]
        if parts:
            part = mx.depends(part, parts[-1])
        logits = head.logits(part, weight, bias)
        chosen = mx.take_along_axis(logits, targets[start : start + rows, None], 1).squeeze(1)
        parts.append(chosen - logsumexp(logits))
    return mx.concatenate(parts) if parts else mx.zeros((0,))


def _trained(head: _Head, targets: mx.array, rows: int) -> Any:
    @mx.custom_function
    def logprobs(hidden: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
        return _logprobs(head, hidden, weight, bias, targets, rows)

    @logprobs.vjp
    def backward(primals: Any, factors: mx.array, outputs: mx.array) -> tuple[mx.array, ...]:
        hidden, weight, *bias = primals
        # This dependency on the factors keeps the compiler from merging these logits with those of the forward pass.
        hidden = mx.depends(hidden, factors)
        grad_hidden: list[mx.array] = []
        grad_weight = mx.zeros(weight.shape)
        grad_bias = mx.zeros(weight.shape[:1])
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            h = mx.depends(hidden[part], [grad_hidden[-1], grad_weight]) if grad_hidden else hidden[part]
            logits = head.logits(h, weight, bias[0] if bias else None)
            g = head.gradient(logits, outputs[part], targets[part], factors[part])
            grad_hidden.append((g @ weight).astype(hidden.dtype))
            grad_weight = mx.addmm(grad_weight, g.T, h.astype(mx.float32))
            if bias:
                grad_bias = grad_bias + g.sum(0)
        grads = [
            mx.concatenate(grad_hidden) if grad_hidden else mx.zeros_like(hidden),
            grad_weight.astype(weight.dtype),
        ]
        return tuple([*grads, grad_bias.astype(bias[0].dtype)] if bias else grads)

    return logprobs


def _frozen(head: _Head, targets: mx.array, rows: int, weight: mx.array, bias: mx.array | None) -> Any:
    @mx.custom_function
    def logprobs(hidden: mx.array) -> mx.array:
        return _logprobs(head, hidden, weight, bias, targets, rows)

    @logprobs.vjp
    def backward(hidden: mx.array, factors: mx.array, outputs: mx.array) -> mx.array:
        hidden = mx.depends(hidden, factors)
        grads: list[mx.array] = []
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            h = mx.depends(hidden[part], grads[-1]) if grads else hidden[part]
            logits = head.logits(h, weight, bias)
            g = head.gradient(logits, outputs[part], targets[part], factors[part])
            product = mx.result_type(hidden, weight) if head.quantized is None else hidden.dtype
            grads.append(head.multiply(g.astype(product), weight, transpose=False).astype(hidden.dtype))
        return mx.concatenate(grads) if grads else mx.zeros_like(hidden)

    return logprobs
