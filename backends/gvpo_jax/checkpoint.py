"""The policy's whole state on disk, through orbax. Each process writes its part; `save` returns when all is written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from gvpo_core.training.config import ConfigError
from gvpo_core.training.policy.checkpoint import check_files, check_tensors, library_reads, write_header

_ARRAYS = "arrays"


def save(directory: Path, state: Any, header: Mapping[str, Any], main: bool) -> None:
    """Writes the arrays of `state` and `header` into a folder. Every process must call it."""
    with ocp.PyTreeCheckpointer() as writer:
        writer.save(directory.resolve() / _ARRAYS, state)
    if main:
        write_header(directory, header)


def restore(directory: Path, state: Any) -> Any:
    """Reads what `save` wrote, onto the shardings of `state`.

    Returns: a state with the structure of `state`.
    Raises: ConfigError: files or tensors do not fit the model.
    """
    check_files(directory, [_ARRAYS])
    expected = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
    with library_reads(directory, Exception), ocp.PyTreeCheckpointer() as reader:
        stored = reader.metadata(directory.resolve() / _ARRAYS).item_metadata.tree
        check_tensors(directory, _shapes(expected), _shapes(stored))
        try:
            arguments = ocp.checkpoint_utils.construct_restore_args(expected)
            return reader.restore(directory.resolve() / _ARRAYS, item=expected, restore_args=arguments)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"the checkpoint {directory} does not fit the model: {error}") from error


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the parameters; stacked layers are listed one by one."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, array in state["parameter"].items():
        shape = tuple(array.shape)
        layers = [(name.replace("*", str(i)), shape[1:]) for i in range(shape[0])] if "*" in name else [(name, shape)]
        shapes |= {f"parameter.{layer}": size for layer, size in layers}
    return shapes


def read_arrays(directory: Path) -> dict[str, Any]:
    """Reads everything that `save` wrote, without a model. Returns: name -> NumPy array."""
    with ocp.PyTreeCheckpointer() as reader:
        path = directory.resolve() / _ARRAYS
        tree = reader.metadata(path).item_metadata.tree
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        restored = reader.restore(path, restore_args=arguments)
    leaves = jax.tree_util.tree_flatten_with_path(restored)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
