"""Log-probabilities of given tokens from hidden states, without ever holding a [tokens, vocabulary] array."""

from typing import Any

import torch
from torch import Tensor

CPU_CHUNK_BYTES = 48 * 2**20
DEVICE_CHUNK_BYTES = 512 * 2**20


def token_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Log-probability of each target under the head's softmax, in chunks of tokens.

    logits = softcap * tanh(scale * (hidden @ head_weight.T + bias) / softcap)
    result = logits[target] - logsumexp(logits)

    The backward pass computes each chunk's logits again; where the head is frozen the forward pass makes the gradient
    of `hidden` at once instead. The largest array beside the arguments and their gradients is one chunk.

    Args:
      hidden: (T, H) float; differentiated.
      head_weight: (V, H) float; differentiated where it requires a gradient.
      targets: (T,) integer ids in [0, V).
      bias: (V,) float; differentiated where it requires a gradient.
      softcap: caps the logits as Gemma 2 does. Default: off.
      scale: factor of the logits (Cohere's logit_scale, 1 / Granite's logits_scaling).
      chunk_bytes: size of one chunk of logits. Default: 48 MiB on CPU, 512 MiB on an accelerator.
    Returns: (T,) float32, nats; float64 for float64 arguments.
    Raises: ValueError: shapes that do not fit, or chunk_bytes < 1.
    """
    if hidden.ndim != 2 or head_weight.ndim != 2 or hidden.shape[1] != head_weight.shape[1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)} and head_weight {tuple(head_weight.shape)}; "
            "expected (T, H) and (V, H)"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets has shape {tuple(targets.shape)}; expected {tuple(hidden.shape[:1])}")
    if bias is not None and bias.shape != head_weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected {tuple(head_weight.shape[:1])}")
    if chunk_bytes is None:
        chunk_bytes = CPU_CHUNK_BYTES if hidden.device.type == "cpu" else DEVICE_CHUNK_BYTES
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes is {chunk_bytes}; expected at least 1")
    head = _Head(head_weight.dtype, hidden.dtype, hidden.device.type, softcap, scale)
    rows = max(1, chunk_bytes // (head_weight.shape[0] * head.wide.itemsize))
    return _TokenLogprobs.apply(hidden, head_weight, bias, targets, head, rows)


class _Head:
    """The head's arithmetic on one chunk: products in the narrower of the two dtypes, all else in float32 or wider."""

    def __init__(
        self, weight: torch.dtype, hidden: torch.dtype, device: str, softcap: float | None, scale: float
    ) -> None:
        self.wide = torch.float64 if torch.float64 in (weight, hidden) else torch.float32
        # Off CUDA there is no 16-bit product with a float32 result: take the wider of the two dtypes there.
        narrow = min(weight, hidden, key=lambda dtype: dtype.itemsize)
        self.product = narrow if device == "cuda" else torch.promote_types(weight, hidden)
        self.mixed = self.product.itemsize < 4 and device == "cuda"
        self.softcap, self.scale = softcap, scale

    def space(self, rows: int, weight: Tensor) -> Tensor | None:
        """Room for the logits of `rows` tokens, used again by every chunk; None where products are narrower."""
        if self.product != self.wide:
            return None
        return torch.empty(rows, weight.shape[0], dtype=self.wide, device=weight.device)

    def multiply(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """a @ b, accumulated and returned wide."""
        a, b = a.to(self.product), b.to(self.product)
        if out is not None:
            return torch.mm(a, b, out=out[: len(a)])
        return torch.mm(a, b, out_dtype=self.wide) if self.mixed else torch.mm(a, b).to(self.wide)

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, space: Tensor | None) -> Tensor:
        """(t, V) wide; in `space` where it is given."""
        z = self.multiply(hidden, weight.t(), space)
        if bias is not None:
            z += bias.to(self.wide)
        if self.scale != 1.0:
            z *= self.scale
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z

    def slope(self, logits: Tensor) -> Tensor | None:
        """d logits / d(hidden @ weight.T + bias), before `logits` is overwritten; None where it is `scale` alone."""
        if self.softcap is None:
            return None
        return (logits / self.softcap).square_().neg_().add_(1.0)

    def gradient(self, logits: Tensor, normaliser: Tensor, targets: Tensor, slope: Tensor | None) -> Tensor:
        """d logprob / d(hidden @ weight.T + bias) in place of the logits."""
        g = logits.sub_(normaliser.unsqueeze(1)).exp_().neg_()
        rows = torch.arange(len(g), device=g.device)
        g[rows, targets] += 1.0
        if slope is not None:
            g *= slope
        if self.scale != 1.0:
            g *= self.scale
        return g


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: _Head, rows: int
    ) -> Tensor:
        ctx.head, ctx.rows = head, rows
        trains_head = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ahead = hidden.new_empty(hidden.shape) if ctx.needs_input_grad[0] and not trains_head else None
        logprobs = torch.empty(len(targets), dtype=head.wide, device=hidden.device)
        normalisers = torch.empty_like(logprobs)
        with torch.autocast(hidden.device.type, enabled=False):
            weight_used = weight.to(head.product)
            space = head.space(min(rows, len(targets)), weight)
            for start in range(0, len(targets), rows):
                part = slice(start, start + rows)
                logits = head.logits(hidden[part], weight_used, bias, space)
                chosen = logits.gather(1, targets[part].unsqueeze(1)).squeeze(1)
                if ahead is None:
                    highest = logits.amax(1)
                    total = logits.sub_(highest.unsqueeze(1)).exp_().sum(1)
                    normaliser = total.log_().add_(highest)
                else:
                    normaliser = torch.logsumexp(logits, 1)
                    g = head.gradient(logits, normaliser, targets[part], head.slope(logits))
                    ahead[part] = head.multiply(g, weight_used)
                logprobs[part] = chosen - normaliser
                normalisers[part] = normaliser
                logits = g = None  # not held while the next chunk is made
        if ahead is not None:
            ctx.save_for_backward(ahead)
        else:
            ctx.save_for_backward(hidden, weight, bias, targets, normalisers)
        return logprobs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factors: Tensor) -> tuple[Tensor | None, ...]:
        head = ctx.head
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        if not (wants_weight or wants_bias):
            (ahead,) = ctx.saved_tensors
            return (ahead * factors.unsqueeze(1)).to(ahead.dtype), None, None, None, None, None
        hidden, weight, bias, targets, normalisers = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=head.wide) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=head.wide) if wants_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            weight_used = weight.to(head.product)
            space = head.space(min(ctx.rows, len(targets)), weight)
            for start in range(0, len(targets), ctx.rows):
                part = slice(start, start + ctx.rows)
                logits = head.logits(hidden[part], weight_used, bias, space)
                g = head.gradient(logits, normalisers[part], targets[part], head.slope(logits))
                g *= factors[part].unsqueeze(1)
                if grad_bias is not None:
                    grad_bias += g.sum(0)
                if grad_hidden is not None:
                    grad_hidden[part] = head.multiply(g, weight_used)
                if grad_weight is not None:
                    if head.mixed:
                        grad_weight += head.multiply(g.t(), hidden[part])
                    else:
                        grad_weight.addmm_(g.t(), hidden[part].to(head.wide))
                logits = g = None
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None
