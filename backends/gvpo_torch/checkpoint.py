"""The policy's whole state on disk, from which training resumes: safetensors and JSON only.

Each rank writes one file. If the state is sharded, the file has the rank's rows of every parameter and moment. Its
metadata has the first row of each tensor and the number of its rows on all ranks, so any number of ranks can read it.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gvpo_core.training.config import ConfigError
from gvpo_core.training.policy import tensor_file
from gvpo_core.training.policy.checkpoint import check_files, check_tensors, library_reads, write_header
from gvpo_core.training.policy.tensor_file import Digest
from gvpo_torch.deferred import DTYPES, own_rows
from gvpo_torch.quantized import moment_shapes, new_state

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def saving(
    directory: Path,
    named: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
    header: Mapping[str, Any],
    rank: int,
    ranks: int,
    reference: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Callable[[], dict[str, Digest]]:
    """Returns a function that writes this rank's part of the state and `header`, and may run in another thread.

    On CPU the function reads parameters and moments in place: nothing may change them until it returns. On other
    devices they are copied to the host now. The function waits for no other rank. It returns the written files with
    their digests.

    Args:
      optimizer: None: only the parameters are written, for `restore_parameters`.
      rank, ranks: this rank, and the number of ranks that write. A rank beyond them has the same state as another, and
        writes nothing.
      reference: tensors of a renewed reference, by the names of `named`. None: the reference is the initial model.
      dtype: dtype of the written tensors. None: their own.
    """
    if rank >= ranks:
        return dict
    files = [f"state-{i + 1:05d}-of-{ranks:05d}.safetensors" for i in range(ranks)]
    rows: dict[str, list[int]] = {}
    tensors: dict[str, tensor_file.Tensor] = {}
    for name, p in named.items():
        first, end = own_rows(p)
        of_reference = {"reference": reference[name]} if reference else {}
        for kind, tensor in (_tensors(p, optimizer) | of_reference).items():
            if first < end or ranks == 1:
                tensors[f"{kind}.{name}"] = _entry(_local(tensor).to(dtype or tensor.dtype))
                rows[f"{kind}.{name}"] = [first, tensor.shape[0] if tensor.ndim else 1]
    steps = {name: float(_state(p, optimizer)["step"]) for name, p in named.items() if _state(p, optimizer)}

    def write() -> dict[str, Digest]:
        metadata = {"format": "pt", "rows": json.dumps(rows)}
        path, lasting = directory / files[rank], optimizer is not None
        written = {files[rank]: tensor_file.write(path, tensors, metadata, lasting=lasting)}
        if rank == 0:
            write_header(directory, {**header, "steps": steps, "files": files})
        return written

    return write


def restore(
    directory: Path,
    named: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    header: Mapping[str, Any],
    reference: Mapping[str, Tensor] | None = None,
) -> None:
    """Reads what `saving` wrote, on any number of ranks, into parameters and optimizer; each rank reads its rows.

    Args:
      reference: tensors to read a renewed reference into; None: the checkpoint has none.
    Raises: ConfigError: files or tensors that do not fit the model; nothing was changed.
    """
    files, steps = header["files"], header["steps"]
    check_files(directory, files)
    with library_reads(directory, SafetensorError):
        stored = _parts(directory, files)
    wanted = {f"parameter.{name}": tuple(p.shape) for name, p in named.items()}
    for name in named.keys() & steps.keys():
        wanted |= {f"{kind}.{name}": shape for kind, shape in moment_shapes(named[name], optimizer).items()}
    wanted |= {f"reference.{name}": tuple(tensor.shape) for name, tensor in (reference or {}).items()}
    check_tensors(directory, wanted, {name: _shape(directory, name, parts) for name, parts in stored.items()})
    optimizer.state.clear()
    with torch.no_grad(), library_reads(directory, SafetensorError):
        for name, tensor in (reference or {}).items():
            _read(stored[f"reference.{name}"], tensor)
        for name, p in named.items():
            _read(stored[f"parameter.{name}"], p)
            if name in steps:
                state = new_state(p, optimizer, steps[name])
                for kind in moment_shapes(p, optimizer):
                    _read(stored[f"{kind}.{name}"], state[kind])


def restore_parameters(directory: Path, named: Mapping[str, nn.Parameter], header: Mapping[str, Any]) -> None:
    """Reads the parameters that `saving` wrote without an optimizer, cast to the dtype of `named`.

    Args:
      named: parameters by name; one that needs no gradient may be missing in the files, and keeps its values.
    Raises: ConfigError: files or tensors that do not fit the model; nothing was changed.
    """
    check_files(directory, header["files"])
    with library_reads(directory, SafetensorError):
        stored = {name.removeprefix("parameter."): parts for name, parts in _parts(directory, header["files"]).items()}
    wanted = {name: tuple(p.shape) for name, p in named.items() if p.requires_grad or name in stored}
    check_tensors(directory, wanted, {name: _shape(directory, name, parts) for name, parts in stored.items()})
    with torch.no_grad(), library_reads(directory, SafetensorError):
        for name, parts in stored.items():
            _read(parts, named[name])


class _Part(NamedTuple):
    """Rows of a tensor in one file."""

    first: int
    rows: int | None  # of the full tensor; None: the file has all of it
    shape: tuple[int, ...]
    read: Callable[[], Any]  # safetensors' slice

    @property
    def end(self) -> int:
        return self.first + (self.shape[0] if self.shape else 1)


def _parts(directory: Path, files: list[str]) -> dict[str, list[_Part]]:
    """Returns tensor name -> parts of the tensor, in the order of their rows."""
    by_name: dict[str, list[_Part]] = {}
    for file in files:
        opened = safe_open(directory / file, "pt")
        rows = json.loads((opened.metadata() or {}).get("rows", "{}"))
        for name in opened.keys():  # noqa: SIM118 - not a mapping
            read = lambda opened=opened, name=name: opened.get_slice(name)
            first, rows_in_all = rows.get(name, (0, None))
            by_name.setdefault(name, []).append(_Part(first, rows_in_all, tuple(read().get_shape()), read))
    return {name: sorted(parts, key=lambda part: part.first) for name, parts in by_name.items()}


def _shape(directory: Path, name: str, parts: list[_Part]) -> tuple[int, ...]:
    """Returns the shape of the full tensor. Raises: ConfigError: no file has a row, or two files have it."""
    first, end = parts[0], 0
    for part in parts:
        if part.first != end or (part.rows, part.shape[1:]) != (first.rows, first.shape[1:]):
            raise ConfigError(f"the checkpoint {directory} lacks rows of {name}, or has them twice: after row {end}")
        end = part.end
    if first.rows not in (None, end):
        raise ConfigError(f"the checkpoint {directory} lacks rows of {name}: it has {end} of {first.rows}")
    return (end, *first.shape[1:]) if first.shape else ()


def _read(parts: list[_Part], into: Tensor) -> None:
    """Copies the rows of `into` that this rank holds."""
    local = _local(into)
    if not local.ndim:
        local.copy_(parts[0].read()[...])
        return
    start, stop = own_rows(into)
    for part in parts:
        first, end = max(start, part.first), min(stop, part.end)
        if first < end:
            local[first - start : end - start].copy_(part.read()[first - part.first : end - part.first])


def _state(p: nn.Parameter, optimizer: torch.optim.Optimizer | None) -> Mapping[str, Any]:
    return optimizer.state.get(p, {}) if optimizer is not None else {}


def _tensors(p: nn.Parameter, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    state = _state(p, optimizer)
    kinds = moment_shapes(p, optimizer) if optimizer is not None else {}
    return {"parameter": p.detach(), **{kind: state[kind] for kind in kinds if kind in state}}


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _entry(tensor: Tensor) -> tensor_file.Tensor:
    on_host = tensor.detach() if tensor.device.type == "cpu" else tensor.detach().cpu()
    content: Callable[[], Any] = lambda: on_host.contiguous().reshape(-1).view(torch.uint8).numpy()
    return tensor_file.Tensor(_NAMES[on_host.dtype], tuple(on_host.shape), on_host.nbytes, content)
