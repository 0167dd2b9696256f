"""Exports: a Hugging Face folder, written one layer and one file at a time, or the adapters alone."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from gvpo_core.training.config import ConfigError, ModelConfig
from gvpo_core.training.files.disk import sync_tree
from gvpo_core.training.policy.export import with_own_head, write_json, write_settings, write_weights
from gvpo_jax import mesh as meshes
from gvpo_jax.learner import Learner
from gvpo_jax.model import Setup
from gvpo_jax.spec import EMBEDDING, HEAD, fill


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
    own_head: bool = False,
) -> None:
    """Writes a Hugging Face folder. Every process must call it; the main one writes.

    Args:
      config: config.json of the model.
      source: the folder that training started from.
      end: tokens that end a response; all of them go into generation_config.json.
      own_head: see `Policy.export`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(setup, learner, dtype, main)
    if own_head:
        tensors = _with_head(tensors) if setup.spec.tied else tensors
        config = with_own_head(config)
    write_weights(directory, tensors, _save)
    if main:
        write_settings(directory, config, dtype, source, end, tokenizer)
        sync_tree(directory)


def _with_head(tensors: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    for name, array in tensors:
        yield name, array
        if name == EMBEDDING:
            yield HEAD, array.copy()


def _save(tensors: dict[str, np.ndarray], path: str) -> None:
    save_file({n: np.ascontiguousarray(a) for n, a in tensors.items()}, path, metadata={"format": "pt"})


def _tensors(setup: Setup, learner: Learner, dtype: str, main: bool) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the model's tensors, adapters merged, layer by layer. All processes gather; only the main one yields."""
    target = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
    gathered, adapters = _gathering(setup), learner.adapters
    for name, array in learner.parameters.items():
        module = name.removesuffix(".weight")
        for i in range(setup.spec.layers) if "*" in name else (None,):
            value = gathered(array, i)
            if f"{module}.lora_A" in adapters:
                a, b = (gathered(adapters[f"{module}.lora_{x}"], i) for x in "AB")
                value = value.astype(np.float32) + (b @ a) * np.float32(setup.scale)
            if not main:
                continue
            value, file_name = value.astype(target), name if i is None else name.replace("*", str(i))
            if "#" in file_name:
                yield from ((fill(file_name, (e,)), expert) for e, expert in enumerate(value))
            else:
                yield file_name, value


def _gathering(setup: Setup) -> Callable[[jax.Array, int | None], np.ndarray]:
    """Returns a function of an array and a layer number (None: no layer axis) that gives every process the full values.

    All processes must call it.
    """
    everywhere = meshes.replicated(setup.mesh)

    def gathered(a: jax.Array, layer: int | None) -> np.ndarray:
        a = a if layer is None else a[layer]
        return np.asarray(jax.device_put(a, everywhere).addressable_data(0))

    return gathered


def export_adapters(directory: Path, setup: Setup, learner: Learner, config: ModelConfig, main: bool) -> None:
    """Writes the adapters in peft's format: adapter_config.json and adapter_model.safetensors.

    Every process must call it. The main one writes the file and reads it back.

    Raises: ConfigError: adapters of experts, which peft stores in another form; the file read back differs.
    """
    experts = sorted(name for name in learner.adapters if "#" in name)
    if experts:
        raise ConfigError(
            f"gvpo_jax cannot write adapters of experts ({experts[0]}) in peft's format: export the merged model "
            "instead (without --adapters)"
        )
    gathered, tensors = _gathering(setup), {}
    for name, array in learner.adapters.items():
        for i in range(setup.spec.layers) if "*" in name else (None,):
            file_name = name if i is None else name.replace("*", str(i))
            tensors[f"base_model.model.{file_name}.weight"] = gathered(array, i)
    if not main:
        return
    modules = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.path,
        "revision": config.revision,
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha or 2 * config.lora_rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(modules),
    }
    directory.mkdir(parents=True, exist_ok=True)  # an engine gets a new folder for each version
    path = directory / "adapter_model.safetensors"
    _save(tensors, str(path))
    write_json(directory / "adapter_config.json", settings)
    stored = load_file(path)
    wrong = sorted(stored.keys() ^ tensors.keys()) or [n for n in tensors if not np.array_equal(stored[n], tensors[n])]
    if wrong:
        raise ConfigError(f"{path}, read back, differs in {len(wrong)} adapters, the first {wrong[0]}")
    sync_tree(directory)
