"""The device mesh with axes data, fsdp and tensor, and the placement of arrays on it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gvpo_core.training.config import ConfigError, ModelConfig

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # rows are split over both
SPLIT = "split"  # axis of a sampling mesh: the part of fsdp that splits layers like tensor
_PLATFORMS = {"cuda": "gpu", "rocm": "gpu"}


def find_devices(name: str) -> list[Any]:
    """Returns the devices of `model.device`: auto, a platform (cpu, gpu, tpu), or one device of it (gpu:1).

    Raises: ConfigError: this machine does not have the platform or device number.
    """
    platform, _, number = name.partition(":")
    try:
        devices = jax.devices() if name == "auto" else jax.devices(_PLATFORMS.get(platform, platform))
        return devices if not number else [devices[int(number)]]
    except (RuntimeError, ValueError, IndexError) as error:
        raise ConfigError(f"model.device is {name!r}, which JAX does not have here: use auto or cpu") from error


def make_mesh(config: ModelConfig) -> Mesh:
    """Returns all devices of the platform as a mesh of data x fsdp x tensor.

    Raises: ConfigError: no such device; the axes do not divide the devices; layers would be split over processes.
    """
    devices = find_devices(config.device)
    count, fsdp, tensor = len(devices), config.mesh_fsdp, config.mesh_tensor
    if fsdp < 1 or tensor < 1 or count % (fsdp * tensor):
        raise ConfigError(
            f"model.mesh_fsdp {fsdp} x model.mesh_tensor {tensor} does not divide the {count} "
            f"{devices[0].platform} devices: the product must be one of {_divisors(count)}"
        )
    local = len([d for d in devices if d.process_index == jax.process_index()])
    if local % tensor:
        raise ConfigError(
            f"model.mesh_tensor is {tensor}, and each process has {local} devices: it must divide that number"
        )
    shape = (count // (fsdp * tensor), fsdp, tensor)
    if jax.process_count() > 1 or count == 1:  # the mesh must list whole processes, in their order
        grid = np.asarray(sorted(devices, key=lambda d: (d.process_index, d.id))).reshape(shape)
        return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def _divisors(count: int) -> str:
    return ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)


def batch_shards(mesh: Mesh) -> int:
    """Number of parts into which the rows of one process are split."""
    return int(mesh.shape["data"] * mesh.shape["fsdp"]) // processes(mesh)


def processes(mesh: Mesh) -> int:
    """Number of processes that the mesh's devices belong to."""
    return len({d.process_index for d in mesh.devices.flat})


def parameter_sharding(mesh: Mesh, name: str, shape: Sequence[int]) -> NamedSharding:
    """Placement of a parameter, an adapter or their moments: matrices over fsdp and tensor, vectors on every device.

    The tensor axis splits outputs of the head and of q, k, v, gate and up, and inputs of o and down. If an axis does
    not divide a dimension, that dimension stays unsplit.
    """
    if len(shape) < 2 or ("*" in name and len(shape) < 3):
        return replicated(mesh)
    splits_inputs = any(part in name for part in ("o_proj", "down_proj"))
    tensor, fsdp = tensor_axes(mesh), () if SPLIT in mesh.shape else ("fsdp",)
    axes_of_matrix: list[tuple[str, ...]] = [fsdp, tensor] if splits_inputs else [tensor, fsdp]
    if name.endswith("lora_A"):
        axes_of_matrix[0] = ()
    if name.endswith("lora_B"):
        axes_of_matrix[1] = ()
    matrix = [fitting(mesh, axes, size) for axes, size in zip(axes_of_matrix, shape[-2:], strict=True)]
    return NamedSharding(mesh, PartitionSpec(*(None,) * (len(shape) - 2), *matrix))


def tensor_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes over which a layer is split."""
    return ("tensor", SPLIT) if SPLIT in mesh.shape else ("tensor",)


def fitting(mesh: Mesh, axes: tuple[str, ...], size: int) -> str | tuple[str, ...] | None:
    """`axes` if their number of parts divides `size`, else None."""
    if size % parts(mesh, axes):
        return None
    return axes[0] if len(axes) == 1 else axes or None


def is_tpu(mesh: Mesh) -> bool:
    """Whether the mesh's devices are TPUs."""
    return bool(mesh.devices.flat[0].platform == "tpu")


def parts(mesh: Mesh, axes: Sequence[str]) -> int:
    """Number of parts into which these axes split an array."""
    return math.prod(mesh.shape[a] for a in axes)


def sampling_mesh(mesh: Mesh, model_bytes: int, a_device: int, key_heads: Sequence[int]) -> Mesh:
    """Returns a mesh of the same devices for sampling. A part of fsdp, the axis `split`, splits layers like tensor.

    Parameters are not split along the rest of fsdp. As few devices as possible share a copy of the model, so sampling a
    token moves little data.

    Args:
      model_bytes: size of a copy.
      a_device: limit of parameter bytes on a device.
      key_heads: of each layer; a split that divides them all is preferred.
    """
    data, fsdp, tensor = (mesh.shape[a] for a in AXES)
    local = mesh.size // processes(mesh)
    possible = [n for n in range(1, fsdp + 1) if fsdp % n == 0 and local % (n * tensor) == 0]
    small = [n for n in possible if model_bytes <= a_device * n * tensor]
    even = [n for n in small if all(heads % (n * tensor) == 0 for heads in key_heads)]
    split = (even or small or possible[-1:])[0]
    grid = mesh.devices.reshape(data, fsdp // split, split, tensor)
    return Mesh(grid, ("data", "fsdp", SPLIT, "tensor"), axis_types=(AxisType.Auto,) * 4)


def vocabulary_axes(mesh: Mesh, vocabulary: int) -> tuple[str, ...]:
    """The axes that split the head by vocabulary for its product with hidden states: as many as divide it."""
    for axes in (("tensor", "fsdp"), ("fsdp",), ("tensor",)):
        if parts(mesh, axes) > 1 and vocabulary % parts(mesh, axes) == 0:
            return axes
    return ()


def parameter_shardings(mesh: Mesh, shapes: Mapping[str, Sequence[int]]) -> dict[str, NamedSharding]:
    """Name -> `parameter_sharding` for all parameters."""
    return {name: parameter_sharding(mesh, name, shape) for name, shape in shapes.items()}


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Rows along `axis`, split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, BATCH))


def put(values: np.ndarray, mesh: Mesh, axis: int | None = 0) -> jax.Array:
    """Puts this process's rows into one array over the mesh. `axis` None: every device gets the same values."""
    sharding = replicated(mesh) if axis is None else batch_sharding(mesh, axis)
    if processes(mesh) == 1:
        return jax.device_put(values, sharding)
    return jax.make_array_from_process_local_data(sharding, values)


def put_all(arrays: Mapping[str, np.ndarray], mesh: Mesh, axis: int = 0) -> dict[str, jax.Array]:
    """Applies `put` to each array."""
    return {name: put(a, mesh, axis) for name, a in arrays.items()}


def local(array: jax.Array, axis: int = 0) -> np.ndarray:
    """Returns this process's rows of an array that is sharded along `axis` over data and fsdp."""
    if array.is_fully_addressable:
        return np.asarray(array)
    parts: dict[int, Any] = {}
    for shard in array.addressable_shards:
        parts.setdefault(shard.index[axis].start or 0, shard.data)  # each tensor part has the same rows
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)], axis)
