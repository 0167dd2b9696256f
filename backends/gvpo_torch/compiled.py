"""Compiles decoder layers with torch.compile for scores and gradients: one program for all layers of a kind.

Sampling runs the layers uncompiled, because it calls them with other arguments at each token.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gvpo_core.training.config import ConfigError

BACKEND = "inductor"
MOST_PROGRAMS = 64  # of a kind of layer: for shapes, masks, with or without gradients, adapters on or off


def compile_layers(lm: nn.Module, embeddings: nn.Module, kinds: set[str]) -> list[nn.Module]:
    """Sets each layer to be compiled in full when it is first called. Returns the layers.

    Args:
      embeddings: computes the first layer's input.
      kinds: names of the layers' classes.
    Raises: ConfigError: the model has no such layers.
    """
    layers = [module for module in lm.modules() if type(module).__name__ in kinds]
    if not layers:
        raise ConfigError(f"model.compile = true: {type(lm).__name__} does not name its layers; remove it")
    embeddings.register_forward_hook(_with_gradient)
    for layer in layers:
        layer.compile(backend=BACKEND, dynamic=True, fullgraph=True, recompile_limit=MOST_PROGRAMS)
    return layers


def _with_gradient(embeddings: nn.Module, args: Any, states: Tensor) -> Tensor:
    """Gives the first layer's input a gradient too, which adapters give to the others': one program fits all layers."""
    return states.requires_grad_() if torch.is_grad_enabled() else states


@contextlib.contextmanager
def as_they_are(layers: list[Any]) -> Iterator[None]:
    """Runs the layers without their compiled programs within the block."""
    programs = [layer._compiled_call_impl for layer in layers]
    for layer in layers:
        layer._compiled_call_impl = None
    try:
        yield
    finally:
        for layer, program in zip(layers, programs, strict=True):
            layer._compiled_call_impl = program
