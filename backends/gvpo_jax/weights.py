"""Reads safetensors files straight onto the mesh. Only the parts that a device holds are read for it."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from gvpo_core.training.config import ConfigError
from gvpo_core.training.policy import weight_files
from gvpo_jax import mesh as meshes
from gvpo_jax.families import OTHER_MODALITIES
from gvpo_jax.spec import EMBEDDING, HEAD, LAYERS, Spec, file_names, fill, leading

ROWS = 4096  # rows of a matrix that are compared at once
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}


class Files:
    """The tensors of a folder's safetensors files, memory-mapped and read on access."""

    def __init__(self, folder: Path, *, text_of_more: bool = False) -> None:
        """Maps the files.

        Args:
          text_of_more: whether the model is multimodal. Weights of other modalities are then left out, those of the
            language model renamed.
        Raises: ConfigError: no safetensors files, a file that cannot be read, a dtype that is not floating-point.
        """
        self.folder, self.text_of_more = folder, text_of_more
        self._found = weight_files.tensors(folder)
        weight_files.refuse_integers(self._found)
        if text_of_more:
            named = {_text_name(name): where for name, where in self._found.items()}
            self._found = {name: where for name, where in named.items() if name}
        self._raw = {path: np.memmap(path, np.uint8, "r") for path in {t.path for t in self._found.values()}}

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._found)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._found[name].shape

    def __getitem__(self, name: str) -> np.ndarray:
        where = self._found[name]
        return self._raw[where.path][where.start : where.stop].view(_DTYPES[where.dtype]).reshape(where.shape)


def _text_name(name: str) -> str:
    """Returns a weight's name in the language model alone; empty for weights of other modalities."""
    inner = name.removeprefix("model.")
    if inner.startswith(OTHER_MODALITIES):
        return ""
    for prefix, instead in (("language_model.model.", "model."), ("language_model.lm_head.", "lm_head.")):
        if inner.startswith(prefix):
            return instead + inner.removeprefix(prefix)
    return "model." + inner.removeprefix("language_model.") if inner.startswith("language_model.") else name


def load(spec: Spec, files: Files, mesh: Mesh, dtype: Any) -> dict[str, jax.Array]:
    """Loads the model's parameters onto the mesh, in `dtype`.

    Raises: ConfigError: weights are missing, have another shape or are unknown to this model, or a tied head differs
      from the embedding.
    """
    shapes = spec.shapes()
    expected = {
        file_name: shape[leading(name) :] for name, shape in shapes.items() for file_name in file_names(name, shape)
    }
    missing = sorted(expected.keys() - files.names())
    known_names = expected.keys() | ({HEAD} if spec.tied else set()) | _unread(spec)
    unknown = sorted(n for n in files.names() - known_names if not n.endswith(("rotary_emb.inv_freq", ".masked_bias")))
    misshapen = sorted(n for n in expected if n in files and files.shape(n) != expected[n])
    for problem, names in (("lacks {} weights", missing), ("has {} weights unknown to this architecture", unknown)):
        if names:
            raise ConfigError(f"{files.folder} {problem.format(len(names))}, the first {names[0]}")
    if misshapen:
        name = misshapen[0]
        raise ConfigError(f"{name} in {files.folder} has shape {files.shape(name)}; config.json says {expected[name]}")
    if spec.tied and HEAD in files and not _same(files[EMBEDDING], files[HEAD]):
        raise ConfigError(
            f"config.json in {files.folder} has tie_word_embeddings = true, but {HEAD} differs from "
            f"{EMBEDDING}: set tie_word_embeddings = false if the model has its own head, or remove {HEAD}"
        )
    return {name: _read(files, name, shape, mesh, dtype) for name, shape in shapes.items()}


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    cuts = [slice(start, start + ROWS) for start in range(0, len(a), ROWS)]
    return a.shape == b.shape and all(
        np.array_equal(a[cut].astype(np.float32), b[cut].astype(np.float32)) for cut in cuts
    )


def _unread(spec: Spec) -> set[str]:
    """Weights that files may hold but the model does not use: those of layers that read another's keys and values."""
    shared = [i for i, layer in enumerate(spec.each) if layer.source is not None]
    unused = ("k_proj", "v_proj", "k_norm", "v_norm")
    return {f"{LAYERS}{i}.self_attn.{name}.weight" for i in shared for name in unused}


def _read(files: Files, name: str, shape: tuple[int, ...], mesh: Mesh, dtype: Any) -> jax.Array:
    axes = leading(name)

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # JAX passes slices for a shape with axes
        if not axes:
            return np.asarray(files[name][index]).astype(dtype)
        places = [range(*cut.indices(size)) for cut, size in zip(index, shape, strict=True)]
        values = np.empty([len(of_axis) for of_axis in places], dtype)
        for at in itertools.product(*(range(len(of_axis)) for of_axis in places[:axes])):
            file_name = fill(name, tuple(of_axis[i] for of_axis, i in zip(places, at, strict=False)))
            values[at] = files[file_name][index[axes:]]
        return values

    return jax.make_array_from_callback(shape, meshes.parameter_sharding(mesh, name, shape), part)


def count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Number of parameters of these shapes."""
    return sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes.values())
