"""A tiny model with adapters and scored rows, for the tests of gvpo_mlx_lm."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from gvpo_mlx_lm import load
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.utils import linear_to_lora_layers

BETA, RATE = 0.3, 0.02
SIZES = (4, 2, 5, 3)


def scored_rows() -> list[dict]:
    draw = np.random.default_rng(4)
    return [
        {
            "prompt": "say " + "abcdefghij"[: int(draw.integers(1, 10))],
            "responses": ["".join(draw.choice(list("xyz aeiou"), int(draw.integers(0, 9)))) for _ in range(k)],
            "rewards": draw.normal(size=k).tolist(),
        }
        for k in SIZES
    ]


def adapted(folder: Path, *, kind: str = "lora", seed: int = 1, spread: float = 0.05, **parameters: float) -> nn.Module:
    """The tiny model with adapters that have moved from zero, as those of a resumed run have."""
    model, _ = load(folder)
    model.freeze()
    mx.random.seed(seed)
    if kind == "full":
        model.unfreeze()
    else:
        settings = {"rank": 3, "scale": 2.0, "dropout": 0.0} | parameters
        linear_to_lora_layers(model, 2, settings, use_dora=kind == "dora")
    draw = np.random.default_rng(seed)
    noisy = lambda x: x + spread * mx.array(draw.normal(size=x.shape).astype(np.float32))
    if kind != "full":
        model.update(tree_map(noisy, model.trainable_parameters()))
    mx.eval(model.parameters())
    return model


def parameters(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: np.array(p) for name, p in tree_flatten(model.trainable_parameters())}
