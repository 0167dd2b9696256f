"""Tiny MLX policies: what the tests need of the backend; see `trainer_backends.Backend.policies`."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import batches
import numpy as np
import pytest

from gvpo_core.training.policy import Response
from gvpo_core.training.sampling import Sampling


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

    given = batches.sections(folder, "cpu", settings)
    return MLXPolicy(*given, updates=updates, reference=reference, seed=seed, compiled=compiled)


def quantize(folder: Path, bits: int = 4, mode: str = "affine", dtype: str = "float32") -> Path:
    """The folder's model quantized in place, as mlx-lm's own converter does it; scales in `dtype`."""
    import json

    import mlx.core as mx
    from gvpo_mlx.model import load_scorer
    from mlx.utils import tree_flatten
    from mlx_lm.utils import quantize_model

    from gvpo_core.training.config import ModelConfig

    scorer = load_scorer(ModelConfig(path=str(folder), dtype=dtype), 0)
    scorer.lm.set_dtype(getattr(mx, dtype))
    for module in scorer.lm.modules():
        if "rope" in module and "inner" in module.rope:
            module.rope = module.rope.inner
    config = json.loads((folder / "config.json").read_text())
    lm, config = quantize_model(scorer.lm, config, group_size=32, bits=bits, mode=mode)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(lm.parameters())), {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def parameters(of: Any) -> dict[str, np.ndarray]:
    """The trained parameters, float64."""
    return {n: np.array(p).astype(np.float64) for n, p in zip(of.scorer.names, of.scorer.parameters, strict=True)}


def dtypes(of: Any) -> set[str]:
    """Of the trained parameters."""
    return {str(p.dtype).removeprefix("mlx.core.") for p in of.scorer.parameters}


def held_bytes(of: Any) -> int:
    """Of parameters and moments."""
    from gvpo_mlx import memory

    return memory.held(of.scorer.lm) + sum(a.nbytes for pair in of._optimizer.moments for a in pair)


def first_moments(of: Any) -> dict[str, np.ndarray]:
    """AdamW's, float64; none before the first step."""
    held = [np.array(m).astype(np.float64) for m, _ in of._optimizer.moments]
    return dict(zip(of.scorer.names, held, strict=True)) if held else {}


def fill(of: Any, name: str, value: float) -> None:
    """Sets all numbers of a parameter."""
    import mlx.core as mx

    own = zip(of.scorer.names, of.scorer.parameters, strict=True)
    of.scorer.parameters = [mx.full(p.shape, value, p.dtype) if n == name else p for n, p in own]


@contextlib.contextmanager
def spoiled_gradient(of: Any, name: str) -> Iterator[None]:
    """The gradient of this parameter is NaN."""
    place, plain = of.scorer.names.index(name), of._passes._backward

    def spoiled(*arguments: Any) -> Any:
        values, gradients = plain(*arguments)
        gradients[place] = gradients[place] * float("nan")
        return values, gradients

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of._passes, "_backward", spoiled)
        yield


def global_settings() -> tuple[Any, ...]:
    """What loading and stepping must leave as it was."""
    import resource

    import mlx.core as mx

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    return limit, np.array(mx.random.state[0]).tolist(), mx.default_device(), mx.default_stream(mx.cpu)


def logits(of: Any, ids: tuple[int, ...]) -> np.ndarray:
    """(T, V) float64 by mlx-lm's own forward pass, without a cache."""
    import mlx.core as mx

    return np.array(of.scorer.lm(mx.array([ids]))[0]).astype(np.float64)


def sample(
    of: Any, prompts: list[Any], seeds: list[list[int]], sampling: Sampling, patch: Any
) -> tuple[list[list[Response]], np.ndarray]:
    """Responses, and the log-prob of each at temperature 1 as the sampler saw it."""
    from gvpo_mlx import generate

    return batches.sample_watched(of, generate, prompts, seeds, sampling, patch)


def pick(values: np.ndarray, numbers: np.ndarray, sampling: Sampling) -> list[int]:
    """The sampler's choice from (R, V) logits."""
    import mlx.core as mx
    from gvpo_mlx import choice

    return choice.pick(mx.array(values.astype(np.float32)), numbers, sampling).tolist()


def truncate(masses: np.ndarray, sampling: Sampling) -> np.ndarray:
    """What the sampler leaves of (R, V) masses."""
    from gvpo_mlx import choice

    return choice.truncate(masses.copy(), sampling)
