"""Loads a transformers model without reading its weights, so that each rank later reads only the rows of its shards.

transformers gets tensors that hold no values and record the operations on them. Its renaming and merging of weights,
for example of experts into one tensor, is repeated later on the rows that a rank needs.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from gvpo_core.training.policy import weight_files

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
_AS_THEY_ARE = (Tensor.to, Tensor.detach, Tensor.requires_grad_, Tensor.contiguous, Tensor.clone)


class NotDeferred(Exception):
    """The weights of a model cannot be read in parts; the message says why."""


class Deferred(Tensor):
    """A tensor without values that records how they are computed; `rows` computes them."""

    made: "Callable[[int | None, int | None], Tensor]"  # (first row, last row + 1) -> these rows; None: all

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__setitem__" or (name.endswith("_") and not name.endswith("__") and name != "requires_grad_"):
            raise NotDeferred(f"{name} changes a tensor in place")
        if func is Tensor.to:  # to a device: there is nothing to move
            result = super().__torch_function__(func, types, (args[0], _dtype(args[1:], kwargs) or args[0].dtype), {})
            if result is args[0]:
                return result
        else:
            result = super().__torch_function__(func, types, args, kwargs)
        if result is not (args[0] if args else None):
            _record(result, func, args, kwargs)
        return result

    def rows(self, first: int | None = None, end: int | None = None) -> Tensor:
        """Returns rows `first` to `end` - 1, by default all. Reads other rows from the files only if it must."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.made(first, end)


def _dtype(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.dtype | None:
    values = [*args, *kwargs.values()]
    tensors = [value.dtype for value in values if isinstance(value, Tensor)]
    return next((value for value in values if isinstance(value, torch.dtype)), tensors[0] if tensors else None)


def _record(result: Any, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    if isinstance(result, Deferred):
        result.made = _row_function(result, func, args, kwargs)
    elif isinstance(result, (tuple, list)):
        for number, part in enumerate(result):
            if isinstance(part, Deferred):
                part.made = _part_function(number, func, args, kwargs)


def _part_function(number: int, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[..., Tensor]:
    def computed(first: int | None, end: int | None) -> Tensor:
        value: Tensor = _computed(func, args, kwargs)[number]
        return value if first is None else value[first:end]

    return computed


def _row_function(result: Tensor, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[..., Tensor]:
    source = args[0] if args else None
    if isinstance(source, Deferred):
        if func is Tensor.to:
            return lambda first, end: source.made(first, end).to(result.dtype)
        if func in _AS_THEY_ARE or (func is Tensor.__getitem__ and args[1] is Ellipsis):
            return source.made
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    if func is torch.stack and dim == 0:
        return lambda first, end: torch.stack([_loaded(part) for part in list(source or kwargs["tensors"])[first:end]])
    if func is torch.cat and dim % result.ndim:
        return lambda first, end: torch.cat([part.made(first, end) for part in source or kwargs["tensors"]], dim)

    def computed(first: int | None, end: int | None) -> Tensor:
        value = _computed(func, args, kwargs)
        return value if first is None else value[first:end]

    return computed


def _loaded(value: Any) -> Any:
    """Returns `value` with its deferred tensors replaced by their values."""
    if isinstance(value, Deferred):
        return value.made(None, None)
    if isinstance(value, (list, tuple)):
        return type(value)(_loaded(part) for part in value)
    return value


def _computed(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return func(*_loaded(tuple(args)), **{name: _loaded(value) for name, value in kwargs.items()})


def from_files(kind: Any, folder: Path, **options: Any) -> tuple[nn.Module, Any]:
    """Calls `kind.from_pretrained(**options)` without reading weights.

    The model's parameters have the attribute `deferred`, and as values zeros in the memory of one element. Buffers have
    their values. Replace the parameters with `to_meta`, shard them, then `fill` them.

    Returns: the model, and transformers' report on the names of weights.
    Raises: NotDeferred: transformers does something to the weights that cannot be recorded.
    """
    stored = weight_files.tensors(folder)
    unknown = sorted({tensor.dtype for tensor in stored.values()} - DTYPES.keys())
    if unknown:
        raise NotDeferred(f"the files hold {unknown[0]}")
    opened = {path: safe_open(path, "pt") for path in {tensor.path for tensor in stored.values()}}
    state_dict = {name: _of_file(name, tensor, opened[tensor.path]) for name, tensor in stored.items()}
    others = {name: value for name, value in options.items() if name != "pretrained_model_name_or_path"}
    try:
        lm, info = kind.from_pretrained(None, state_dict=state_dict, **others)
    except NotDeferred:
        raise
    except RuntimeError as error:  # transformers collects the errors of its conversions into one
        raise NotDeferred(" ".join(str(error).split())[:200]) from error
    lm.name_or_path = lm.config.name_or_path = options["pretrained_model_name_or_path"]
    _read_generation_settings(lm, lm.name_or_path)
    placeholders: dict[int, tuple[Deferred, Tensor]] = {}  # with the key's tensor, so that its id stays in use
    for module in lm.modules():
        for values in (module._parameters, module._buffers):
            for name, value in values.items():
                if isinstance(value, Deferred):
                    if id(value) not in placeholders:
                        placeholders[id(value)] = (value, _placeholder(value, values is module._parameters))
                    values[name] = placeholders[id(value)][1]
                elif value is not None and value.is_meta:
                    raise NotDeferred(f"{name} of {type(module).__name__} is in no file")
    return lm, info


def _of_file(name: str, tensor: weight_files.Tensor, file: Any) -> Deferred:
    empty = torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype], device="meta").as_subclass(Deferred)
    read = lambda first, end: file.get_tensor(name) if first is None else file.get_slice(name)[first:end]
    empty.made = read
    return empty


def _placeholder(value: Deferred, is_parameter: bool) -> Tensor:
    if not is_parameter:
        return value.rows()
    with torch._C.DisableTorchFunctionSubclass():
        shape, dtype, trained = value.shape, value.dtype, value.requires_grad
    placeholder: Any = nn.Parameter(torch.zeros((), dtype=dtype).expand(shape), trained)
    placeholder.deferred = value
    return cast(Tensor, placeholder)


def _read_generation_settings(lm: Any, path: str) -> None:
    """Loads the generation settings as from_pretrained does for a path."""
    from transformers import GenerationConfig

    if lm.can_generate():
        try:
            lm.generation_config = GenerationConfig.from_pretrained(path)
        except OSError:
            of_model: dict[str, Any] = {"config_file_name": "config.json", "_from_model_config": True}
            lm.generation_config = GenerationConfig.from_pretrained(path, **of_model)


def to_meta(lm: nn.Module) -> None:
    """Moves parameters that are not read yet to the meta device, which `fully_shard` and `nn.Module.to` accept."""
    memo: dict[int, Any] = {}
    for module in lm.modules():
        for name, p in module._parameters.items():
            if p is not None and hasattr(p, "deferred"):
                if id(p) not in memo:
                    memo[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), p.requires_grad)
                    memo[id(p)].deferred = p.deferred
                module._parameters[name] = memo[id(p)]


def unread(module: nn.Module) -> dict[str, Deferred]:
    """Returns the parameters that are not read yet, by name. Call it before the module is sharded."""
    return {name: p.deferred for name, p in module.named_parameters() if hasattr(p, "deferred")}


@torch.no_grad()
def fill(module: nn.Module, unread: Mapping[str, Deferred], device: torch.device) -> None:
    """Reads the rows that this rank holds into sharded parameters, one parameter at a time."""
    module._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    named: dict[str, Any] = dict(module.named_parameters())  # with FSDP2: DTensors
    for name, values in unread.items():
        local = named[name].to_local()
        first, end = own_rows(named[name])
        if first < end:
            local.copy_(values.rows(first, end).to(local.dtype))


def own_rows(p: Any) -> tuple[int, int]:
    """Returns the rows of a parameter on this rank: first, last + 1. Only the first dimension may be sharded."""
    if not hasattr(p, "device_mesh"):
        return 0, p.shape[0] if p.ndim else 1
    size, rank = p.device_mesh.size(), p.device_mesh.get_local_rank()
    rows = -(-p.shape[0] // size)  # like torch.chunk
    return min(rank * rows, p.shape[0]), min((rank + 1) * rows, p.shape[0])
