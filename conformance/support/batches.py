"""Batches, coefficients, settings and the comparison of steps, for tiny policies of every backend."""

from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from gvpo_core.training.config import ModelConfig, OptimizerConfig
from gvpo_core.training.policy import Batch, Coefficients, Response, Tokens, Update
from gvpo_core.training.sampling import Sampling

# With these AdamW's step is lr * g / (|g| + 1), smooth in the gradient: no sign of a rounding error decides it.
SMOOTH: dict[str, Any] = {"learning_rate": 0.5, "betas": (0.0, 0.0), "eps": 1.0}


def sections(folder: Path, device: str, settings: dict[str, Any]) -> tuple[ModelConfig, OptimizerConfig]:
    """The two config sections that a backend's `load` takes, from settings of either."""
    model = {k: v for k, v in settings.items() if k in ModelConfig.__dataclass_fields__}
    optimizer = {k: v for k, v in settings.items() if k not in model}
    return (
        ModelConfig(path=str(folder), **({"device": device, "dtype": "float32"} | model)),
        OptimizerConfig(**({"learning_rate": 1e-3, "max_gradient_norm": 0.0} | optimizer)),
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


def masked(of: Batch, *, seed: int = 4) -> Batch:
    """The batch with context tokens in most responses, also first and last ones; one mask is None, one all True."""
    draw = np.random.default_rng(seed)
    own: list[tuple[bool, ...] | None] = []
    for response in of.responses:
        mask = (draw.random(len(response)) < 0.5).tolist()
        mask[int(draw.integers(len(response)))] = True
        own.append(tuple(mask))
    own[0], own[1] = None, (True,) * len(of.responses[1])
    return Batch(of.prompts, of.responses, of.groups, own)


def coefficients_of(of: Batch, *, beta: float = 0.1, rewards: np.ndarray | None = None) -> Coefficients:
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


def step_difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """Norm of the difference of two parameter sets over the norm of the first."""
    assert a.keys() == b.keys()
    apart = sum(float(((a[name] - b[name]) ** 2).sum()) for name in a)
    return (apart / sum(float((a[name] ** 2).sum()) for name in a)) ** 0.5


def moved(
    policies: ModuleType,
    folder: Path,
    of: Batch,
    coefficients: Coefficients | None = None,
    *,
    scored: np.ndarray | None = None,
    **settings: Any,
) -> tuple[dict[str, np.ndarray], Update]:
    """How one step of a fresh policy changes every parameter, and what `update` says of it.

    Args:
      policies: the backend's helper module.
      coefficients: default: `coefficients_of(of)`.
    """
    of_policy = policies.policy(folder, **(SMOOTH | settings))
    before = policies.parameters(of_policy)
    update = of_policy.update(of, coefficients or coefficients_of(of), scored=scored)
    after = policies.parameters(of_policy)
    return {name: after[name] - before[name] for name in after}, update


def sample_watched(
    of: Any, generate: ModuleType, prompts: list[Tokens], seeds: list[list[int]], sampling: Sampling, patch: Any
) -> tuple[list[list[Response]], np.ndarray]:
    """Responses drawn one at a time, and the log-prob of each at temperature 1 by the logits that it was drawn from.

    Args:
      generate: a backend's module whose `pick(logits, numbers, sampling)` draws.
      patch: pytest's monkeypatch.
    """
    plain, seen = generate.pick, []

    def pick(logits: Any, numbers: np.ndarray, settings: Sampling, *offered: Any) -> np.ndarray:
        chosen = plain(logits, numbers, settings, *offered)
        on_host = logits.cpu() if hasattr(logits, "cpu") else logits
        z = np.asarray(on_host, dtype=np.float64)[0]
        seen.append(z[chosen[0]] - z.max() - np.log(np.exp(z - z.max()).sum()))
        return chosen

    patch.setattr(generate, "pick", pick)
    responses, sums = [], []
    for prompt, row in zip(prompts, seeds, strict=True):
        responses.append([])
        for seed in row:
            seen.clear()
            responses[-1] += of.generate([prompt], [[seed]], sampling)[0]
            sums.append(sum(seen))
    return responses, np.asarray(sums)


def train(of_policy: Any, steps: Iterable[int]) -> list[object]:
    """One update for each number, on a batch of its own: what each of them gave."""
    found = []
    for step in steps:
        of = batch((4, 3), seed=step)
        update = of_policy.update(of, coefficients_of(of))
        found.append((update.logprobs.tolist(), update.gradient_norm, update.learning_rate))
    return found
