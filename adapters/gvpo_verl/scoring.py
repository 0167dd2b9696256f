"""Checks that verl's micro-batches score a response as the model scores it alone, in the mode of the step.

verl scores in evaluation mode, steps in training mode, and pads or packs the rows of a micro-batch. Each of these can
change a response's log-probability, and with it the step.
"""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gvpo_core.hosts import SettingsError, at_random
from gvpo_core.training.policy.layout import rope_by_length


def check_lengths(config: Any, lengths: Tensor) -> None:
    """Checks that no row's RoPE depends on another row of its micro-batch, or on an earlier micro-batch.

    Args:
      config: the model's configuration in transformers.
      lengths: (B,) tokens of each row, prompt and response.
    Raises: SettingsError: a row's RoPE does.
    """
    rope = rope_by_length(config.get_text_config().to_dict())
    if rope is None or not len(lengths) or int(lengths.max()) <= rope.original:
        return
    if rope.kind == "longrope" and int(lengths.min()) > rope.original:
        return
    raise SettingsError(
        f"rope_type is {rope.kind!r} and a row has {int(lengths.max())} tokens: beyond {rope.original} tokens the"
        " frequencies depend on the longest row of a micro-batch, so the others' log-probabilities would not be their"
        f" own; set data.max_prompt_length and data.max_response_length to {rope.original} together"
    )


def random_states() -> list[Tensor]:
    """Returns the states of torch's random number generators on this process's devices."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


def check_training_mode(name: str, modules: Iterable[Any], before: list[Tensor]) -> None:
    """Raises: SettingsError: a pass in training mode has drawn random numbers since the states `before`."""
    if all(torch.equal(a, b) for a, b in zip(before, random_states(), strict=True)):
        return
    raise SettingsError(
        f"{name} draws random numbers in training mode ({', '.join(at_random(modules)) or 'no setting of that name'}):"
        " its weights and gradient would belong to two different sub-networks; set dropout, router noise and stochastic"
        " depth to 0, as in +actor_rollout_ref.model.override_config.attention_dropout=0.0"
    )


def check_same(name: str, together: Tensor, alone: Tensor, how: str, *, rounded: bool) -> None:
    """Compares (N,) log-probabilities of tokens, nats, with those of each row alone.

    Args:
      how: how `together` was scored, for the message.
      rounded: the numbers have 16 bits, so their mean difference is compared.
    Raises: SettingsError: they differ.
    """
    apart = (together - alone).abs()
    if not len(apart) or (apart.mean() <= 0.1 if rounded else apart.max() <= 2e-3):
        return
    raise SettingsError(
        f"{name} scores tokens differently {how}, by up to {float(apart.max()):.2g} nat each: GVPO cannot be exact"
        " with it in verl"
    )


def warn_if_rounded(name: str, logprobs: Tensor) -> bool:
    """Warns if all (N,) log-probabilities of tokens, nats, are bfloat16 numbers. Returns whether they are.

    verl rounds them in mixed precision if flash-attn's cross entropy is not installed.
    """
    counted = logprobs[logprobs != 0]
    if len(counted) < 8 or not torch.equal(counted.float(), counted.bfloat16().float()):
        return False
    off = float(counted.abs().max()) / 256
    warnings.warn(
        f"{name} are rounded to bfloat16, each by up to {off:.2g} nat: the sums over a response, and with them GVPO's"
        " weights, are off by more for long responses. Install flash-attn, or set"
        " +actor_rollout_ref.{actor,ref}.fsdp_config.mixed_precision.param_dtype=fp32",
        stacklevel=2,
    )
    return True
