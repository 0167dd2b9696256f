"""The memory that a model needs, for the core's estimate of a run, and the memory that the devices have."""

import math

from jax.sharding import Mesh

from gvpo_core.training.policy import MemoryFacts
from gvpo_core.training.policy.memory import peak_memory
from gvpo_jax.logprobs import CHUNK_BYTES, DEVICE_CHUNK_BYTES
from gvpo_jax.mesh import batch_shards, parts, processes, tensor_axes
from gvpo_jax.model import Setup
from gvpo_jax.spec import Spec

CPU_CACHE_BYTES = 2**30  # of keys and values


def facts(
    spec: Spec, mesh: Mesh, sampling: Setup, held: int, in_blocks: bool = False, defers: bool = False
) -> MemoryFacts:
    """Returns the sizes for the core's estimate of memory. If layers differ in size, the largest counts.

    Args:
      sampling: the setup of prefill and decode.
      held: bytes of a parameter as it is stored; sampling copies the parameters if its dtype has another size.
      in_blocks: whether the attention of updates uses `blocks`.
      defers: whether a group in several micro-batches has one forward pass only.
    """
    first = mesh.local_devices[0]
    limit = (first.memory_stats() or {}).get("bytes_limit")
    together = 1 if limit else len(mesh.local_devices)
    copied = mesh.size > 1 or held != sampling.compute.itemsize
    copy = sum(math.prod(shape) for shape in spec.shapes().values()) * sampling.compute.itemsize if copied else 0
    return MemoryFacts(
        split=parts(mesh, ("fsdp", "tensor")),
        parts=batch_shards(mesh),
        devices=together,
        fills=True,
        in_blocks=in_blocks,
        defers=defers and processes(mesh) == 1,
        sampled=copy * together // parts(sampling.mesh, tensor_axes(sampling.mesh)),
        layers=spec.layers,
        hidden=spec.hidden,
        intermediate=max(layer.intermediate for layer in spec.each),
        heads=spec.heads,
        kv_heads=max(layer.key_heads for layer in spec.each),
        head_dim=max(layer.width for layer in spec.each),
        device=limit,
        head=CHUNK_BYTES.get(first.platform, DEVICE_CHUNK_BYTES),
        cache=None if limit else CPU_CACHE_BYTES,
    )


def cache_tokens(setup: Setup) -> int:
    """Returns how many tokens of cache fit in half of this process's free device memory (a gibibyte on CPU)."""
    mesh, spec = setup.mesh, setup.spec
    free = 0
    for device in mesh.local_devices:
        stats = device.memory_stats() or {}
        free += (stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)) // 2
    tensor = parts(mesh, tensor_axes(mesh))
    tensor = tensor if any(layer.key_heads % tensor for layer in spec.each) else 1
    return max(1, (free or CPU_CACHE_BYTES) // (spec.cache_numbers * setup.compute.itemsize * tensor))


def sampling_bytes(mesh: Mesh) -> int:
    """Limit of parameter bytes on a device during sampling: a quarter of its memory."""
    limit = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")
    return limit // 4 if limit else CPU_CACHE_BYTES


def peak(mesh: Mesh) -> int:
    """Returns the peak memory in bytes of a device since the start; on CPU, of the process."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in mesh.local_devices]
    return int(max(peaks)) if any(peaks) else peak_memory()
