"""Processes, through jax.distributed: this process's rank, and exchange between processes."""

import os

import jax
import numpy as np

from gvpo_core.training.config import ModelConfig
from gvpo_jax import mesh as meshes


class Ranks:
    """This process among the run's processes, and the mesh of all their devices."""

    def __init__(self, config: ModelConfig) -> None:
        """Joins the other processes if the environment names them; see `join_processes`.

        Raises: ConfigError: a device that does not exist, or axes that do not fit the devices.
        """
        join_processes()
        self.mesh = meshes.make_mesh(config)
        self.rank, self.world_size = jax.process_index(), meshes.processes(self.mesh)
        self.auto_dtype = "float32" if self.mesh.devices.flat[0].platform == "cpu" else "bfloat16"

    def gather(self, values: np.ndarray) -> np.ndarray:
        """Concatenates the processes' arrays in their order along axis 0; lengths may differ."""
        return gather(values)


def join_processes() -> None:
    """Joins the other processes if the environment names them. Call it once, before any device is used.

    Reads JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID. If only the address is set,
    jax.distributed detects the cluster. A TPU slice of several hosts needs none of them.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    pod = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") and not os.environ.get("TPU_SKIP_MDS_QUERY")
    if not (address or pod) or jax.distributed.is_initialized():
        return
    count, number = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
    jax.distributed.initialize(address, None if count is None else int(count), None if number is None else int(number))


def gather(values: np.ndarray) -> np.ndarray:
    """Concatenates the processes' arrays in their order along axis 0; lengths may differ. They are sent as bytes,
    because JAX would round float64."""
    if jax.process_count() == 1:
        return values
    values = np.ascontiguousarray(values)
    from jax.experimental import multihost_utils

    row = int(np.prod(values.shape[1:], dtype=np.int64)) * values.itemsize
    lengths = np.asarray(multihost_utils.process_allgather(np.asarray([len(values)], np.int32))).ravel()
    longest = int(lengths.max())
    if longest == 0:
        return values
    padded = np.zeros(longest * row, np.uint8)
    padded[: values.nbytes] = np.frombuffer(values.tobytes(), np.uint8)
    parts = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
    joined = [np.frombuffer(p.tobytes()[: n * row], values.dtype) for p, n in zip(parts, lengths, strict=True)]
    return np.concatenate(joined).reshape(-1, *values.shape[1:])


def most(*counts: int) -> tuple[int, ...]:
    """Returns each count's largest value over all processes."""
    if jax.process_count() == 1:
        return counts
    gathered = gather(np.asarray([counts], np.int64))
    return tuple(int(n) for n in gathered.max(0))
