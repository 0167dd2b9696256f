"""LoRA matrices: selects the target layers, draws the matrices from a seed and places them on the mesh."""

import jax
import numpy as np
from jax.sharding import Mesh

from gvpo_core.training.config import ConfigError, ModelConfig
from gvpo_jax import mesh as meshes
from gvpo_jax.spec import Spec, is_linear


def make_adapters(config: ModelConfig, spec: Spec, mesh: Mesh, seed: int) -> dict[str, jax.Array]:
    """Returns the LoRA matrices of the target layers, float32. A is uniform within 1 / sqrt(inputs), B is zero.

    Raises: ConfigError: a target matches no linear layer.
    """
    shapes = {}
    matched: set[str] = set()
    for name, shape in spec.shapes().items():
        if not is_linear(name):
            continue
        module = name.removesuffix(".weight")
        matching = [t for t in config.lora_targets if t == "all-linear" or module == t or module.endswith(f".{t}")]
        matched.update(matching)
        if matching:
            shapes[f"{module}.lora_A"] = (*shape[:-2], config.lora_rank, shape[-1])
            shapes[f"{module}.lora_B"] = (*shape[:-1], config.lora_rank)
    unused = [t for t in config.lora_targets if t not in matched]
    if unused or not shapes:
        layer_names = sorted({n.split(".")[-2] for n in spec.shapes() if is_linear(n)})
        raise ConfigError(
            f"model.lora_targets has {', '.join(map(repr, unused)) or 'nothing'}, which match no linear layer: "
            f"use all-linear or some of {', '.join(layer_names)}"
        )
    adapters: dict[str, jax.Array] = {}
    for number, (name, shape) in enumerate(shapes.items()):
        value = np.zeros(shape, np.float32)
        if name.endswith("lora_A"):
            draw = np.random.default_rng((seed, number))
            value = draw.uniform(-1, 1, shape).astype(np.float32) / np.sqrt(np.float32(shape[-1]))
        sharding = meshes.parameter_sharding(mesh, name, shape)
        adapters[name] = jax.make_array_from_callback(shape, sharding, value.__getitem__)
    return adapters
