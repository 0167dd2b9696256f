"""The worker's side of engine.transfer = "tcp": an engine for vLLM's weight-transfer interface, on GPUs and CPU.

Tested with vLLM 0.32.
"""

import math
import socket
from dataclasses import dataclass
from typing import Any, cast

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from gvpo_core.training.samplers.in_process import pack_heads

_WAIT = 60.0  # seconds for the trainer's machine to accept the connection
_IDLE = 600.0  # seconds without a byte of an announced part


@dataclass
class Init(WeightTransferInitInfo):  # type: ignore[misc]
    """The trainer's address."""

    address: str
    port: int
    token: str  # the trainer expects it first


@dataclass
class Update(WeightTransferUpdateInfo):  # type: ignore[misc]
    """The tensors that the trainer sends, in this order."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


class TCPEngine(WeightTransferEngine):  # type: ignore[misc]
    """Reads tensors from the trainer's connection and loads them like those of a checkpoint."""

    init_info_cls, update_info_cls = Init, Update

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._connection: socket.socket | None = None

    def init_transfer_engine(self, init_info: Init) -> None:
        """Connects to the trainer. Sends the token and this worker's rank in the server."""
        self.shutdown()
        place = self.parallel_config
        rank = place.data_parallel_index * place.world_size + place.rank
        self._connection = socket.create_connection((init_info.address, init_info.port), _WAIT)
        self._connection.settimeout(_IDLE)
        self._connection.sendall(init_info.token.encode() + rank.to_bytes(4, "big"))

    def start_weight_update(self) -> None:
        """Prepares each layer for new weights."""
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Loads a part. Replaces the base class's method, which needs an accelerator."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: Update) -> None:
        """Reads and loads a part. Raises: RuntimeError: there is no connection, or it ends within the part."""
        if self._connection is None:
            raise RuntimeError("no connection to the trainer: /init_weight_transfer_engine comes first")
        try:
            for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True):
                tensor = self._tensor(getattr(torch, dtype), shape)
                self.model.load_weights([(name, tensor.to(self.device))])
        except BaseException:
            self.shutdown()  # the next byte is not the start of a tensor
            raise

    def _tensor(self, dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
        content = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
        view, read = memoryview(cast(Any, content.numpy())), 0
        while read < len(view):
            count = self._connection.recv_into(view[read:])  # type: ignore[union-attr]
            if not count:
                raise RuntimeError("the trainer ended the connection within a tensor")
            read += count
        return content.view(dtype).reshape(shape)

    def finish_weight_update(self) -> None:
        """Makes the new weights ready for use."""
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            pack_heads(self.model)

    def shutdown(self) -> None:
        """Closes the connection."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None


WeightTransferEngineFactory.register_engine("tcp", TCPEngine)


class Worker:
    """The class for --worker-extension-cls. Importing its module registers the engine in each worker."""
