"""Several ranks share one model: a copy each (DDP), or parameters, gradients and moments in shards (FSDP2)."""

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from gvpo_torch.deferred import fill, to_meta, unread
from gvpo_torch.model import Scorer


def copies(scorer: Scorer, device: torch.device) -> nn.Module:
    """The module to call in training on every rank of the default process group, each with a copy of the model."""
    devices = None if device.type == "cpu" else [device.index]
    ddp = nn.parallel.DistributedDataParallel
    # Newer PyTorch has another name for it.
    synced = "forward_sync_buffers" if "forward_sync_buffers" in signature(ddp).parameters else "broadcast_buffers"
    more: dict[str, Any] = {synced: False}
    return ddp(scorer, device_ids=devices, gradient_as_bucket_view=True, **more)


def shard(scorer: Scorer, device: torch.device) -> None:
    """`cut`, and the inspection of the head, which needs the weights; every rank calls."""
    cut(scorer, device)
    scorer.inspect_head()
    gathered_no_more(scorer)


def cut(scorer: Scorer, device: torch.device) -> None:
    """Shards parameters over all ranks with `fully_shard`, a group a decoder layer and one for the rest.

    Linear layers that autocast computes in 16 bits are gathered in that dtype, the cast that autocast would make after
    the gather; the other parameters keep theirs. Gradients are reduced in float32. So the step is that of one process.
    Of weights that are not read yet, each rank reads the rows of its shards.

    Raises: RuntimeError: the model, or one of its layers, is not an FSDPModule afterwards.
    """
    mesh = torch.distributed.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    kinds = set(scorer._no_split_modules)
    layers = [module for module in scorer.modules() if type(module).__name__ in kinds]
    full = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    half = MixedPrecisionPolicy(scorer.dtype, torch.float32, cast_forward_inputs=False)
    values = unread(scorer)
    to_meta(scorer)
    for layer in layers:
        wide = (m for m in layer.modules() if type(m) is nn.Linear and m.weight.dtype != scorer.dtype)
        linear: list[nn.Module] = [*wide]
        if linear and not scorer.adapted:  # adapters compute on weights outside their layers' forward
            fully_shard(linear, mesh=mesh, mp_policy=half)
        fully_shard(layer, mesh=mesh, mp_policy=full)
    fully_shard(scorer, mesh=mesh, mp_policy=full)
    if whole := [type(module).__name__ for module in (scorer, *layers) if not is_sharded(module)]:
        raise RuntimeError(
            f"fully_shard left {whole[0]} whole ({len(whole)} of {1 + len(layers)} modules); expected FSDPModule"
        )
    fill(scorer, values, device)
    for method in ("inspect_head", "own_logits"):
        register_fsdp_forward_method(scorer, method)


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 holds the module's parameters in shards."""
    return isinstance(module, FSDPModule)


def gathered_no_more(module: nn.Module) -> None:
    """Frees what an earlier pass without gradients left gathered: it is stale once shards are written."""
    if isinstance(module, FSDPModule):
        module.reshard()


@contextlib.contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Gathers all parameters once, for passes as of a model that is not sharded; every rank enters and leaves.

    Inside there is no collective: a rank may call the model more often than others, fail alone, and capture graphs.
    Gradients are taken with `torch.autograd.grad`, by the parameters that the modules have inside.
    """
    parts: list[Any] = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.unshard()
    try:
        with _without_hooks(parts):
            yield
    finally:
        for part in parts:
            part.reshard()


@contextlib.contextmanager
def _without_hooks(parts: Sequence[nn.Module]) -> Iterator[None]:
    """FSDP2's hooks gather and free parameters around each forward pass, and order streams, which no graph may hold."""
    before = [(part, name, getattr(part, name)) for part in parts for name in ("_forward_pre_hooks", "_forward_hooks")]
    try:
        for part, name, hooks in before:
            others = {key: hook for key, hook in hooks.items() if not _is_fsdp(hook)}
            setattr(part, name, OrderedDict(others))
        yield
    finally:
        for part, name, hooks in before:
            setattr(part, name, hooks)


def _is_fsdp(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp")
