"""The policy's whole state on disk, from which training resumes: safetensors and JSON only."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from gvpo_core.training.policy import tensor_file
from gvpo_core.training.policy.checkpoint import MOMENTS, check_files, check_tensors, library_reads, write_header
from gvpo_core.training.policy.tensor_file import Digest
from gvpo_mlx.model import Scorer
from gvpo_mlx.update import AdamW

FILE = "state-00001.safetensors"
_NAMES = {mx.float32: "F32", mx.bfloat16: "BF16", mx.float16: "F16"}


def saving(
    directory: Path,
    scorer: Scorer,
    optimizer: AdamW | None,
    header: Mapping[str, Any],
    reference: Sequence[mx.array],
    dtype: mx.Dtype | None = None,
) -> Callable[[], dict[str, Digest]]:
    """Returns a function that writes parameters, moments and `header`. It may run in another thread.

    It writes the state at the time of this call, because a step replaces arrays and changes none. It returns file name
    -> digest.

    Args:
      optimizer: None: only the parameters are written, for `restore_parameters`.
      reference: parameters of a renewed reference; empty: the reference is the initial model.
      dtype: dtype of the written parameters. None: their own.
    """
    tensors: dict[str, tensor_file.Tensor] = {}
    all_moments = optimizer.moments if optimizer is not None else []
    for i, (name, value) in enumerate(zip(scorer.names, scorer.parameters, strict=True)):
        tensors[f"parameter.{name}"] = _entry(value if dtype is None else value.astype(dtype))
        for moment, tensor in zip(MOMENTS, all_moments[i] if all_moments else (), strict=False):
            tensors[f"{moment}.{name}"] = _entry(tensor)
    for name, value in zip(scorer.names, reference, strict=False):
        tensors[f"reference.{name}"] = _entry(value)
    facts = {**header, "optimizer_steps": optimizer.steps if optimizer is not None else 0, "files": [FILE]}

    def write() -> dict[str, Digest]:
        path, lasting = directory / FILE, optimizer is not None
        written = {FILE: tensor_file.write(path, tensors, {"format": "mlx"}, lasting=lasting)}
        write_header(directory, facts)
        return written

    return write


def _entry(value: mx.array) -> tensor_file.Tensor:
    """Returns the file entry of `value`, evaluated here so that the thread that writes it computes nothing."""
    bits = value if value.dtype == mx.float32 else value.view(mx.uint16)
    mx.eval(bits)
    content = lambda: np.ascontiguousarray(np.array(bits, copy=False))
    return tensor_file.Tensor(_NAMES[value.dtype], value.shape, value.nbytes, content)


def restore(directory: Path, scorer: Scorer, optimizer: AdamW, header: Mapping[str, Any]) -> list[mx.array]:
    """Reads what `saving` wrote into model and optimizer.

    Returns: the parameters of a renewed reference; empty if the checkpoint has none.
    Raises: ConfigError: files or tensors do not fit the model; nothing was changed.
    """
    stored = _stored(directory, header)
    has_moments, renewed = bool(header["optimizer_steps"]), bool(header.get("renewed"))
    kinds = ("parameter", *(MOMENTS if has_moments else ()), *(("reference",) if renewed else ()))
    parameters = dict(zip(scorer.names, scorer.parameters, strict=True))
    expected = {f"{kind}.{name}": value.shape for kind in kinds for name, value in parameters.items()}
    check_tensors(directory, expected, {name: value.shape for name, value in stored.items()})
    values = [stored[f"parameter.{name}"].astype(value.dtype) for name, value in parameters.items()]
    moments = [tuple(stored[f"{m}.{name}"] for m in MOMENTS) for name in parameters] if has_moments else []
    with library_reads(directory, RuntimeError):
        mx.eval(values, moments)
    scorer.parameters = values
    optimizer.moments = moments  # type: ignore[assignment]
    optimizer.steps = int(header["optimizer_steps"])
    return [stored[f"reference.{name}"] for name in parameters] if renewed else []


def restore_parameters(directory: Path, scorer: Scorer, header: Mapping[str, Any]) -> None:
    """Reads the parameters that `saving` wrote without an optimizer, cast to the model's dtypes.

    Raises: ConfigError: files or tensors do not fit the model; nothing was changed.
    """
    stored = {name.removeprefix("parameter."): value for name, value in _stored(directory, header).items()}
    model_tensors = dict(cast("list[tuple[str, mx.array]]", tree_flatten(scorer.lm.parameters())))
    expected = {name: model_tensors[name].shape for name in scorer.names or stored if name in model_tensors}
    check_tensors(directory, expected, {name: value.shape for name, value in stored.items()})
    values = [(name, value.astype(model_tensors[name].dtype)) for name, value in stored.items()]
    with library_reads(directory, RuntimeError):
        mx.eval([value for _, value in values])
    scorer.lm.update(tree_unflatten(values))


def _stored(directory: Path, header: Mapping[str, Any]) -> dict[str, mx.array]:
    check_files(directory, header["files"])
    stored: dict[str, mx.array] = {}
    with library_reads(directory, RuntimeError):
        for file in header["files"]:
            stored |= cast("dict[str, mx.array]", mx.load(str(directory / file)))
    return stored
