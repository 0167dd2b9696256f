"""DoRA's product in place of peft's. It saves only its result for the backward pass.

For each layer peft saves the base layer's product, the adapter's product and their scaled sum.
"""

from typing import Any

import torch
from torch import Tensor, nn


class Dora:
    """peft's LoRA variant of a layer, with another forward pass."""

    def __init__(self, own: Any) -> None:
        self.own = own  # peft's variant

    def __getattr__(self, name: str) -> Any:  # merging and everything else
        if name.startswith("__"):  # `copy` asks for them before `own` is set
            raise AttributeError(name)
        return getattr(self.own, name)

    def forward(self, module: Any, *, active_adapter: str, x: Tensor, result: Tensor, **options: Any) -> Tensor:
        """Returns m / |W + s B A| (W x + s B A x) + b; `result` is W x + b, the norm a constant (arXiv 2402.09353)."""
        base, scaling = module.get_base_layer(), module.scaling[active_adapter]
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        product = result if base.bias is None else result - base.bias
        product = product + up(down(x)) * scaling
        norm = _norm(base.weight, down.weight, up.weight, scaling, module.fan_in_fan_out)
        scaled: Tensor = _Scaled.apply(product, module.lora_magnitude_vector[active_adapter].weight, norm, result.dtype)
        return scaled if base.bias is None else scaled + base.bias


@torch.no_grad()
def _norm(weight: Tensor, down: Tensor, up: Tensor, scaling: float, transposed: bool) -> Tensor:
    """Returns |W + s B A| of each output, (out,) float32."""
    wide = (weight.t() if transposed else weight).to(up.dtype)
    return torch.linalg.vector_norm(torch.addmm(wide, up, down, alpha=scaling), dim=1)


class _Scaled(torch.autograd.Function):
    """product * magnitude / norm. The magnitude's gradient is sum(gradient * result) / magnitude."""

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
    """Replaces the forward pass of peft's DoRA if the layer is linear."""
    base: nn.Module = layer.get_base_layer()
    if hasattr(base, "bias"):
        layer.lora_variant = {name: Dora(variant) for name, variant in layer.lora_variant.items()}
