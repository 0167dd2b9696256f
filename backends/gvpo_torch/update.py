"""One optimizer step along -sum_i c_i grad log pi_i, however the batch is split."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from gvpo_core.training.config import OptimizerConfig
from gvpo_core.training.policy import Batch, Coefficients, layout
from gvpo_core.training.policy.layout import Row
from gvpo_core.training.policy.step import factors_of
from gvpo_torch.model import Scorer, score
from gvpo_torch.quantized import adamw_8bit, vocabulary
from gvpo_torch.ranks import Ranks

Score = Callable[[layout.Arrays, bool], Tensor]

_PIECE = 1024  # elements of a gradient whose squares are summed together, in float32 or wider


def make_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Returns AdamW over the parameters that need gradients. Weight decay applies to matrices only."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "eps": config.eps}
    if config.name == "adamw_8bit":
        return adamw_8bit(groups, vocabulary(module), **options)
    return torch.optim.AdamW(
        groups, **options, fused=all(p.device.type in ("cpu", "cuda", "xpu", "mps") for p in trained)
    )


def step(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Takes an optimizer step at learning rate `rate`, then clears the gradients."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class Backward:
    """The backward passes of one step: sums gradients over micro-batches and ranks."""

    def __init__(self, score: Score, trained: nn.Module, world_size: int) -> None:
        """`trained`: the module prepared by DDP or FSDP2. They average over ranks, so losses are scaled up."""
        self.score, self.trained, self.world_size = score, trained, world_size
        self.tokens = 0

    def deferred(
        self,
        batch: Batch,
        micro: Sequence[Sequence[Row]],
        coefficients: Coefficients,
        passes: int,
        recomputing: Callable[[], contextlib.AbstractContextManager[Any]],
    ) -> np.ndarray:
        """Runs all micro-batches of whole groups forward, makes coefficients, then runs them backward, last one first.

        All micro-batches but the last keep only the inputs of their layers, which are recomputed in the backward pass.

        Args:
          passes: at least len(micro). The passes beyond it are empty and match passes of other ranks.
          recomputing: makes a context in which a forward pass keeps only the inputs of layers.
        Returns: (N,) float64 log-probs of the rows in `micro`, NaN elsewhere.
        """
        pending = []
        for number in range(passes):
            arrays = layout.arrays(batch, micro[number]) if number < len(micro) else EMPTY
            with contextlib.nullcontext() if number == len(micro) - 1 else recomputing():
                pending.append((arrays, self.forward(arrays, False)))
        current = pending[: len(micro)]
        logprobs, factors = np.full(len(batch), np.nan), np.zeros(max(1, len(batch)))
        if current:  # one wait for the device
            values = torch.cat([values.detach() for _, values in current]).cpu().numpy()
            parts = np.split(values, np.cumsum([len(arrays.targets) for arrays, _ in current])[:-1])
            for (arrays, _), part in zip(current, parts, strict=True):
                logprobs[arrays.responses] = arrays.sums(part)
            rows = np.concatenate([arrays.responses for arrays, _ in current])
            factors[rows] = factors_of(coefficients, logprobs[rows], rows)
        while pending:
            arrays, sums = pending.pop()
            self.backward(sums, np.zeros(1) if arrays is EMPTY else factors[arrays.responses], arrays)
        return logprobs

    def known(self, batch: Batch, micro: Sequence[Sequence[Row]], weights: np.ndarray, passes: int) -> np.ndarray:
        """Adds the gradient of -sum weights_i log pi_i, in `passes` passes; those beyond len(micro) are empty.

        Returns: (N,) float64 log-probs of the rows in `micro`, NaN elsewhere.
        """
        logprobs = np.full(len(batch), np.nan)
        for number in range(passes):
            if number < len(micro):
                arrays, factors = layout.arrays(batch, micro[number]), weights
            else:
                arrays, factors = EMPTY, np.zeros(1)
            with self._synchronised(number == passes - 1):
                values = self.forward(arrays)
                if number < len(micro):
                    logprobs[arrays.responses] = arrays.sums(values.detach().cpu().numpy())
                self.backward(values, factors[arrays.responses], arrays)
        return logprobs

    def forward(self, arrays: layout.Arrays, reduces: bool = True) -> Tensor:
        """Returns (n,) differentiable log-probabilities of a micro-batch's response tokens, and counts its tokens."""
        self.tokens += arrays.ids.size
        return self.score(arrays, reduces)

    def backward(self, values: Tensor, factors: np.ndarray, arrays: layout.Arrays) -> None:
        """Adds the gradient of -sum_i c_i log pi_i, with c = `factors` of the micro-batch's responses."""
        per_token = torch.from_numpy(arrays.spread(factors) * -self.world_size)
        # Passed as the gradient of the output, not in a loss: no product is kept, and factors of 0 give exact zeros.
        values.backward(per_token.to(values))

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager[None]:
        # FSDP2 reduces at every pass, so that gradients stay sharded.
        if isinstance(self.trained, nn.parallel.DistributedDataParallel) and not last:
            return self.trained.no_sync()
        return contextlib.nullcontext()


@contextlib.contextmanager
def in_step(ranks: Ranks, scorer: Scorer, device: torch.device) -> Iterator[Any]:
    """Yields the forward pass of a sharded scorer, for calls without gradients.

    Every rank must make the same number of calls, so ranks that finish first make empty ones.
    """

    def forward(*args: Any, **options: Any) -> Tensor:
        ranks.most(1)
        values: Tensor = scorer(*args, **options)
        return values

    yield forward
    while ranks.most(0):
        score(scorer, EMPTY, device)


def most_passes(ranks: Ranks, passes: Sequence[int]) -> list[int]:
    """Returns the largest number of passes of any rank, for each round; FSDP2 gathers and reduces in every pass."""
    rounds = ranks.most(len(passes))
    padded = np.zeros(rounds, np.int64)
    padded[: len(passes)] = passes
    most: list[int] = ranks.gather(padded).reshape(ranks.world_size, rounds).max(0).tolist()
    return most


EMPTY = layout.arrays(Batch([(0,)], [(0,)], [0]), [Row((0,), (0,), 1)])  # an empty pass, to match one of another rank


def clip(named: Iterable[tuple[str, nn.Parameter]], limit: float) -> float:
    """Scales gradients down to norm `limit` (0: never). Returns the norm before, over all parameters and ranks.

    Raises: FloatingPointError: a gradient is not finite; the message names the parameters.
    """
    gradients = [(name, p.grad) for name, p in named if p.grad is not None]
    squares = sums_of_squares([gradient for _, gradient in gradients])
    norm = math.sqrt(math.fsum(squares)) if all(map(math.isfinite, squares)) else math.inf
    if not math.isfinite(norm):
        bad = [name for (name, _), square in zip(gradients, squares, strict=True) if not math.isfinite(square)]
        raise FloatingPointError(
            f"the gradient norm is not finite: the gradients of {len(bad)} of {len(gradients)} parameters are not "
            f"finite, the first {', '.join(bad[:3]) or 'none alone (their sum overflows)'}; no step was taken"
        )
    if 0 < limit < norm:
        for _, gradient in gradients:
            gradient.mul_(limit / norm)
    return norm


def sums_of_squares(gradients: Sequence[Tensor]) -> list[float]:
    """Returns each gradient's sum of squares, over all ranks that hold a part of it. With shards every rank must call.

    Sums pieces of 1,024 elements in float32 or wider, and their sums in float64: on CPU torch adds the squares of a
    float32 tensor one after the other, which is 1.5 % off at 28 million elements.
    """
    by_layout: dict[Any, list[int]] = {}  # (device, mesh, placements) -> gradients that are reduced together
    for i, gradient in enumerate(gradients):
        mesh, placements = getattr(gradient, "device_mesh", None), getattr(gradient, "placements", ())
        by_layout.setdefault((gradient.device, mesh, placements), []).append(i)
    result = [0.0] * len(gradients)
    for (_, mesh, placements), members in by_layout.items():
        local = [cast(Any, g).to_local() if mesh is not None else g for g in (gradients[i] for i in members)]
        sums = torch.stack([_sum_of_squares(part) for part in local])
        if mesh is not None:
            from torch.distributed.tensor import DTensor, Partial

            parts = [Partial() if placement.is_shard() else placement for placement in placements]
            sums = DTensor.from_local(sums, mesh, parts).full_tensor()
        for i, value in zip(members, sums.tolist(), strict=True):
            result[i] = value
    return result


def _sum_of_squares(values: Tensor) -> Tensor:
    """Returns (), float64, summed in pieces."""
    flat = values.detach().reshape(-1)
    pieces = len(flat) - len(flat) % _PIECE
    wide = torch.promote_types(flat.dtype, torch.float32)
    norms = torch.linalg.vector_norm(flat[:pieces].view(-1, _PIECE), dim=1, dtype=wide)
    norms = torch.cat([norms, torch.linalg.vector_norm(flat[pieces:], dtype=wide).reshape(1)])
    norms = norms.cpu() if norms.device.type == "mps" else norms  # MPS has no float64
    return norms.double().square().sum()


def full_tensor(tensor: Tensor) -> Tensor:
    """Returns the full tensor, gathered from all ranks if it is sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
