"""One model on several ranks: a copy on each (DDP), or parameters, gradients and moments in shards (FSDP2)."""

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
    """Returns the module to call in training on every rank of the default process group; each rank has a copy."""
    devices = None if device.type == "cpu" else [device.index]
    ddp = nn.parallel.DistributedDataParallel
    # Newer PyTorch has another name for the option.
    synced = "forward_sync_buffers" if "forward_sync_buffers" in signature(ddp).parameters else "broadcast_buffers"
    options: dict[str, Any] = {synced: False}
    return ddp(scorer, device_ids=devices, gradient_as_bucket_view=True, **options)


def shard(scorer: Scorer, device: torch.device) -> None:
    """Calls `cut`, then inspects the head, which needs the weights. Every rank must call it."""
    cut(scorer, device)
    scorer.inspect_head()
    gathered_no_more(scorer)


def cut(scorer: Scorer, device: torch.device) -> None:
    """Shards parameters over all ranks with `fully_shard`: one group for each decoder layer, and one for the rest.

    Linear layers that autocast computes in 16 bits are gathered in that dtype: autocast would make the same cast after
    the gather. Other parameters keep their dtype. Gradients are reduced in float32. So the step is that of one process.
    If weights are not read yet, each rank reads the rows of its shards.

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
        if linear and not scorer.adapted:  # adapters use weights outside the forward pass of their layers
            fully_shard(linear, mesh=mesh, mp_policy=half)
        fully_shard(layer, mesh=mesh, mp_policy=full)
    fully_shard(scorer, mesh=mesh, mp_policy=full)
    if missed := [type(module).__name__ for module in (scorer, *layers) if not is_sharded(module)]:
        raise RuntimeError(
            f"fully_shard left {missed[0]} whole ({len(missed)} of {1 + len(layers)} modules); expected FSDPModule"
        )
    fill(scorer, values, device)
    for method in ("inspect_head", "own_logits"):
        register_fsdp_forward_method(scorer, method)


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 holds the module's parameters in shards."""
    return isinstance(module, FSDPModule)


def no_gradients(module: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Uses `no_grad` with shards: FSDP2 keeps gathered parameters, and inference tensors cannot be trained."""
    return torch.no_grad() if is_sharded(module) else torch.inference_mode()


def gathered_no_more(module: nn.Module) -> None:
    """Frees parameters that an earlier pass without gradients left gathered. They are stale once shards are written."""
    if isinstance(module, FSDPModule):
        module.reshard()


@contextlib.contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Gathers all parameters once, for passes like those of an unsharded model. Every rank must enter and leave.

    Inside there is no collective: a rank may call the model more often than others, fail alone, and capture graphs.
    Take gradients with `torch.autograd.grad`, for the parameters that the modules have inside the block.
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
    """Removes FSDP2's hooks, which no graph may hold.

    They gather and free parameters around each forward pass, and order streams.
    """
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
