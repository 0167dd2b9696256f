"""Tiny PyTorch policies and batches for the backend's tests."""

import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gvpo_core.training.config import ModelConfig, OptimizerConfig
from gvpo_core.training.policy import Batch


def require(*modules: str, subject: str = "torch") -> None:
    """Skips the test file where a module is missing; an error where GVPO_SUBJECTS asks for the subject."""
    asked = subject in os.environ.get("GVPO_SUBJECTS", "").split(",")
    for name in modules or ("torch", "transformers", "accelerate", "peft"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            if asked:
                raise
            pytest.skip(f"{name} is not installed: {error}", allow_module_level=True)


def policy(folder: Path, *, updates: int = 10, reference: bool = False, seed: int = 0, **settings: Any) -> Any:
    """`gvpo_torch.load` on CPU, with settings of either config section."""
    from gvpo_torch import load

    model = {k: v for k, v in settings.items() if k in ModelConfig.__dataclass_fields__}
    optimizer = {k: v for k, v in settings.items() if k not in model}
    return load(
        ModelConfig(path=str(folder), **({"device": "cpu"} | model)),
        OptimizerConfig(**({"learning_rate": 1e-3, "max_gradient_norm": 0.0} | optimizer)),
        updates=updates,
        reference=reference,
        seed=seed,
    )


def batch(groups: tuple[int, ...] = (4, 3, 2), *, seed: int = 1, longest: int = 9, vocabulary: int = 96) -> Batch:
    """Groups of the given sizes, prompts and responses of different lengths, rows shuffled; ids 0 anywhere."""
    draw = np.random.default_rng(seed)
    rows = []
    for label, size in enumerate(groups):
        prompt = tuple(draw.integers(0, vocabulary, int(draw.integers(3, 12))).tolist())
        for _ in range(size):
            response = draw.integers(0, vocabulary, int(draw.integers(1, longest + 1))).tolist()
            rows.append((prompt, (*response[:-1], 0), label + 7))
    order = draw.permutation(len(rows))
    prompts, responses, labels = zip(*(rows[i] for i in order), strict=True)
    return Batch(list(prompts), list(responses), list(labels))


def coefficients_of(of: Batch, *, beta: float = 0.1, rewards: np.ndarray | None = None) -> Any:
    """A `Coefficients` whose factors depend on the log-probs of the whole group, with made-up rewards."""
    rewards = np.random.default_rng(5).normal(size=len(of)) if rewards is None else rewards
    labels = np.asarray(of.groups)

    def coefficients(logprobs: np.ndarray, rows: np.ndarray) -> np.ndarray:
        total = len(set(labels.tolist()))
        found = np.empty(len(rows))
        for n, row in enumerate(rows):
            mates = [m for m, other in enumerate(rows) if labels[other] == labels[row]]
            assert len(mates) == (labels == labels[row]).sum(), "coefficients were asked for part of a group"
            value = rewards[rows] - beta * logprobs
            found[n] = (value[n] - value[mates].mean()) / (max(len(mates) - 1, 1) * total)
        return found

    return coefficients


def parameters(of: Any) -> dict[str, np.ndarray]:
    """The trained parameters, float64."""
    return {name: p.detach().double().numpy().copy() for name, p in of._named.items()}


def step_difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """Norm of the difference of two parameter sets over the norm of the first."""
    assert a.keys() == b.keys()
    apart = sum(float(((a[name] - b[name]) ** 2).sum()) for name in a)
    return (apart / sum(float((a[name] ** 2).sum()) for name in a)) ** 0.5
