"""An export for others: a Hugging Face folder with adapters merged in. The host holds a layer and a file at a time."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from gvpo_core.training.policy.export import write_settings, write_weights
from gvpo_jax import mesh as meshes
from gvpo_jax.learner import Learner
from gvpo_jax.model import Setup
from gvpo_jax.spec import fill


def export(
    directory: Path,
    setup: Setup,
    learner: Learner,
    dtype: str,
    config: Mapping[str, Any],
    source: Path,
    end: Sequence[int],
    tokenizer: Any,
    main: bool,
) -> None:
    """Writes the folder; every process calls, the main one writes.

    Args:
      config: config.json of the model.
      source: the folder that was trained from.
      end: the tokens that ended responses; all of them are in generation_config.json.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_weights(directory, _tensors(setup, learner, dtype, main), _save)
    if main:
        write_settings(directory, config, dtype, source, end, tokenizer)


def _save(tensors: dict[str, np.ndarray], path: str) -> None:
    save_file({n: np.ascontiguousarray(a) for n, a in tensors.items()}, path, metadata={"format": "pt"})


def _tensors(setup: Setup, learner: Learner, dtype: str, main: bool) -> Iterator[tuple[str, np.ndarray]]:
    """The model's tensors, adapters merged, layer by layer, gathered by all processes; nothing but on the main one."""
    target = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
    everywhere, adapters = meshes.replicated(setup.mesh), learner.adapters

    def whole(a: jax.Array, layer: int | None) -> np.ndarray:
        a = a if layer is None else a[layer]
        return np.asarray(jax.device_put(a, everywhere).addressable_data(0))

    for name, array in learner.parameters.items():
        module = name.removesuffix(".weight")
        for i in range(setup.spec.layers) if "*" in name else (None,):
            value = whole(array, i)
            if f"{module}.lora_A" in adapters:
                a, b = (whole(adapters[f"{module}.lora_{x}"], i) for x in "AB")
                value = value.astype(np.float32) + (b @ a) * np.float32(setup.scale)
            if not main:
                continue
            value, own = value.astype(target), name if i is None else name.replace("*", str(i))
            if "#" in own:
                yield from ((fill(own, (e,)), expert) for e, expert in enumerate(value))
            else:
                yield own, value
