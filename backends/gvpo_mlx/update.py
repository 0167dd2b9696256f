"""One optimizer step along -sum_i c_i grad log pi_i, however the batch is split."""

import io
import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from gvpo_core.training.config import OptimizerConfig
from gvpo_core.training.policy import Batch, Coefficients, layout
from gvpo_core.training.policy.layout import Row
from gvpo_core.training.policy.step import factors_of
from gvpo_mlx import buckets
from gvpo_mlx.model import Scorer, inputs

PIECE = 256  # numbers that are summed in float32


class Passes:
    """Forward and backward passes over micro-batches; if `compiled`, one program per shape."""

    def __init__(self, scorer: Scorer, packed: bool, tokens: int, compiled: bool) -> None:
        self.scorer, self.packed, self.budget, self.compiled = scorer, packed, tokens, compiled
        self.shapes: set[tuple[Any, ...]] = set()  # shapes with a compiled program
        self.separable: dict[tuple[Any, ...], bool] = {}  # by shape: whether its forward pass needs no factors
        self._score = self._compile(self._plain_score)
        self._backward = self._compile(self._plain_backward)

    def _compile(self, function: Any) -> Any:
        return mx.compile(function) if self.compiled else function

    def _plain_score(self, values: Sequence[mx.array], on: dict[str, mx.array]) -> mx.array:
        return self.scorer.score(values, **on, packed=self.packed)

    def _plain_backward(
        self, values: list[mx.array], on: dict[str, mx.array], factors: mx.array
    ) -> tuple[mx.array, list[mx.array]]:
        scores, gradients = mx.vjp(lambda *v: self.scorer.score(v, **on, packed=self.packed), values, [factors])
        return scores[0], gradients

    def prepare(self, batch: Batch, rows: Sequence[Row], name: str) -> tuple[layout.Arrays, dict[str, mx.array]]:
        """Returns the micro-batch, and its inputs padded to one of few shapes. The first targets are its own."""
        arrays = layout.arrays(batch, rows)
        self.scorer.check_length(int(arrays.positions[arrays.segments >= 0].max()) + 1)
        padded = buckets.padded(arrays, self.budget) if self.compiled else arrays
        if self.compiled:
            self.shapes.add((name, padded.ids.shape, padded.targets.shape))
        return arrays, inputs(padded)

    def score(
        self, batch: Batch, rows: Sequence[Row], parameters: list[mx.array] | None = None
    ) -> tuple[layout.Arrays, np.ndarray, int]:
        """Returns the micro-batch, the log-probability of each response token, and the number of tokens computed.

        Args:
          parameters: to score with. Default: the scorer's own.
        """
        arrays, on = self.prepare(batch, rows, "score")
        values = self._score(self.scorer.parameters if parameters is None else parameters, on)
        return arrays, np.array(values)[: len(arrays.targets)], on["ids"].size

    def known(
        self, batch: Batch, rows: Sequence[Row], factors: np.ndarray
    ) -> tuple[layout.Arrays, np.ndarray, list[mx.array], int]:
        """Like `score`, plus the gradients of sum factors_i log pi_i. `factors`: one for each response of the batch."""
        arrays, on = self.prepare(batch, rows, "backward")
        per_token = np.zeros(on["targets"].shape, dtype=np.float32)
        per_token[: len(arrays.targets)] = arrays.spread(factors[arrays.responses])
        values, gradients = self._backward(self.scorer.parameters, on, mx.array(per_token))
        mx.eval(gradients, values)
        return arrays, np.array(values)[: len(arrays.targets)], gradients, on["ids"].size

    def grouped(
        self, batch: Batch, rows: Sequence[Row], coefficients: Coefficients
    ) -> tuple[layout.Arrays, np.ndarray, list[mx.array], int]:
        """Like `known`, with factors that depend on the log-probs of this pass, for micro-batches of whole groups.

        The graph of the backward pass is built with an array of factors. Its memory is written through a NumPy view,
        after the forward pass is evaluated and before the backward pass is. A compiled program may compute parts of
        both passes in one kernel; its graph shows this, and its shape is then not compiled. A custom function whose
        backward pass evaluates the forward pass would not need this write, but MLX would keep all its arrays: 1.4 times
        the memory, 2.3 times if layers are recomputed.

        Raises: RuntimeError: the view does not share the array's memory.
        """
        arrays, on = self.prepare(batch, rows, "backward")
        factors = mx.zeros(on["targets"].shape)
        mx.eval(factors)
        values, gradients = self._forward_first(on, factors)
        mx.eval(values)
        logprobs = np.array(values)[: len(arrays.targets)]
        response_factors = factors_of(coefficients, arrays.sums(logprobs), arrays.responses)
        view = np.array(factors, copy=False)
        view[: len(arrays.targets)] = arrays.spread(-response_factors)
        if not np.array_equal(np.array(factors), view):
            raise RuntimeError(
                'MLX does not share an array\'s memory with NumPy on this device: set optimizer.strategy = "score"'
            )
        mx.eval(gradients)
        return arrays, logprobs, gradients, on["ids"].size

    def _forward_first(self, on: dict[str, mx.array], factors: mx.array) -> tuple[mx.array, list[mx.array]]:
        """Builds the pass so that its values can be evaluated before the factors are known."""
        shape = (on["ids"].shape, on["targets"].shape)
        if self.separable.get(shape, True):
            values, gradients = self._backward(self.scorer.parameters, on, factors)
            if shape not in self.separable:
                self.separable[shape] = not self.compiled or not depends_on(values, factors)
            if self.separable[shape]:
                return values, gradients
        return self._plain_backward(self.scorer.parameters, on, factors)


def depends_on(result: mx.array, given: mx.array) -> bool:
    """Whether an array that is not evaluated yet depends on `given`."""
    text = io.StringIO()
    mx.export_to_dot(text, result, given=given)  # type: ignore[arg-type]
    return '"given" ->' in text.getvalue()


class Gradients:
    """Gradients, summed over micro-batches and ranks in float32."""

    def __init__(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> None:
        self.names = names
        self.sums = [mx.zeros(shape) for shape in shapes]  # lazy: no memory until they are evaluated
        self._empty = True

    def add(self, gradients: list[mx.array]) -> None:
        """Adds gradients. Removes them from the list, so that none is in memory twice."""
        for i in reversed(range(len(self.sums))):
            gradient = gradients.pop().astype(mx.float32)
            self.sums[i] = gradient if self._empty else self.sums[i] + gradient
            mx.eval(self.sums[i])
        self._empty = False

    def clipped(self, limit: float) -> tuple[list[mx.array], float]:
        """Returns the gradients scaled down to norm `limit` (0: never), and their norm before.

        Raises: FloatingPointError: a gradient is not finite; the message names the parameters.
        """
        squares = [square_sum(g) for g in self.sums]
        norm = math.sqrt(sum(squares))
        if not math.isfinite(norm):
            bad = [n for n, square in zip(self.names, squares, strict=True) if not math.isfinite(square)]
            raise FloatingPointError(
                f"the gradient norm is {norm}: the gradients of {len(bad)} of {len(self.names)} parameters are not "
                f"finite, the first {', '.join(bad[:3]) or 'none alone (their sum overflows)'}; no step was taken"
            )
        if limit <= 0 or norm <= limit:
            return self.sums, norm
        factor = limit / (norm + 1e-6)
        return [g * factor for g in self.sums], norm


def square_sum(x: mx.array) -> float:
    """Sum of squares: pieces of 256 numbers in float32, the pieces in float64 on the host.

    On CPU, MLX adds float32 numbers one after another, and is 20 % too low for 136 million numbers.
    """
    flat = mx.square(x.astype(mx.float32)).reshape(-1)
    even = flat.size // PIECE * PIECE
    pieces = np.array(flat[:even].reshape(-1, PIECE).sum(1)).astype(np.float64)
    return float(pieces.sum() + np.array(flat[even:]).astype(np.float64).sum())


class AdamW:
    """AdamW as in PyTorch, with weight decay on matrices only.

    mlx.optimizers.AdamW computes the bias corrections in float32, where 1 - 0.999 has a relative error of 1e-5 or more.
    Here the host computes them in float64.
    """

    def __init__(self, config: OptimizerConfig, compiled: bool) -> None:
        self.config = config
        self.moments: list[tuple[mx.array, mx.array]] = []
        self.steps = 0
        self._one = mx.compile(self._plain) if compiled else self._plain

    def step(self, values: Sequence[mx.array], gradients: Sequence[mx.array], rate: float) -> list[mx.array]:
        """Returns the new parameters and updates `moments`; neither is evaluated yet."""
        if not self.moments:
            self.moments = [(mx.zeros(v.shape), mx.zeros(v.shape)) for v in values]
        self.steps += 1
        first, second = self.config.betas
        size = mx.array(rate / (1.0 - first**self.steps), dtype=mx.float32)
        root = mx.array(math.sqrt(1.0 - second**self.steps), dtype=mx.float32)
        result = []
        for i, (value, gradient) in enumerate(zip(values, gradients, strict=True)):
            decay = 1.0 - rate * (self.config.weight_decay if value.ndim >= 2 else 0.0)
            keep = mx.array(decay, dtype=mx.float32)
            value, *moments = self._one(value, gradient, *self.moments[i], size, root, keep)
            self.moments[i] = (moments[0], moments[1])
            result.append(value)
        return result

    def _plain(self, value: Any, gradient: Any, m: Any, v: Any, size: Any, root: Any, keep: Any) -> tuple[Any, ...]:
        first, second = self.config.betas
        m = m + (1.0 - first) * (gradient - m)
        v = second * v + (1.0 - second) * mx.square(gradient)
        return value * keep - size * m / (mx.sqrt(v) / root + self.config.eps), m, v
