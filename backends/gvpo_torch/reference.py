"""The reference: the initial model, or the policy as it was when the reference was last renewed.

Without LoRA it is a model of its own. With LoRA it is the policy's model, with its adapters off or as they were then.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from gvpo_torch.model import Scorer
from gvpo_torch.sharding import gathered_no_more


def named_parameters(scorer: Scorer) -> dict[str, nn.Parameter]:
    """By the names of the language model."""
    return {name.removeprefix("lm."): p for name, p in scorer.named_parameters()}


class Reference:
    """Of a policy."""

    def __init__(self, scorer: Scorer, trained: Mapping[str, nn.Parameter], load: Callable[[], Scorer] | None) -> None:
        """
        Args:
          scorer: the policy's.
          trained: parameters by name.
          load: makes the initial model; None: with LoRA, or where no reference is asked for.
        """
        self.scorer, self.trained, self.load = scorer, trained, load
        self.model = load() if load is not None else None
        self.adapters: dict[str, Tensor] = {}  # values of a renewed reference; empty: off
        self.renewed = False

    @contextlib.contextmanager
    def scoring(self) -> Iterator[Scorer]:
        """The scorer that computes the reference's log-probs, within the block."""
        if self.model is not None:
            yield self.model
        elif not self.adapters:
            with self.scorer.lm.disable_adapter():
                yield self.scorer
        else:
            before = _copies(self.trained)
            _write(self.scorer, self.trained, self.adapters)
            try:
                yield self.scorer
            finally:
                _write(self.scorer, self.trained, before)

    def renew(self) -> None:
        """The present policy is the reference from now on."""
        if self.model is None:
            self.adapters = _copies(self.trained)
        else:
            _write(self.model, named_parameters(self.model), self.trained)
        self.renewed = True

    def tensors(self) -> dict[str, Tensor] | None:
        """What a checkpoint keeps, by the names of what is trained; None: it is the initial model."""
        return self._tensors() if self.renewed else None

    def _tensors(self) -> dict[str, Tensor]:
        if self.model is None:
            return self.adapters
        held = named_parameters(self.model)
        return {name: held[name] for name in self.trained}

    def room(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint of a renewed reference is read into."""
        return self._tensors() or {name: torch.empty_like(p, requires_grad=False) for name, p in self.trained.items()}

    def restored(self, values: dict[str, Tensor] | None) -> None:
        """After `room` was filled, or where the checkpoint has no renewed reference (None)."""
        if values is None and self.renewed:
            self.adapters, self.model = {}, self.load() if self.load is not None else None
        elif values is not None and self.model is None:
            self.adapters = values
        self.renewed = values is not None
        if self.model is not None:
            gathered_no_more(self.model)


def _copies(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in parameters.items()}


@torch.no_grad()
def _write(scorer: Scorer, parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)
    gathered_no_more(scorer)
