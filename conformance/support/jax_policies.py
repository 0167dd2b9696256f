"""Tiny JAX policies: what the tests need of the backend; see `trainer_backends.Backend.policies`."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import batches
import numpy as np
import pytest
from places import DEVICE

from gvpo_core.training.policy import Response
from gvpo_core.training.sampling import Sampling

WIDTH = 96  # of the row that `logits` computes: one program for every length


def policy(folder: Path, *, updates: int = 10, reference: bool = False, seed: int = 0, **settings: Any) -> Any:
    """`gvpo_jax.load` on one device, with settings of either config section."""
    from gvpo_jax import load

    return load(*batches.sections(folder, f"{DEVICE}:0", settings), updates=updates, reference=reference, seed=seed)


def parameters(of: Any) -> dict[str, np.ndarray]:
    """The trained parameters, float64, each layer's for itself, under transformers' own names."""
    return _by_layer(of.learner.trained)


def _by_layer(stacked: Any) -> dict[str, np.ndarray]:
    found = {}
    for name, array in stacked.items():
        value = np.asarray(array, np.float64)
        found |= {name.replace("*", str(i)): v for i, v in enumerate(value)} if "*" in name else {name: value}
    return found


def dtypes(of: Any) -> set[str]:
    """Of the trained parameters."""
    return {str(a.dtype) for a in of.learner.trained.values()}


def held_bytes(of: Any) -> int:
    """Of parameters and moments."""
    import jax

    return sum(
        array.nbytes for array in jax.tree.leaves((of.learner.parameters, of.learner.adapters, of.learner._state))
    )


def first_moments(of: Any) -> dict[str, np.ndarray]:
    """AdamW's, float64; zeros before the first step."""
    return _by_layer(of.learner.arrays()["exp_avg"])


def fill(of: Any, name: str, value: float) -> None:
    """Sets all numbers of a parameter that is of no layer."""
    import jax

    own = of.learner.parameters[name]
    of.learner.parameters |= {name: jax.device_put(np.full(own.shape, value, own.dtype), own.sharding)}


@contextlib.contextmanager
def spoiled_gradient(of: Any, name: str) -> Iterator[None]:
    """The gradient of this parameter of a layer has a NaN."""
    parts = name.split(".")
    layer = next(part for part in parts if part.isdigit())
    stacked, plain = ".".join("*" if part == layer else part for part in parts), of.learner.step

    def step(total: Any, *numbers: Any) -> Any:
        return plain(total | {stacked: total[stacked].at[int(layer), 0, 0].set(np.nan)}, *numbers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of.learner, "step", step)
        yield


def global_settings() -> dict[str, Any]:
    """What loading and stepping must leave as it was."""
    import jax

    return dict(jax.config.values)


def logits(of: Any, ids: tuple[int, ...]) -> np.ndarray:
    """(T, V) float64 by the model that scores, without a cache."""
    from gvpo_jax import mesh

    row = np.zeros((1, WIDTH), np.int32)
    row[0, : len(ids)] = ids  # what follows is not seen by what comes before
    given = [mesh.put(a, of.mesh, None) for a in (row, np.arange(WIDTH, dtype=np.int32)[None], 0 * row, 0 * row)]
    found = of.programs.call(_forward, (of.setup,), of.learner.parameters, of.learner.adapters, *given)
    return np.asarray(found, np.float64)[: len(ids)]


def _forward(setup: Any, parameters: Any, adapters: Any, *given: Any) -> Any:
    from gvpo_jax import model

    return model.logits(setup, parameters, model.hidden_states(setup, parameters, adapters, *given)[0])


def sample(
    of: Any, prompts: list[Any], seeds: list[list[int]], sampling: Sampling, patch: Any
) -> tuple[list[list[Response]], np.ndarray]:
    """Responses, and the log-prob of each at temperature 1 as the sampler saw it."""
    responses, sums = of.sample(prompts, seeds, sampling)
    return responses, np.concatenate(sums)


def pick(values: np.ndarray, numbers: np.ndarray, sampling: Sampling) -> list[int]:
    """The sampler's choice from (R, V) logits."""
    import jax.numpy as jnp
    from gvpo_jax import decoding

    given, names = _settings(sampling)
    wide = lambda a: jnp.asarray(a, jnp.float32)
    return decoding.pick(wide(values), wide(numbers), given, sampling.temperature == 0, names).tolist()


def truncate(masses: np.ndarray, sampling: Sampling) -> np.ndarray:
    """What the sampler leaves of (R, V) masses."""
    import jax.numpy as jnp
    from gvpo_jax import decoding

    return np.asarray(decoding.truncate(jnp.asarray(masses, jnp.float32), *_settings(sampling)), np.float64)


def _settings(sampling: Sampling) -> tuple[dict[str, Any], tuple[str, ...]]:
    import jax.numpy as jnp

    names = tuple(name for name in ("top_k", "min_p", "top_p") if getattr(sampling, name) != getattr(Sampling(1), name))
    given = {name: jnp.asarray(getattr(sampling, name)) for name in (*names, "temperature")}
    return given, names
