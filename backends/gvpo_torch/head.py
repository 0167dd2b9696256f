"""Finds how a transformers model scales and caps the products of its head, and checks that it does nothing else."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gvpo_core.training.config import ConfigError
from gvpo_torch.language_model import LanguageModel

FACTORS = ("logit_scale", "lm_head_multiplier")
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
TRIED = 40.0  # largest product that is tried: beyond the caps of released models
WITHIN = 2e-3  # tolerance in float32, for logits up to that size


def logits_of(products: Tensor, *, softcap: float | None, scale: float) -> Tensor:
    """Returns softcap * tanh(scale * products / softcap), float32."""
    logits = products.float() * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


@torch.no_grad()
def head_options(base: LanguageModel, decoder: nn.Module, config: Any) -> dict[str, Any]:
    """Returns the `softcap` and `scale` of `token_logprobs` with which `logits_of` gives the model's own logits.

    They come from the text model's configuration. The check is in float32 for every dtype of the model. It replaces the
    decoder's output by random hidden states that are large enough to show a cap even if the model's own logits are
    small. A cap or scale that is configured but not applied by the model's class is left out.

    Raises: ConfigError: the model computes its logits in another way.
    """
    head, name = base.get_output_embeddings(), type(base).__name__
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 3, head.weight.shape[1], generator=draw).to(head.weight.device)
    plain = _products(head, hidden)
    factor = TRIED / plain.abs().max().clamp(min=1e-9)
    with _replaced(decoder, hidden), _wide(head, factor):
        try:
            ids = torch.tensor([[1, 2, 3]], device=hidden.device)
            direct = base(input_ids=ids, use_cache=False).logits.float()
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
            reason = (str(error).strip() or "no reason given").splitlines()[0]
            raise ConfigError(f"{name} cannot be run on text alone ({type(error).__name__}: {reason})") from error
    if direct.shape != plain.shape:
        raise ConfigError(
            f"logits of {name} have shape {tuple(direct.shape)}, and its head's products {tuple(plain.shape)}: they"
            " cannot be trained exactly"
        )
    options = _options(config)
    inverted = {"scale": 1 / options["scale"]}  # HyperCLOVAX multiplies by what Granite divides by
    for changed in ({}, inverted, {"softcap": None}, {"scale": 1.0}, {"softcap": None, "scale": 1.0}):
        combined = options | changed
        if float((direct - logits_of(plain * factor, **combined)).abs().max()) <= WITHIN:
            return combined
    raise ConfigError(
        f"logits of {name} are not its head's products, scaled and capped as its configuration says: it changes them "
        "in an unknown way, so it cannot be trained exactly"
    )


def _options(config: Any) -> dict[str, Any]:
    scale = 1.0
    for name in FACTORS:
        scale *= getattr(config, name, None) or 1.0
    for name in DIVISORS:
        scale /= getattr(config, name, None) or 1.0
    caps = [cap for cap in (getattr(config, name, None) for name in CAPS) if cap]
    return {"softcap": float(caps[0]) if caps else None, "scale": float(scale)}


def _products(head: nn.Linear, hidden: Tensor) -> Tensor:
    """Returns hidden @ weight.T + bias in float32, computed for a part of the vocabulary at a time."""
    parts = []
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(head.weight), 8192):
            part = slice(start, start + 8192)
            bias = None if head.bias is None else head.bias[part].float()
            parts.append(nn.functional.linear(hidden.float(), head.weight[part].float(), bias))
    return torch.cat(parts, -1)


@contextlib.contextmanager
def _replaced(decoder: nn.Module, hidden: Tensor) -> Iterator[None]:
    def replace(module: nn.Module, inputs: Any, output: Any) -> Any:
        output.last_hidden_state = hidden
        return output

    hook = decoder.register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def _wide(head: nn.Linear, factor: Tensor) -> Iterator[None]:
    head.forward = lambda hidden: _products(head, hidden) * factor  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del head.forward
