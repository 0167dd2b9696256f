"""Checks at load and after an export: the policy computes what the model computes, with plain and packed rows."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from gvpo_core.training.config import ConfigError, ModelConfig
from gvpo_core.training.policy import Batch, layout
from gvpo_core.training.policy.hugging_face import local_folder
from gvpo_core.training.policy.step import refuse_not_finite
from gvpo_mlx.adapters import adapted
from gvpo_mlx.logprobs import logsumexp
from gvpo_mlx.model import Scorer, global_state_kept, inputs, load_reference
from gvpo_mlx.read import pretrained

log = logging.getLogger("gvpo.mlx")

_FAILS = (AttributeError, IndexError, TypeError, ValueError, RuntimeError)


def check(scorer: Scorer, config: ModelConfig) -> tuple[bool, str]:
    """Compares our log-probs with the model's own, and packed rows with plain ones, and chooses the layout.

    Returns: whether rows are packed, and the reason.
    Raises: ConfigError: the log-probs differ, or the requested layout is not exact.
    """
    batch = _check_batch(scorer)
    try:
        plain = _by_response(scorer, batch, False)
    except _FAILS as error:
        raise ConfigError(
            f"{scorer.name} of mlx-lm cannot compute model.path {config.path!r}: {type(error).__name__}: {error}"
        ) from error
    direct = []
    with scorer.using(scorer.parameters):
        for prompt, response in zip(batch.prompts, batch.responses, strict=True):
            logits = scorer.lm(mx.array([prompt + response]))[0, len(prompt) - 1 : -1].astype(mx.float32)
            logits = logits - logsumexp(logits)[:, None]
            direct.append(np.array(mx.take_along_axis(logits, mx.array(response)[:, None], 1).squeeze(1)))
    refuse_not_finite(direct, scorer.name)
    difference = layout.largest_difference(direct, plain, _tolerance(scorer))
    if difference is not None:
        raise ConfigError(
            f"log-probs of {scorer.name} differ from its own forward pass by up to {difference:.3g} nat a token: "
            "it changes its logits in an unknown way, so it cannot be trained exactly"
        )
    _check_head(scorer)
    log.info("%s: %s", scorer.name, scorer.loaded.compared)

    def packed_difference() -> float | None:
        try:
            packed = _by_response(scorer, batch, True)
        except _FAILS as error:
            raise layout.NotPackable(f"mlx-lm's model takes no packed rows: {error}") from error
        return layout.largest_difference(packed, plain, _tolerance(scorer))

    return layout.choose(scorer.config, config.layout, scorer.name, packed_difference, log)


def _tolerance(scorer: Scorer) -> tuple[float, float]:
    return (2e-3, 5e-4) if scorer.dtype == mx.float32 else (float("inf"), 0.1)


def read_back(directory: Path, scorer: Scorer, config: ModelConfig) -> None:
    """Loads an exported folder and compares its log-probs with those of the exported model.

    Raises: ConfigError: it cannot be loaded, or its log-probs differ.
    """
    other = load_reference(dataclasses.replace(config, path=str(directory), revision=None))
    batch = _check_batch(scorer)
    ours, theirs = (_by_response(s, batch, False) for s in (scorer, other))
    difference = layout.largest_difference(ours, theirs, _tolerance(scorer))
    if difference is not None:
        raise ConfigError(
            f"the export in {directory}, read back, differs from the trained {scorer.name} by up to "
            f"{difference:.3g} nat a token: mlx-lm cannot write this model; the checkpoint is unchanged"
        )


def read_back_adapters(directory: Path, scorer: Scorer, config: ModelConfig) -> None:
    """Loads exported adapters with mlx-lm onto the base model and compares them. The base weights stay on disk.

    Raises: ConfigError: other layers got adapters, or their numbers differ.
    """
    from mlx_lm.tuner.utils import load_adapters

    with global_state_kept():
        base = pretrained(config, local_folder(config)).lm
        load_adapters(base, str(directory))
    ours, theirs = dict(adapted(scorer.lm)), dict(adapted(base))
    wrong = sorted(ours.keys() ^ theirs.keys()) or [
        name
        for name, layer in ours.items()
        if layer.scale != theirs[name].scale
        or not all(mx.array_equal(layer[key], theirs[name][key]) for key in ("lora_a", "lora_b", "m") if key in layer)
    ]
    if wrong:
        raise ConfigError(
            f"the adapters in {directory}, read back by mlx-lm, are not those of {scorer.name}: {len(wrong)} layers "
            f"differ, the first {wrong[0]}; export the merged model instead (without --adapters)"
        )


def _check_batch(scorer: Scorer) -> Batch:
    return layout.check_batch(scorer.head.weight.shape[0]).take([0, 1, 2, 3])  # fewer: MLX is slow on CPU


def _check_head(scorer: Scorer) -> None:
    """Compares the head's logits with the model's own on the same hidden states, scaled so that a cap would show.

    This works in 16 bits too. There, the log-probs of two forward passes differ by more than a cap changes them.

    Raises: ConfigError: they differ.
    """
    language, decoder = scorer.language, scorer.decoder
    with scorer.using(scorer.parameters):
        hidden = decoder(mx.array([[1, 2, 3]]), cache=None)
        size = float(mx.abs(scorer.logits(hidden)).max())
        for factor in (1.0, 100.0 / max(size, 1e-3)):
            stub = _FixedStates(decoder, hidden * factor)
            try:
                dict.__setitem__(language, "model", stub)
                direct = scorer.lm(mx.array([[1, 2, 3]])).astype(mx.float32)
            finally:
                dict.__setitem__(language, "model", decoder)
            if not stub.called:
                return
            ours = scorer.logits(stub.hidden)
            worst = (1e-4 if scorer.dtype == mx.float32 else 2e-2) * float(mx.abs(ours).max())
            difference = float(mx.abs(ours - direct).max())
            if not difference <= worst:
                raise ConfigError(
                    f"logits of {scorer.name} differ from the model's own by up to {difference:.3g}: it changes "
                    "its logits in an unknown way, so it cannot be trained exactly"
                )


class _FixedStates:
    """Replaces a decoder and returns given hidden states."""

    def __init__(self, decoder: nn.Module, hidden: mx.array) -> None:
        self.decoder, self.hidden, self.called = decoder, hidden, False

    def __call__(self, *_: Any, **__: Any) -> mx.array:
        self.called = True
        return self.hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decoder, name)


def _by_response(scorer: Scorer, batch: Batch, packed: bool) -> list[np.ndarray]:
    arrays = layout.arrays(batch, layout.plan_rows(batch, packed=packed, tokens=1 << 30))
    values = np.array(scorer.score(scorer.parameters, **inputs(arrays), packed=packed))
    return arrays.split(values)
