"""Several ranks share one model: a copy each (DDP), or parameters, gradients and moments in shards (FSDP2)."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from gvpo_torch.model import Scorer


def distribute(scorer: Scorer, device: torch.device, sharding: str) -> nn.Module:
    """The module to call in training on every rank of the default process group.

    Args:
      sharding: "data_parallel" or "fsdp"; fsdp changes `scorer` itself: make the optimizer afterwards.
    """
    if sharding == "fsdp":
        shard(scorer, device)
        return scorer
    devices = None if device.type == "cpu" else [device.index]
    return nn.parallel.DistributedDataParallel(
        scorer, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
    )


def shard(scorer: Scorer, device: torch.device) -> None:
    """Shards parameters over all ranks with `fully_shard`, a group a decoder layer and one for the rest.

    Linear layers that autocast computes in 16 bits are gathered in that dtype, the cast that autocast would make after
    the gather; the other parameters keep theirs. Gradients are reduced in float32. So the step is that of one process.
    """
    mesh = torch.distributed.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    kinds = set(scorer._no_split_modules)
    layers = [module for module in scorer.modules() if type(module).__name__ in kinds]
    full = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    half = MixedPrecisionPolicy(scorer.dtype, torch.float32, cast_forward_inputs=False)
    for layer in layers:
        linear = [m for m in layer.modules() if type(m) is nn.Linear and m.weight.dtype != scorer.dtype]
        if linear and not scorer.adapted:  # adapters compute on weights outside their layers' forward
            fully_shard(linear, mesh=mesh, mp_policy=half)
        fully_shard(layer, mesh=mesh, mp_policy=full)
    fully_shard(scorer, mesh=mesh, mp_policy=full)


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 holds the module's parameters in shards."""
    return isinstance(module, FSDPModule)


@contextlib.contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Gathers all parameters once, for many forward passes without gradients; every rank enters and leaves."""
    parts: list[Any] = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not module, recurse=False)
