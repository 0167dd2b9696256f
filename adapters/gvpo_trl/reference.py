"""Checks that TRL's reference is the model before training, and that at least one parameter is trained.

TRL's reference is one of three: a second model from the path in the config; with a new PEFT adapter, the model without
it; for a model that already has an adapter, a copy of the adapter named "default".
"""

import contextlib
import warnings
from typing import Any

import torch
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from gvpo_trl.scoring import differ, padded_scores

_COPY = "ref"  # TRL's name for the copied adapter
_SUBTRACTED = ("pissa", "corda", "olora", "loftq", "lora_ga")  # PEFT subtracts such an adapter from the base weights


def check_adapters(model: Any) -> None:
    """Checks the adapters of a model before TRL copies one of them.

    Raises: ValueError: the active adapter is not the one that becomes the reference.
    """
    if not hasattr(model, "get_base_model"):
        return
    active = model.active_adapters
    if list(active) != ["default"]:
        raise ValueError(
            f"the active adapter is {', '.join(active)}, and TRL takes the reference from the adapter named 'default':"
            " load the one to train under that name, alone, or merge it and pass a peft_config"
        )


def check_trainable(model: Any) -> None:
    """Raises: ValueError: no parameter would be trained."""
    if not any(p.requires_grad for name, p in model.named_parameters() if f".{_COPY}." not in name):
        raise ValueError(
            "no parameter of the model is trainable (requires_grad is False for all): load an adapter with"
            " PeftModel.from_pretrained(..., is_trainable=True), or pass a peft_config"
        )


def check_reference(trainer: Any) -> None:
    """Compares the reference with the model before training.

    Raises: ValueError: the reference is not the initial model, or training would change it.
    Warns: the model differs from its reference at the start.
    """
    checkpointing = trainer.args.gradient_checkpointing_kwargs
    with disable_gradient_checkpointing(trainer.model, checkpointing), trainer.accelerator.autocast():
        with torch.no_grad():
            scores = padded_scores(trainer, trainer.model)
        trained = [(name, p) for name, p in trainer.model.named_parameters() if p.requires_grad]
        with _reference(trainer) as reference:
            ref_scores = padded_scores(trainer, reference)
            if trainer.ref_model is None:
                _check_constant(ref_scores, trained)
    apart = differ(trainer, scores, [row.detach() for row in ref_scores])
    if trainer.ref_model is not None:
        _warn_of_another_model(trainer, apart)
    elif _COPY not in trainer.accelerator.unwrap_model(trainer.model).peft_config:
        _check_initial_adapter(trainer, apart)


@contextlib.contextmanager
def _reference(trainer: Any) -> Any:
    """Yields the model that TRL scores as the reference."""
    if trainer.ref_model is not None:
        with torch.no_grad():
            yield trainer.ref_model
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    with use_adapter(model, _COPY if _COPY in model.peft_config else None):
        yield trainer.model


def _check_constant(ref_scores: list[Tensor], trained: list[tuple[str, Any]]) -> None:
    inputs = [(name, p) for name, p in trained if p.requires_grad]  # adapters that are off do not require gradients
    total = torch.cat(ref_scores).sum()
    if not inputs or not total.requires_grad:
        return
    gradients = torch.autograd.grad(total, [p for _, p in inputs], allow_unused=True)
    moving = [name for (name, _), gradient in zip(inputs, gradients, strict=True) if gradient is not None]
    if moving:
        raise ValueError(
            f"training {moving[0]} would change the reference too, which is the model without its adapter: freeze all"
            " parameters outside of the adapter, as LoraConfig(bias='none') does"
        )


def _warn_of_another_model(trainer: Any, apart: float | None) -> None:
    """Warns that the reference, read from the config's path, lacks changes made in memory."""
    reference = dict(trainer.accelerator.unwrap_model(trainer.ref_model).named_parameters())
    different = [
        name for name, p in trainer.model.named_parameters() if name in reference and not _same(p, reference[name])
    ]
    if different or apart is not None:
        difference = f"{different[0]} differs" if different else f"a token's log-prob differs by up to {apart:.2g} nat"
        warnings.warn(
            f"the model is not the one in {trainer.model.config._name_or_path!r}, from which TRL has loaded the"
            f" reference ({difference}): KL does not start at 0. To use the current model as the"
            " reference, save it and pass its folder",
            stacklevel=4,
        )


def _same(p: Tensor, other: Tensor) -> bool:
    return p.shape == other.shape and torch.equal(p, other.to(p))


def _check_initial_adapter(trainer: Any, apart: float | None) -> None:
    config = trainer.accelerator.unwrap_model(trainer.model).peft_config["default"]
    start = getattr(config, "init_lora_weights", None)
    by = "" if apart is None else f", by up to {apart:.2g} nat a token"
    if isinstance(start, str) and (by or start.lower().startswith(_SUBTRACTED)):
        raise ValueError(
            f"init_lora_weights is {start!r}, which changes the base weights: the model without its adapter, TRL's"
            f" reference, would be another one than the model before training{by}. Set it to True, 'gaussian',"
            " 'orthogonal' or 'eva'"
        )
    if by:
        warnings.warn(
            f"the new {type(config).__name__} adapter changes the model before it is trained{by}: KL to the reference,"
            " the model without it, does not start at 0",
            stacklevel=4,
        )
