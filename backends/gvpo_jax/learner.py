"""The trained state (parameters or adapters, AdamW's moments) and the parts of an exact optimizer step over a mesh."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from gvpo_core.training.config import OptimizerConfig
from gvpo_core.training.policy import Coefficients
from gvpo_core.training.policy.step import factors_of
from gvpo_jax import mesh, update
from gvpo_jax.model import Parameters, Setup
from gvpo_jax.programs import Programs, out_of_memory
from gvpo_jax.rows import Rows


class Learner:
    """Holds the state that a checkpoint stores. A step is `no_gradient`, then `grouped` and `known`, then `step`."""

    def __init__(
        self,
        setup: Setup,
        programs: Programs,
        config: OptimizerConfig | None,
        parameters: Parameters,
        adapters: Parameters,
    ) -> None:
        """`config`: None if nothing will be trained; then there are no moments."""
        self.setup, self.programs, self.config = setup, programs, config
        self.mesh = setup.mesh
        self.parameters, self.adapters = parameters, adapters
        self.shapes = {name: a.shape for name, a in self.trained.items()}
        self._shardings = mesh.parameter_shardings(self.mesh, self.shapes)
        self._state: Any = None if config is None else self._empty_state()

    @property
    def trained(self) -> Parameters:
        """The adapters if the model has them, else all parameters."""
        return self.adapters or self.parameters

    @property
    def _all(self) -> tuple[Parameters, Parameters]:
        """The trained and the frozen parameters."""
        return self.trained, self.parameters if self.adapters else {}

    def _empty_state(self) -> Any:
        """AdamW's moments, sharded like the parameters."""
        out = optax.ScaleByAdamState(mesh.replicated(self.mesh), self._shardings, self._shardings)
        with out_of_memory("AdamW's moments"):
            return jax.jit(update.no_moments, out_shardings=out)(self.trained)

    def no_gradient(self) -> Parameters:
        """Returns zeros, to which the gradients of a step are added."""
        static = (self.mesh, tuple(self.shapes.items()))
        return self.programs.call(update.no_gradient, static, out=self._shardings)  # type: ignore[no-any-return]

    def grouped(
        self, total: Parameters, micro: Sequence[Rows], coefficients: Coefficients
    ) -> tuple[Parameters, np.ndarray, np.ndarray]:
        """Runs micro-batches of groups: all forward passes, then the coefficients, then all backward passes.

        Returns: the summed gradients, (r,) log-probs, and the (r,) indices of their responses.
        """
        passes, sums, responses = [], [], []
        for rows in micro:
            inputs = mesh.put_all(rows.arrays, self.mesh)
            passes.append((rows, inputs, *self.programs.call(update.forward, (self.setup,), *self._all, inputs)))
        for rows, _, values, _ in passes:
            assert rows.source is not None
            sums.append(rows.sums(mesh.local(values)))
            responses.append(rows.source.responses)
        logprobs, chosen = np.concatenate(sums), np.concatenate(responses)
        factors = np.split(factors_of(coefficients, logprobs, chosen), np.cumsum([len(part) for part in sums])[:-1])
        while passes:
            rows, inputs, _, saved = passes.pop()
            spread = mesh.put(rows.spread(factors.pop()), self.mesh)
            arguments = (total, saved, *self._all, inputs, spread)
            total = self.programs.call(update.backward, (), *arguments, donate=(0,), out=self._shardings)
        return total, logprobs, chosen

    def known(self, total: Parameters, rows: Rows, factors: np.ndarray) -> Parameters:
        """Backward pass of a micro-batch with known factors. Returns the summed gradients without waiting for them."""
        spread = rows.spread(factors[rows.source.responses] if rows.source else np.zeros(0))
        return self.programs.call(  # type: ignore[no-any-return]
            update.accumulate,
            (self.setup,),
            total,
            *self._all,
            mesh.put_all(rows.arrays, self.mesh),
            mesh.put(spread, self.mesh),
            donate=(0,),
            out=self._shardings,
        )

    def step(self, total: Parameters, rate: float, steps_taken: int) -> float:
        """Clips and steps. Returns the norm before clipping, over all parameters and processes.

        Raises: FloatingPointError: a gradient is not finite; nothing was changed.
        """
        assert self.config is not None
        total_norm, norms = self.programs.call(update.norms, (), total, out=mesh.replicated(self.mesh))
        norm = float(total_norm)
        scale = update.clip_scale(norm, norms, self.config.max_gradient_norm)
        b1, b2 = self.config.betas
        numbers = update.adamw_numbers(b1, b2, self.config.weight_decay, rate, scale, steps_taken)
        trained, self._state = self.programs.call(
            update.step,
            (b1, b2, self.config.eps),
            self.trained,
            self._state,
            total,
            {name: mesh.put(value, self.mesh, None) for name, value in numbers.items()},
            donate=(0, 1),  # no array of the result could reuse the gradient's memory
            out=(self._shardings, jax.tree.map(lambda a: a.sharding, self._state)),
        )
        self._set_trained(trained)
        return norm

    def _set_trained(self, trained: Parameters) -> None:
        if self.adapters:
            self.adapters = trained
        else:
            self.parameters = trained

    def copied(self, dtype: Any) -> Parameters:
        """Returns a copy of the trained parameters: a step reuses the memory of the originals."""
        static = (np.dtype(dtype),)
        return self.programs.call(update.copied, static, self.trained, out=self._shardings)  # type: ignore[no-any-return]

    def arrays(self) -> dict[str, Any]:
        """Returns the arrays of a checkpoint, with their current sharding."""
        adam = self._state
        return self.parameters_alone() | {"exp_avg": adam.mu, "exp_avg_sq": adam.nu, "count": adam.count}

    def parameters_alone(self) -> dict[str, Any]:
        """Returns the trained parameters in the form of `arrays`, without moments."""
        return {"parameter": dict(self.trained)}

    def take_parameters(self, arrays: Mapping[str, Any]) -> None:
        """Continues with other parameters, in the form of `parameters_alone`."""
        self._set_trained(arrays["parameter"])

    def take(self, arrays: Mapping[str, Any]) -> None:
        """Continues from a checkpoint's arrays, in the form and sharding of `arrays`."""
        self._state = optax.ScaleByAdamState(arrays["count"], arrays["exp_avg"], arrays["exp_avg_sq"])
        self._set_trained(arrays["parameter"])
