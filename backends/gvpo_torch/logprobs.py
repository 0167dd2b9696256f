"""Log-probabilities of given tokens from hidden states, without ever holding a [tokens, vocabulary] array."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CPU_TILE_BYTES = 32 * 2**20
DEVICE_TILE_BYTES = 512 * 2**20
LONGEST_TILE = 4096  # tokens
WIDTH_WANTED = 512  # smallest width of a tile, vocabulary entries, if its bytes allow: narrower products are slow


def token_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    tile_bytes: int | None = None,
) -> Tensor:
    """Returns the log-probability of each target under the head's softmax, computed in tiles of tokens by vocabulary.

    logits = softcap * tanh(scale * (hidden @ head_weight.T + bias) / softcap)
    result = logits[target] - logsumexp(logits)

    The normaliser is summed tile by tile over a row, relative to the highest logit so far. The backward pass computes
    each tile again. If the head is frozen, the forward pass computes the gradient of `hidden` instead, summed in the
    same way. The largest array beside the arguments and their gradients is one tile. A slice of the head's gradient is
    the sum of one product for each tile of tokens.

    Args:
      hidden: (T, H) float; differentiated.
      head_weight: (V, H) float; differentiated if it requires a gradient.
      targets: (T,) integer ids in [0, V).
      bias: (V,) float; differentiated if it requires a gradient.
      softcap: caps the logits as Gemma 2 does. Default: off.
      scale: factor of the logits (Cohere's logit_scale, 1 / Granite's logits_scaling).
      tile_bytes: size of one tile of logits. Default: 32 MiB on CPU, 512 MiB on an accelerator.
    Returns: (T,) float32, nats; float64 for float64 arguments.
    Raises: ValueError: shapes that do not fit, or tile_bytes < 1.
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
    if tile_bytes is None:
        tile_bytes = CPU_TILE_BYTES if hidden.device.type == "cpu" else DEVICE_TILE_BYTES
    if tile_bytes < 1:
        raise ValueError(f"tile_bytes is {tile_bytes}; expected at least 1")
    head = _Head(head_weight.dtype, hidden.dtype, hidden.device.type, softcap, scale)
    elements = max(1, tile_bytes // head.wide.itemsize)
    rows = max(1, min(len(targets), LONGEST_TILE, elements // WIDTH_WANTED))
    columns = max(1, min(head_weight.shape[0], elements // rows))
    return _TokenLogprobs.apply(hidden, head_weight, bias, targets, head, rows, columns)


class _Head:
    """The head's arithmetic on one tile: products in the narrower of the two dtypes, the rest in float32 or wider."""

    def __init__(
        self, weight: torch.dtype, hidden: torch.dtype, device: str, softcap: float | None, scale: float
    ) -> None:
        self.wide = torch.float64 if torch.float64 in (weight, hidden) else torch.float32
        # Off CUDA there is no 16-bit product with a float32 result: take the wider of the two dtypes there.
        narrow = min(weight, hidden, key=lambda dtype: dtype.itemsize)
        self.product = narrow if device == "cuda" else torch.promote_types(weight, hidden)
        self.mixed = self.product.itemsize < 4 and device == "cuda"
        self.softcap, self.scale = softcap, scale

    def space(self, rows: int, columns: int, device: torch.device) -> Tensor | None:
        """Returns memory for one tile of logits, reused by every tile; None if products have a narrower dtype."""
        if self.product != self.wide:
            return None
        return torch.empty(rows * columns, dtype=self.wide, device=device)

    def multiply(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """Returns a @ b, accumulated in the wide dtype."""
        a, b = a.to(self.product), b.to(self.product)
        if out is not None:
            return torch.mm(a, b, out=out[: len(a) * b.shape[1]].view(len(a), b.shape[1]))
        return torch.mm(a, b, out_dtype=self.wide) if self.mixed else torch.mm(a, b).to(self.wide)

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, space: Tensor | None) -> Tensor:
        """Returns (t, v) logits in the wide dtype; in `space` if it is given."""
        z = self.multiply(hidden, weight.t(), space)
        if bias is not None:
            z += bias.to(self.wide)
        if self.scale != 1.0:
            z *= self.scale
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z

    def slope(self, logits: Tensor) -> Tensor | None:
        """Returns d logits / d(hidden @ weight.T + bias) / `scale`, or None if it is 1.

        Call it before `logits` is overwritten.
        """
        return None if self.softcap is None else (logits / self.softcap).square_().neg_().add_(1.0)

    def sloped(self, gradient: Tensor, slope: Tensor | None) -> Tensor:
        """Multiplies the gradient by slope and scale in place, and returns it."""
        if slope is not None:
            gradient *= slope
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


def _tiles(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _places(targets: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Returns where a target is in a slice of the vocabulary, and whether it is there, (t, 1) each. Does not wait."""
    places = targets.sub(part.start).unsqueeze(1)
    inside = (places >= 0) & (places < part.stop - part.start)
    return places.clamp_(0, part.stop - part.start - 1), inside


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: _Head,
        rows: int,
        columns: int,
    ) -> Tensor:
        ctx.head, ctx.rows, ctx.columns = head, rows, columns
        trains_head = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ahead = hidden.new_empty(hidden.shape) if ctx.needs_input_grad[0] and not trains_head else None
        logprobs = torch.empty(len(targets), dtype=head.wide, device=hidden.device)
        normalisers = torch.empty_like(logprobs)
        with torch.autocast(hidden.device.type, enabled=False):
            space = head.space(rows, columns, hidden.device)
            for part in _tiles(len(targets), rows):
                chosen, normaliser, gradient = _forward(
                    hidden[part], weight, bias, targets[part], head, columns, space, ahead is not None
                )
                logprobs[part], normalisers[part] = chosen - normaliser, normaliser
                if ahead is not None and gradient is not None:
                    ahead[part] = gradient
        if ahead is not None:
            ctx.save_for_backward(ahead)
        else:
            ctx.save_for_backward(hidden, weight, bias, targets, normalisers)
        return logprobs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factors: Tensor) -> tuple[Tensor | None, ...]:
        head, rows, columns = ctx.head, ctx.rows, ctx.columns
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        if not (wants_weight or wants_bias):
            (ahead,) = ctx.saved_tensors
            return (ahead * factors.unsqueeze(1)).to(ahead.dtype), *(None,) * 6
        hidden, weight, bias, targets, normalisers = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden, dtype=head.wide) if wants_hidden else None
        make = torch.empty_like if len(targets) else torch.zeros_like  # the first tile of tokens writes all of it
        grad_weight = make(weight, dtype=head.wide) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=head.wide) if wants_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            space = head.space(rows, columns, hidden.device)
            for part in _tiles(len(targets), rows):
                for words in _tiles(len(weight), columns):
                    bias_used = None if bias is None else bias[words]
                    logits = head.logits(hidden[part], weight[words], bias_used, space)
                    slope = head.slope(logits)
                    g = logits.sub_(normalisers[part].unsqueeze(1)).exp_().neg_()
                    places, inside = _places(targets[part], words)
                    g.scatter_add_(1, places, inside.to(g.dtype))
                    g = head.sloped(g, slope).mul_(factors[part].unsqueeze(1))
                    if grad_bias is not None:
                        grad_bias[words] += g.sum(0)
                    if grad_hidden is not None:
                        grad_hidden[part] += head.multiply(g, weight[words])
                    if grad_weight is not None:
                        before, is_first = grad_weight[words], part.start == 0
                        if head.mixed:
                            new = head.multiply(g.t(), hidden[part])
                            grad_weight[words] = new if is_first else new.add_(before)
                        else:
                            before.addmm_(g.t(), hidden[part].to(head.wide), beta=0 if is_first else 1)
                    logits = g = slope = None  # not held while the next tile is made
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(hidden.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, *(None,) * 4


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    head: _Head,
    columns: int,
    space: Tensor | None,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns for t tokens: (t,) their logits, (t,) logsumexp of all logits, (t, H) d logprob / d hidden if wanted."""
    highest = torch.full((len(targets), 1), -torch.inf, dtype=head.wide, device=hidden.device)
    total, chosen = torch.zeros_like(highest), torch.zeros_like(highest)
    others = hidden.new_zeros(hidden.shape, dtype=head.wide) if wants_gradient else None
    for words in _tiles(len(weight), columns):
        logits = head.logits(hidden, weight[words], None if bias is None else bias[words], space)
        places, inside = _places(targets, words)
        chosen = torch.where(inside, logits.gather(1, places), chosen)
        slope = head.slope(logits) if wants_gradient else None
        higher = torch.maximum(highest, logits.amax(1, keepdim=True))
        shrink = (highest - higher).exp_()
        masses = logits.sub_(higher).exp_()
        total = total * shrink + masses.sum(1, keepdim=True)
        highest = higher
        if others is not None:
            # The target's own part is 1 - p, which a narrow dtype would spoil for p near 1: left out here, added below.
            masses.scatter_(1, places, masses.gather(1, places).masked_fill_(inside, 0.0))
            others = others.mul_(shrink).add_(head.multiply(head.sloped(masses, slope), weight[words]))
        del logits, masses, slope  # not held while the next tile is made
    normaliser = total.log() + highest
    gradient = None
    if others is not None:
        of_target = head.sloped(torch.expm1(chosen - normaliser).neg_(), head.slope(chosen))
        gradient = others.div_(total).neg_().addcmul_(of_target, weight[targets].to(head.wide))
    return chosen.squeeze(1), normaliser.squeeze(1), gradient
