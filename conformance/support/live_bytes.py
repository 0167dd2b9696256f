"""Counts the bytes of PyTorch's tensors in host memory while a block runs: the same number on every machine."""

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Inside `with`, `most` is the largest sum of bytes of the host tensors that an operation took or gave.

    File pages that safetensors maps are not counted: the system drops them when it needs memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}
        self._now = self.most = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            value = getattr(value, "_local_tensor", value)
            if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                self._see(value.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._held and not self._held[storage._cdata][0].expired():
            return
        for key in [key for key, (held, _) in self._held.items() if held.expired()]:
            self._now -= self._held.pop(key)[1]
        self._held[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._now += storage.nbytes()
        self.most = max(self.most, self._now)
