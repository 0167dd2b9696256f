"""Tiny MLX policies for the backend's tests; batches and coefficients are those of the other backends."""

import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gvpo_core.training.config import ModelConfig, OptimizerConfig


def require(*modules: str, subject: str = "mlx") -> None:
    """Skips the test file where a module is missing; an error where GVPO_SUBJECTS asks for the subject."""
    asked = subject in os.environ.get("GVPO_SUBJECTS", "").split(",")
    for name in modules or ("mlx.core", "mlx_lm", "transformers"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            if asked:
                raise
            pytest.skip(f"{name} is not installed: {error}", allow_module_level=True)


def policy(
    folder: Path,
    *,
    updates: int = 10,
    reference: bool = False,
    seed: int = 0,
    compiled: bool | None = None,
    **settings: Any,
) -> Any:
    """`gvpo_mlx.MLXPolicy` on CPU, with settings of either config section."""
    from gvpo_mlx import MLXPolicy

    model = {k: v for k, v in settings.items() if k in ModelConfig.__dataclass_fields__}
    optimizer = {k: v for k, v in settings.items() if k not in model}
    return MLXPolicy(
        ModelConfig(path=str(folder), **({"device": "cpu"} | model)),
        OptimizerConfig(**({"learning_rate": 1e-3, "max_gradient_norm": 0.0} | optimizer)),
        updates=updates,
        reference=reference,
        seed=seed,
        compiled=compiled,
    )


def parameters(of: Any) -> dict[str, np.ndarray]:
    """The trained parameters, float64."""
    return {n: np.array(p).astype(np.float64) for n, p in zip(of.scorer.names, of.scorer.parameters, strict=True)}
