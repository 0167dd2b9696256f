"""DoRA's product that holds only its result for the backward pass, in place of peft's.

peft holds the base layer's product, the adapter's and their scaled sum for each layer.
"""

from typing import Any

import torch
from torch import Tensor, nn


class Dora:
    """peft's variant of LoRA for a layer, with another forward pass."""

    def __init__(self, own: Any) -> None:
        self.own = own  # peft's

    def __getattr__(self, name: str) -> Any:  # merging and all else
        if name.startswith("__"):  # asked for by `copy` before there is an `own`
            raise AttributeError(name)
        return getattr(self.own, name)

    def forward(self, module: Any, *, active_adapter: str, x: Tensor, result: Tensor, **options: Any) -> Tensor:
        """m / |W + s B A| (W x + s B A x) + b, of `result` = W x + b; the norm is a constant (arXiv 2402.09353)."""
        base, scaling = module.get_base_layer(), module.scaling[active_adapter]
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        product = result if base.bias is None else result - base.bias
        product = product + up(down(x)) * scaling
        norm = _norm(base.weight, down.weight, up.weight, scaling, module.fan_in_fan_out)
        scaled: Tensor = _Scaled.apply(product, module.lora_magnitude_vector[active_adapter].weight, norm, result.dtype)
        return scaled if base.bias is None else scaled + base.bias


@torch.no_grad()
def _norm(weight: Tensor, down: Tensor, up: Tensor, scaling: float, transposed: bool) -> Tensor:
    """(out,) float32."""
    wide = (weight.t() if transposed else weight).to(up.dtype)
    return torch.linalg.vector_norm(torch.addmm(wide, up, down, alpha=scaling), dim=1)


class _Scaled(torch.autograd.Function):
    """product * magnitude / norm; the magnitude's gradient is that of the result times the result, over it."""

    @staticmethod
    def forward(ctx: Any, product: Tensor, magnitude: Tensor, norm: Tensor, dtype: torch.dtype) -> Tensor:
        scaled = (product * (magnitude / norm)).to(dtype)
        ctx.save_for_backward(scaled, magnitude, norm)
        ctx.wide = product.dtype
        return scaled

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scaled, magnitude, norm = ctx.saved_tensors
        wide = gradient.to(magnitude.dtype)
        of_magnitude = (wide * scaled).flatten(0, -2).sum(0) / magnitude if ctx.needs_input_grad[1] else None
        return (wide * (magnitude / norm)).to(ctx.wide), of_magnitude, None, None


def hold_less(layer: Any) -> None:
    """Replaces the forward pass of peft's DoRA where the layer is linear."""
    base: nn.Module = layer.get_base_layer()
    if hasattr(base, "bias"):
        layer.lora_variant = {name: Dora(variant) for name, variant in layer.lora_variant.items()}
