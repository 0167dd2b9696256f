"""vLLM's own engines "nccl" and "ipc" in a worker on CPU: gloo in the place of NCCL, shared memory in that of CUDA IPC.

vllm serve ... --worker-extension-cls transfer_on_cpu.Worker --weight-transfer-config '{"backend": "nccl"}'

What reads the requests, receives and loads is vLLM's. Replaced are the communicator, the mapping of a handle, and
CUDA's streams; the packed copy of a tied head, which only CPU has, is renewed. `OverGloo` and `OverMemory` are the
trainer's ends.
"""

import datetime
import os
from multiprocessing.shared_memory import SharedMemory
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from gvpo_torch.transfer import IPC, NCCL

UUID = "GPU-of-this-machine"


class Gloo:
    """Has what is used of vLLM's PyNcclCommunicator."""

    def __init__(self, host: str, port: int, rank: int, size: int, device: Any = None) -> None:
        wait = datetime.timedelta(seconds=60)
        store = dist.TCPStore(host, port, size, rank == 0, timeout=wait)
        self.group, self.disabled = dist.ProcessGroupGloo(dist.PrefixStore("weights", store), rank, size, wait), False

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> Any:
        options = dist.BroadcastOptions()
        options.rootRank = src
        work = self.group.broadcast([tensor.view(-1).view(torch.uint8) if tensor.numel() else tensor], options)
        if stream != "later":
            work.wait()
        return work

    def destroy(self) -> None:
        self.group.abort()


class OverGloo(NCCL):
    """The trainer's end of NCCL, with gloo."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"), Gloo)

    def _enqueue(self, tensor: torch.Tensor) -> Any:
        assert self._group is not None
        return self._group.broadcast(tensor, src=0, stream="later").is_completed


class OverMemory(IPC):
    """The trainer's end of CUDA IPC, with memory that a worker opens by its name."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.memory: list[SharedMemory] = []

    def _allocate(self, size: int) -> None:
        self.memory.append(SharedMemory(create=True, size=size))
        super()._allocate(size)

    def _shared(self, buffer: torch.Tensor) -> dict[str, Any]:
        self._buffer = torch.frombuffer(self.memory[-1].buf, dtype=torch.uint8)[: len(buffer)]
        return {UUID: (self.memory[-1].name, len(buffer), None, None, None, None, 0)}

    def _synchronize(self) -> None:
        """Nothing is queued here."""

    def finished(self) -> None:
        super().finished()
        for memory in self.memory:
            memory.unlink()
        self.memory = []


class Worker:
    """For --worker-extension-cls."""


def _replace() -> None:
    from torch.multiprocessing import reductions
    from vllm.distributed.weight_transfer import ipc_engine, nccl_engine

    from gvpo_core.training.samplers.in_process import pack_heads

    def joined(init_info: Any, parallel_config: Any) -> Gloo:
        rank = init_info.rank_offset + parallel_config.rank
        return Gloo(init_info.master_address, init_info.master_port, rank, init_info.world_size)

    opened: list[SharedMemory] = []

    def mapped(name: str, size: int, *others: Any) -> torch.Tensor:
        opened.append(SharedMemory(name))
        return torch.frombuffer(opened[-1].buf, dtype=torch.uint8)[:size]

    nccl_engine.worker_init_process_group = joined
    reductions.rebuild_cuda_tensor = mapped
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(uuid=UUID)
    torch.cuda.current_stream = lambda device=None: None
    torch.accelerator.synchronize = lambda device=None: None
    for engine in (nccl_engine.NCCLWeightTransferEngine, ipc_engine.IPCWeightTransferEngine):
        finish = engine.finish_weight_update

        def finish_on_cpu(self: Any, finish: Any = finish) -> None:
            finish(self)
            pack_heads(self.model)

        engine.finish_weight_update = finish_on_cpu


if os.environ.get("TRANSFER_ON_CPU"):  # in the server
    _replace()
