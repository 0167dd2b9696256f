"""The policy's whole state on disk, for training to go on: safetensors and JSON alone."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gvpo_core.training.policy.checkpoint import MOMENTS, check_files, check_tensors, write_header, write_shards
from gvpo_torch.update import whole


def save(
    directory: Path,
    named: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    header: Mapping[str, Any],
    main: bool,
) -> None:
    """Writes parameters, moments and `header` into a folder; every rank calls, the main rank writes.

    Tensors are gathered and written a gibibyte at a time.
    """

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, p in named.items():
            kinds = {"parameter": p.detach(), **{m: optimizer.state[p][m] for m in MOMENTS if m in _state(p)}}
            for kind, tensor in kinds.items():
                tensor = whole(tensor)  # every rank takes part
                if main:
                    yield f"{kind}.{name}", tensor.cpu().contiguous()

    def _state(p: nn.Parameter) -> Mapping[str, Any]:
        return optimizer.state.get(p, {})

    files = write_shards(directory, tensors(), "state-{:05d}.safetensors", save_file)
    if main:
        steps = {name: float(_state(p)["step"]) for name, p in named.items() if "step" in _state(p)}
        write_header(directory, {**header, "steps": steps, "files": list(files)})


def restore(
    directory: Path, named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, header: Mapping[str, Any]
) -> None:
    """Reads what `save` wrote into parameters and optimizer.

    Raises: ConfigError: files or tensors that do not fit the model; nothing was changed.
    """
    files, steps = header["files"], header["steps"]
    check_files(directory, files)
    opened = {file: safe_open(directory / file, "pt") for file in files}
    where = {name: opened[file] for file in files for name in opened[file].keys()}  # noqa: SIM118 - not a mapping
    found = {name: tuple(file.get_slice(name).get_shape()) for name, file in where.items()}
    wanted = {f"parameter.{name}": tuple(p.shape) for name, p in named.items()}
    wanted |= {f"{moment}.{name}": tuple(named[name].shape) for name in named if name in steps for moment in MOMENTS}
    check_tensors(directory, wanted, found)
    optimizer.state.clear()
    with torch.no_grad():
        for name, p in named.items():
            full = {kind: where[f"{kind}.{name}"] for kind in ("parameter", *MOMENTS) if f"{kind}.{name}" in where}
            tensors = {kind: _like(file.get_tensor(f"{kind}.{name}"), p) for kind, file in full.items()}
            p.copy_(tensors.pop("parameter"))
            if name in steps:
                step = torch.tensor(steps[name], dtype=torch.float32, device=p.device)
                optimizer.state[p] = {"step": step, **tensors}


def _like(full: Tensor, p: nn.Parameter) -> Tensor:
    """`full` on the device, in the dtype and with the sharding of `p`."""
    full = full.to(p.device, p.dtype)
    if not hasattr(p, "placements"):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, p.device_mesh, p.placements, src_data_rank=None)  # each rank has read it
