"""The policy on disk: its whole state for training to go on, and an export for others. safetensors and JSON alone."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gvpo_core.training.config import ConfigError
from gvpo_core.training.policy.hugging_face import portable_config
from gvpo_torch.update import whole
from gvpo_torch.weights import without_bars

SHARD_BYTES = 2**30
MOMENTS = ("exp_avg", "exp_avg_sq")
FORMAT = 1
# What a model of images and text needs beside its tokenizer; copied as they are.
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_QUIETLY = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")}


def save(
    directory: Path,
    named: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    facts: Mapping[str, Any],
    main: bool,
) -> None:
    """Writes parameters, moments and `facts` into a folder; every rank calls, the main rank writes.

    Tensors are gathered and written a gibibyte at a time.
    """

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, p in named.items():
            yield f"parameter.{name}", p.detach()
            for moment in MOMENTS:
                if moment in optimizer.state.get(p, {}):
                    yield f"{moment}.{name}", optimizer.state[p][moment]

    steps = {
        name: float(optimizer.state[p]["step"]) for name, p in named.items() if "step" in optimizer.state.get(p, {})
    }
    files = _write(directory, tensors(), main)
    if main:
        state = {"format": FORMAT, **facts, "steps": steps, "files": files}
        (directory / "state.json").write_text(json.dumps(state, indent=1) + "\n")


def _write(directory: Path, tensors: Iterable[tuple[str, Tensor]], main: bool) -> list[str]:
    files: list[str] = []
    part: dict[str, Tensor] = {}
    size = 0

    def flush() -> None:
        nonlocal part, size
        if part:
            files.append(f"state-{len(files) + 1:05d}.safetensors")
            save_file(part, directory / files[-1])
        part, size = {}, 0

    for name, tensor in tensors:
        tensor = whole(tensor)  # every rank takes part
        if main:
            if size and size + tensor.nbytes > SHARD_BYTES:
                flush()
            part[name] = tensor.cpu().contiguous()
            size += tensor.nbytes
    flush()
    return files


def restore(
    directory: Path, named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Reads what `save` wrote into parameters and optimizer; `facts` it must agree with are checked first.

    Returns: the saved facts.
    Raises: ConfigError: a folder without state, or the state of another model or kind of training.
    """
    path = directory / "state.json"
    if not path.is_file():
        raise ConfigError(f"{directory} has no state.json: not a checkpoint of this backend")
    state = json.loads(path.read_text())
    if state.get("format") != FORMAT:
        raise ConfigError(f"{path} has format {state.get('format')}; this version reads {FORMAT}")
    for name, value in facts.items():
        if state.get(name) != value:
            raise ConfigError(f"the checkpoint {directory} has {name} = {state.get(name)}; this run has {value}")
    where = _index(directory, state["files"])
    _check(directory, named, where, state["steps"])
    optimizer.state.clear()
    opened = {file: safe_open(directory / file, "pt") for file in state["files"]}
    with torch.no_grad():
        for name, p in named.items():
            read = lambda kind: opened[where[f"{kind}.{name}"][0]].get_tensor(f"{kind}.{name}")  # noqa: B023
            p.copy_(_like(read("parameter"), p))
            if name in state["steps"]:
                step = torch.tensor(state["steps"][name], dtype=torch.float32, device=p.device)
                optimizer.state[p] = {"step": step, **{moment: _like(read(moment), p) for moment in MOMENTS}}
    return state


def _index(directory: Path, files: Iterable[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    where = {}
    for file in files:
        if os.path.basename(file) != file or not (directory / file).is_file():
            raise ConfigError(f"the checkpoint {directory} lacks its file {file}")
        with safe_open(directory / file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                where[name] = (file, tuple(opened.get_slice(name).get_shape()))
    return where


def _check(
    directory: Path,
    named: Mapping[str, nn.Parameter],
    where: Mapping[str, tuple[str, tuple[int, ...]]],
    steps: Mapping[str, float],
) -> None:
    wanted = {f"parameter.{name}": tuple(p.shape) for name, p in named.items()}
    for moment in MOMENTS:
        wanted |= {f"{moment}.{name}": tuple(p.shape) for name, p in named.items() if name in steps}
    lacking, foreign = sorted(wanted.keys() - where.keys()), sorted(where.keys() - wanted.keys())
    unlike = sorted(name for name in wanted.keys() & where.keys() if wanted[name] != where[name][1])
    for what, names in (("lacks", lacking), ("has besides", foreign), ("has another shape of", unlike)):
        if names:
            raise ConfigError(
                f"the checkpoint {directory} does not fit the model: "
                f"it {what} {len(names)} tensors, the first {names[0]}"
            )


def _like(full: Tensor, p: nn.Parameter) -> Tensor:
    """`full` on the device, in the dtype and with the sharding of `p`."""
    full = full.to(p.device, p.dtype)
    if not hasattr(p, "placements"):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, p.device_mesh, p.placements, src_data_rank=None)  # each rank has read it


def export(directory: Path, lm: nn.Module, tokenizer: Any, dtype: torch.dtype, main: bool) -> None:
    """Writes a Hugging Face folder: weights with adapters merged in, config, tokenizer, generation settings.

    Every rank calls; the main rank writes.
    """
    from transformers.utils import cached_file

    base = lm.get_base_model() if hasattr(lm, "peft_config") else lm
    tensors: dict[str, Tensor] = {}
    for name, tensor in _merged(base):
        tensor = whole(tensor.detach())
        if main:
            tensors[name] = tensor.to("cpu", dtype) if tensor.is_floating_point() else tensor.cpu()
    if not main:
        return
    for twin, original in (base.all_tied_weights_keys or {}).items():
        if original in tensors:
            tensors[twin] = tensors[original]
    with without_bars(directory):
        base.save_pretrained(directory, state_dict=tensors)
    tokenizer.save_pretrained(directory)
    path = Path(directory) / "config.json"
    config = portable_config(json.loads(path.read_text()), str(dtype).removeprefix("torch."))
    path.write_text(json.dumps(config, indent=2) + "\n")
    where = {"revision": getattr(base.config, "_commit_hash", None), "local_files_only": True}
    for name in PROCESSORS:
        found = cached_file(base.config.name_or_path, name, **where, **_QUIETLY)
        if found:
            shutil.copyfile(found, Path(directory) / name)


def _merged(base: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The model's own tensors under their own names; the model itself stays as it is, to the bit."""
    adapted: dict[str, Any] = {}  # tensor -> the layer that adds to it; fused experts have two, nested
    for name, module in base.named_modules():
        if hasattr(module, "get_delta_weight"):
            adapted[f"{_own(name)}.{getattr(module, 'parameter_name', 'weight')}"] = module
    for name, tensor in base.state_dict().items():
        if ".lora_" in name:
            continue
        own = _own(name)
        delta = _delta(adapted[own]) if own in adapted else None
        yield own, tensor if delta is None else whole(tensor).float() + delta


def _own(name: str) -> str:
    return name.replace(".base_layer", "")


def _delta(layer: Any) -> Tensor | None:
    name = layer.active_adapters[0]
    if name not in layer.lora_A:
        return None
    if hasattr(layer, "parameter_name"):
        return layer.get_delta_weight(name).detach().float()
    a, b = whole(layer.lora_A[name].weight.detach()), whole(layer.lora_B[name].weight.detach())
    delta = (b.float() @ a.float()) * layer.scaling[name]
    if name in layer.lora_magnitude_vector:
        weight = whole(layer.get_base_layer().weight.detach()).float()
        weight = weight.t() if layer.fan_in_fan_out else weight
        magnitude = whole(layer.lora_magnitude_vector[name].weight.detach()).float()
        moved = weight + delta
        delta = moved * (magnitude / moved.norm(dim=1)).unsqueeze(1) - weight
    return delta.t() if layer.fan_in_fan_out else delta  # GPT-2 keeps its weights transposed
