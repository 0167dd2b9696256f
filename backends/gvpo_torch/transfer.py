"""Channels from the policy's device to the workers of a vLLM server: NCCL, CUDA IPC, and TCP.

NCCL and IPC are the trainer's side of vLLM's engines of the same names, written from the sources of vLLM 0.32.
"""

import base64
import pickle
import socket
import time
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from gvpo_core.training.config import ConfigError
from gvpo_core.training.samplers.channels import PART_BYTES, TCP, Channel, Part, Watch, collected, described
from gvpo_core.training.samplers.http import Failed

_LOOK_EVERY = 1e-3  # seconds


def channel(kind: str, device: torch.device, world_size: int) -> Channel:
    """Returns a channel that is not open yet.

    Args:
      kind: nccl, ipc or tcp.
      device: device of the policy.
      world_size: ranks of the run.
    Raises: ConfigError: the channel does not support the device or the number of ranks, or vLLM is missing.
    """
    if kind == "tcp":
        return TCP(as_bytes)
    if device.type != "cuda":
        raise ConfigError(
            f"engine.transfer = {kind!r} sends from an NVIDIA GPU, and the policy is on {device}: set engine.transfer ="
            " 'tcp' or 'folder'"
        )
    if kind == "nccl":
        return NCCL(device, _nccl_group())
    if world_size > 1:
        raise ConfigError(
            f"engine.transfer = 'ipc' shares the GPU of one process, and the run has {world_size}: set engine.transfer"
            " = 'nccl', with a server on other GPUs"
        )
    return IPC(device)


def as_bytes(tensor: Tensor) -> memoryview:
    """Returns the bytes of a tensor in row-major order, in the host's memory."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(cast(Any, flat.view(torch.uint8).numpy()))


def _nccl_group() -> Any:
    """Returns vLLM's function that makes a communicator of processes without a process group of torch."""
    try:
        from vllm.distributed.weight_transfer.nccl_common import stateless_init_process_group
    except ImportError as error:
        raise ConfigError(
            "engine.transfer = 'nccl' needs vLLM 0.32 or later beside the trainer, for its NCCL communicator"
            f" ({error}): pip install vllm, or set engine.transfer = 'tcp' or 'folder'"
        ) from error
    return stateless_init_process_group


class NCCL:
    """Broadcasts each tensor from rank 0 to the workers, which are ranks 1 to `workers`; vLLM's backend "nccl"."""

    def __init__(self, device: torch.device, group: Any) -> None:
        """
        Args:
          device: a GPU on which no worker of the server runs.
          group: makes the communicator from (address, port, rank, world size, device).
        """
        index = device.index
        self._device = device if index is not None or device.type != "cuda" else torch.device("cuda", 0)
        self._make, self._group, self._place = group, None, ("", 0, 0)

    def open(self, host: str, port: int, workers: int) -> dict[str, Any]:
        """See `Channel`."""
        port = port or _free_port(host)
        self._place = (host, port, workers + 1)
        return {"master_address": host, "master_port": port, "rank_offset": 1, "world_size": workers + 1}

    def join(self, until: float) -> None:
        """See `Channel`. NCCL has no time limit here; the caller stops waiting for this thread."""
        host, port, size = self._place
        group = self._make(host, port, 0, size, self._device)
        if getattr(group, "disabled", False):
            raise Failed(
                "vLLM's NCCL communicator is disabled here: VLLM_DISABLE_PYNCCL, or no NCCL library", again=False
            )
        self._group = group

    def parts(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[Part]:
        """See `Channel`."""
        for part in collected(tensors, lambda tensor: int(tensor.nbytes)):
            sent = [(name, tensor.detach().contiguous()) for name, tensor in part]
            yield Part(described(sent), lambda watch, sent=sent: self._carry(sent, watch))  # type: ignore[misc]

    def _carry(self, part: list[tuple[str, Tensor]], watch: Watch) -> None:
        assert self._group is not None  # `join` comes first
        for _, tensor in part:
            watch()
            done = self._enqueue(tensor)
            while not done():
                watch()
                time.sleep(_LOOK_EVERY)

    def _enqueue(self, tensor: Tensor) -> Any:
        """Starts a broadcast. Returns: a function that says whether it has ended."""
        with torch.cuda.device(self._device):
            stream, event = torch.cuda.current_stream(), torch.cuda.Event()
            self._group.broadcast(tensor, src=0, stream=stream)  # type: ignore[attr-defined]
            event.record(stream)
        return event.query

    def finished(self) -> None:
        """See `Channel`."""

    def close(self) -> None:
        """See `Channel`."""
        if self._group is not None:
            self._group.destroy()  # aborts a broadcast that a worker does not answer
        self._group = None


class IPC:
    """Copies tensors into a buffer on the GPU, which a worker on the same GPU maps; vLLM's backend "ipc", packed."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._buffer, self._handle = device, torch.empty(0), ""

    def open(self, host: str, port: int, workers: int) -> dict[str, Any]:
        """See `Channel`."""
        if workers != 1:
            raise Failed(
                f"the server has {workers} workers, and engine.transfer = 'ipc' reaches the one on the trainer's GPU:"
                " set engine.transfer = 'nccl'",
                again=False,
            )
        return {"packed": True}

    def join(self, until: float) -> None:
        """See `Channel`."""

    def parts(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[Part]:
        """See `Channel`. The server copies a part before the next part is written over it."""
        self._allocate(PART_BYTES)
        part, used = list[tuple[str, Tensor]](), 0
        for name, tensor in tensors:
            # A worker cuts the buffer without gaps: a part has one dtype, so that its numbers stay aligned.
            if part and (used + tensor.nbytes > len(self._buffer) or tensor.dtype != part[0][1].dtype):
                yield self._part(part)
                part, used = [], 0
            if tensor.nbytes > len(self._buffer):
                self._allocate(tensor.nbytes)
            content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            self._buffer[used : used + tensor.nbytes].copy_(content)
            part.append((name, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")))
            used += tensor.nbytes
        if part:
            yield self._part(part)

    def _part(self, part: list[tuple[str, Tensor]]) -> Part:
        self._synchronize()
        sizes = {"tensor_sizes": [tensor.nbytes for _, tensor in part], "ipc_handles_pickled": self._handle}
        return Part(described(part) | sizes, lambda watch: None)

    def _allocate(self, size: int) -> None:
        """Makes a new buffer and its handle, which a worker opens once."""
        self._buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
        self._handle = base64.b64encode(pickle.dumps(self._shared(self._buffer))).decode()

    def _shared(self, buffer: Tensor) -> dict[str, Any]:
        """Returns the handle under the GPU's UUID."""
        from torch.multiprocessing.reductions import reduce_tensor

        return {str(torch.cuda.get_device_properties(self._device).uuid): reduce_tensor(buffer)[1]}

    def _synchronize(self) -> None:
        torch.cuda.synchronize(self._device)

    def finished(self) -> None:
        """See `Channel`. The buffer is freed."""
        self._buffer, self._handle = torch.empty(0), ""
        if torch.cuda.is_available():
            torch.cuda.ipc_collect()

    def close(self) -> None:
        """See `Channel`."""
        self.finished()


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as probe:
        return int(probe.getsockname()[1])
