"""The policy's whole state on disk, through orbax: each process writes its part; all is there when `save` returns."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from gvpo_core.training.config import ConfigError

FORMAT = 1
_ARRAYS = "arrays"


def save(directory: Path, state: Any, facts: Mapping[str, Any], main: bool) -> None:
    """Writes the arrays of `state` and `facts` into a folder; every process calls."""
    with ocp.PyTreeCheckpointer() as writer:
        writer.save(directory.resolve() / _ARRAYS, state)
    if main:
        (directory / "state.json").write_text(json.dumps({"format": FORMAT, **facts}, indent=1) + "\n")


def restore(directory: Path, state: Any, facts: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Reads what `save` wrote, onto the shardings of `state`; `facts` it must agree with are checked first.

    Returns: a state like `state`, and the saved facts.
    Raises: ConfigError: a folder without state, or the state of another model or kind of training.
    """
    path = directory / "state.json"
    if not path.is_file() or not (directory / _ARRAYS).is_dir():
        raise ConfigError(f"{directory} has no state.json and {_ARRAYS}: not a checkpoint of this backend")
    saved = json.loads(path.read_text(encoding="utf-8"))
    if saved.get("format") != FORMAT:
        raise ConfigError(f"{path} has format {saved.get('format')}; this version reads {FORMAT}")
    for name, value in facts.items():
        if saved.get(name) != value:
            raise ConfigError(f"the checkpoint {directory} has {name} = {saved.get(name)}; this run has {value}")
    wanted = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
    with ocp.PyTreeCheckpointer() as reader:
        held = reader.metadata(directory.resolve() / _ARRAYS).item_metadata.tree
        _check(directory, _shapes(wanted), _shapes(held))
        try:
            arguments = ocp.checkpoint_utils.construct_restore_args(wanted)
            found = reader.restore(directory.resolve() / _ARRAYS, item=wanted, restore_args=arguments)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"the checkpoint {directory} does not fit the model: {error}") from error
    return found, saved


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of the parameters, each layer's for itself."""
    found: dict[str, tuple[int, ...]] = {}
    for name, array in state["parameter"].items():
        shape = tuple(array.shape)
        layers = [(name.replace("*", str(i)), shape[1:]) for i in range(shape[0])] if "*" in name else [(name, shape)]
        found |= {f"parameter.{layer}": size for layer, size in layers}
    return found


def _check(directory: Path, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    lacking, foreign = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    unlike = sorted(name for name in wanted.keys() & found.keys() if wanted[name] != found[name])
    for what, names in (("lacks", lacking), ("has besides", foreign), ("has another shape of", unlike)):
        if names:
            raise ConfigError(
                f"the checkpoint {directory} does not fit the model: "
                f"it {what} {len(names)} tensors, the first {names[0]}"
            )


def read_arrays(directory: Path) -> dict[str, Any]:
    """Name -> NumPy array of everything that `save` wrote, without a model."""
    with ocp.PyTreeCheckpointer() as reader:
        path = directory.resolve() / _ARRAYS
        tree = reader.metadata(path).item_metadata.tree
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        found = reader.restore(path, restore_args=arguments)
    leaves = jax.tree_util.tree_flatten_with_path(found)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
