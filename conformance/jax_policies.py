"""Tiny JAX policies for the backend's tests; batches and coefficients are those of torch_policies."""

from pathlib import Path
from typing import Any

import numpy as np

from gvpo_core.training.config import ModelConfig, OptimizerConfig

MODULES = ("jax", "optax", "orbax.checkpoint", "transformers")


def policy(folder: Path, *, updates: int = 10, reference: bool = False, seed: int = 0, **settings: Any) -> Any:
    """`gvpo_jax.load` on one CPU device, with settings of either config section."""
    from gvpo_jax import load

    model = {k: v for k, v in settings.items() if k in ModelConfig.__dataclass_fields__}
    optimizer = {k: v for k, v in settings.items() if k not in model}
    return load(
        ModelConfig(path=str(folder), **({"device": "cpu:0"} | model)),
        OptimizerConfig(**({"learning_rate": 1e-3, "max_gradient_norm": 0.0} | optimizer)),
        updates=updates,
        reference=reference,
        seed=seed,
    )


def parameters(of: Any) -> dict[str, np.ndarray]:
    """The trained parameters, float64, layers stacked."""
    return {name: np.asarray(a, np.float64) for name, a in of._trained.items()}


def by_layer(stacked: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same under transformers' own names."""
    found = {}
    for name, value in stacked.items():
        for i in range(len(value)) if "*" in name else (None,):
            found[name if i is None else name.replace("*", str(i))] = value if i is None else value[i]
    return found
