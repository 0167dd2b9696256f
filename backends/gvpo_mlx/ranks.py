"""Processes, through mx.distributed (`mlx.launch` and its ring): this process's rank, and exchange between ranks."""

import os
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from gvpo_core.training.config import ConfigError, ModelConfig

_LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


class Ranks:
    """This process among the run's processes."""

    def __init__(self, config: ModelConfig) -> None:
        """Joins the group if `mlx.launch` or mpirun started several processes.

        Raises: ConfigError: a device that does not exist, or a group that cannot be joined.
        """
        self.device, self.auto_dtype = _device(config.device), "float32"
        self.rank, self.world_size, self._group = 0, 1, None
        if any(name in os.environ for name in _LAUNCHED):
            try:
                self._group = mx.distributed.init(strict=True)
            except (RuntimeError, ValueError) as error:
                raise ConfigError(f"the processes of this run cannot find each other: {error}") from error
            self.rank, self.world_size = self._group.rank(), self._group.size()

    def gather(self, values: np.ndarray) -> np.ndarray:
        """Concatenates the ranks' arrays in rank order along axis 0; lengths may differ. They are sent as bytes."""
        if self.world_size == 1:
            return values
        values = np.ascontiguousarray(values)
        lengths = np.array(self._all(mx.array([len(values)], dtype=mx.int32)))
        width = int(lengths.max()) * int(np.prod(values.shape[1:], dtype=np.int64)) * values.itemsize
        if width == 0:
            return values
        padded = np.zeros(width, dtype=np.uint8)
        padded[: values.nbytes] = np.frombuffer(values.tobytes(), dtype=np.uint8)
        parts = np.array(self._all(mx.array(padded))).reshape(self.world_size, width)
        size = width // int(lengths.max())
        return np.concatenate(
            [
                np.frombuffer(part[: int(n) * size].tobytes(), dtype=values.dtype).reshape(int(n), *values.shape[1:])
                for part, n in zip(parts, lengths, strict=True)
            ]
        )

    def sum(self, gradients: list[mx.array]) -> list[mx.array]:
        """Sums each array over ranks."""
        if self.world_size == 1:
            return gradients
        named: Any = tree_unflatten([(str(i), g) for i, g in enumerate(gradients)])
        mean = nn.average_gradients(named, group=self._group)
        means = dict(tree_flatten(mean))
        result = [means[str(i)] * self.world_size for i in range(len(gradients))]
        mx.eval(result)
        return result

    def _all(self, array: mx.array) -> mx.array:
        gathered = mx.distributed.all_gather(array, group=self._group)
        mx.eval(gathered)
        return gathered


def _device(name: str) -> mx.Device:
    if name == "auto":
        return mx.default_device()
    kinds = {"cpu": mx.cpu, "gpu": mx.gpu}
    if name not in kinds or not mx.is_available(kinds[name]):
        raise ConfigError(f"model.device is {name!r}, which this machine does not have: use auto, cpu or gpu")
    return mx.Device(kinds[name], 0)
