"""Places parameters for sampling, once per rollout and in the compute dtype, so that no token has to gather them."""

import math
from dataclasses import replace
from typing import Any

from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from gvpo_jax import memory
from gvpo_jax import mesh as meshes
from gvpo_jax.model import Parameters, Setup
from gvpo_jax.programs import Programs

_ADVICE = "raise model.mesh_fsdp or model.mesh_tensor, or lower rollout.max_tokens"


def sampling_setup(setup: Setup, a_device: int | None = None) -> Setup:
    """Returns the setup of prefill and decode.

    Args:
      a_device: limit of parameter bytes on a device. Default: a quarter of its memory.
    """
    spec = setup.spec
    size = sum(math.prod(shape) for shape in spec.shapes().values()) * setup.compute.itemsize
    a_device = memory.sampling_bytes(setup.mesh) if a_device is None else a_device
    return replace(
        setup, mesh=meshes.sampling_mesh(setup.mesh, size, a_device, [layer.key_heads for layer in spec.each])
    )


def place(
    setup: Setup, programs: Programs, parameters: Parameters, adapters: Parameters
) -> tuple[Parameters, Parameters]:
    """Moves parameters and adapters to the mesh and dtype of a `sampling_setup`; unchanged if already there."""
    if setup.mesh.size == 1 and all(a.dtype == setup.compute for a in parameters.values()):
        return parameters, adapters
    out = tuple(
        meshes.parameter_shardings(setup.mesh, {n: a.shape for n, a in t.items()}) for t in (parameters, adapters)
    )
    trees: tuple[Parameters, Parameters] = programs.call(
        placed, (setup,), parameters, adapters, out=out, advice=_ADVICE
    )
    return trees


def placed(setup: Setup, parameters: Parameters, adapters: Parameters) -> tuple[dict[str, Array], dict[str, Array]]:
    """Casts the arguments to the compute dtype and reshards them for sampling.

    Each matrix is first split along the axis that stays split, then gathered along the other. This goes layer by layer,
    so a device holds little more than its part of the result.
    """
    return _placed(setup, parameters), _placed(setup, adapters)


def _placed(setup: Setup, tree: Parameters) -> dict[str, Array]:
    stacked = {name: a for name, a in tree.items() if "*" in name}
    placed = {name: _moved(setup, name, a) for name, a in tree.items() if name not in stacked}
    if stacked:
        placed |= lax.map(lambda layer: {name: _moved(setup, name, a) for name, a in layer.items()}, stacked)
    return placed


def _moved(setup: Setup, name: str, a: Array) -> Array:
    mesh = setup.mesh
    a = a.astype(setup.compute)
    if a.ndim < 2:
        return a
    end = meshes.parameter_sharding(mesh, name.replace("*", "0"), a.shape)
    spec: list[Any] = [*end.spec, *(None,) * (a.ndim - len(end.spec))]
    unsharded = [i for i in (a.ndim - 2, a.ndim - 1) if spec[i] is None and a.shape[i] % mesh.shape["fsdp"] == 0]
    if len(unsharded) == 1:
        spec[unsharded[0]] = "fsdp"
        a = lax.with_sharding_constraint(a, NamedSharding(mesh, PartitionSpec(*spec)))
    return lax.with_sharding_constraint(a, end)
