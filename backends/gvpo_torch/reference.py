"""The reference: the initial model, or the policy as it was when the reference was last renewed.

Without LoRA it is a separate model. With LoRA it is the policy's model, with adapters off or with their values at the
last renewal.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from gvpo_torch.model import Scorer
from gvpo_torch.sharding import gathered_no_more


def named_parameters(scorer: Scorer) -> dict[str, nn.Parameter]:
    """Returns the scorer's parameters by their names in the language model."""
    return {name.removeprefix("lm."): p for name, p in scorer.named_parameters()}


class Reference:
    """The reference of a policy."""

    def __init__(self, scorer: Scorer, trained: Mapping[str, nn.Parameter], load: Callable[[], Scorer] | None) -> None:
        """
        Args:
          scorer: the policy's scorer.
          trained: the trained parameters by name.
          load: loads the initial model. None: with LoRA, or if no reference is needed.
        """
        self.scorer, self.trained, self.load = scorer, trained, load
        self.model = load() if load is not None else None
        self.adapters: dict[str, Tensor] = {}  # values of a renewed reference; empty: adapters off
        self.renewed = False

    @contextlib.contextmanager
    def scoring(self) -> Iterator[Scorer]:
        """Yields the scorer that computes the reference's log-probs within the block."""
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
        """Makes the current policy the reference."""
        if self.model is None:
            self.adapters = _copies(self.trained)
        else:
            _write(self.model, named_parameters(self.model), self.trained)
        self.renewed = True

    def tensors(self) -> dict[str, Tensor] | None:
        """Returns the tensors for a checkpoint, by the names of trained parameters; None: it is the initial model."""
        return self._tensors() if self.renewed else None

    def _tensors(self) -> dict[str, Tensor]:
        if self.model is None:
            return self.adapters
        parameters = named_parameters(self.model)
        return {name: parameters[name] for name in self.trained}

    def room(self) -> dict[str, Tensor]:
        """Returns tensors into which a checkpoint of a renewed reference can be read."""
        return self._tensors() or {name: torch.empty_like(p, requires_grad=False) for name, p in self.trained.items()}

    def restored(self, values: dict[str, Tensor] | None) -> None:
        """Takes the filled tensors of `room`; None: the checkpoint has no renewed reference."""
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
