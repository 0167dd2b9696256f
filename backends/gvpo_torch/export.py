"""Exports: a Hugging Face folder with adapters merged in, or the adapters alone."""

import copy
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gvpo_core.training.config import ConfigError
from gvpo_core.training.files.disk import sync_tree
from gvpo_core.training.policy.export import with_own_head, write_json, write_weights
from gvpo_core.training.policy.hugging_face import generation_eos, portable_config
from gvpo_core.training.policy.text import exported_eos
from gvpo_torch.adapters import without_peft_warnings
from gvpo_torch.language_model import LanguageModel
from gvpo_torch.quantized import dense_shapes, packed_layers
from gvpo_torch.update import full_tensor
from gvpo_torch.weights import without_bars

# Files that a model of images and text needs beside its tokenizer; copied unchanged.
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_HEAD = "lm_head.weight"
_QUIETLY = {f"_raise_exceptions_for_{case}": False for case in ("missing_entries", "connection_errors", "gated_repo")}


def name_end_tokens(base: Any, folder: Path, end: Sequence[int]) -> None:
    """Puts all tokens of `end` into the model's generation settings, which an export writes."""
    if base.generation_config is not None:
        base.generation_config.eos_token_id = exported_eos(generation_eos(folder), end)


def export(
    directory: Path, lm: LanguageModel, tokenizer: Any, dtype: torch.dtype, main: bool, own_head: bool = False
) -> None:
    """Writes a Hugging Face folder: weights with adapters merged in, config, tokenizer, generation settings.

    Every rank must call it; the main rank writes. It holds at most one layer and one file of weights, if transformers
    stores each layer alone.

    Args:
      own_head: see `Policy.export`.
    """
    from transformers.utils.hub import cached_file

    base: Any = lm.get_base_model() if hasattr(lm, "peft_config") else lm
    stored = _stored(base, dtype, main, "cpu", own_head)
    if not main:
        for _ in stored:
            pass
        return
    with without_bars(directory):
        base.save_pretrained(directory, state_dict={})
    for empty in directory.glob("*.safetensors"):
        empty.unlink()
    write_weights(directory, stored, lambda part, path: save_file(part, path, metadata={"format": "pt"}))
    tokenizer.save_pretrained(directory)
    path = directory / "config.json"
    config = portable_config(json.loads(path.read_text(encoding="utf-8")), str(dtype).removeprefix("torch."))
    write_json(path, with_own_head(config) if own_head else config)
    where = {"revision": getattr(base.config, "_commit_hash", None), "local_files_only": True}
    for name in PROCESSORS:
        cached = cached_file(base.config.name_or_path, name, **where, **_QUIETLY)
        if cached:
            shutil.copyfile(cached, directory / name)
    sync_tree(directory)


def stored_tensors(lm: LanguageModel, dtype: torch.dtype, main: bool) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors that an export writes, on the device of the model; see `_stored`."""
    return _stored(lm.get_base_model() if hasattr(lm, "peft_config") else lm, dtype, main, None)


def _stored(
    base: Any, dtype: torch.dtype, main: bool, device: str | None, own_head: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of the model's files, on the main rank. Every rank must take part in gathering them.

    Args:
      device: target of the tensors. None: they stay where they are.
    """
    from transformers.core_model_loading import revert_weight_conversion

    left_out = {twin for twin in base.all_tied_weights_keys or {} if not (own_head and twin == _HEAD)}
    left_out |= set(base._keys_to_ignore_on_save or ())
    alone = _each_layer_alone(base, left_out)
    block: dict[str, Tensor] = {}
    key: str | None = None

    def converted() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in revert_weight_conversion(base, dict(block)).items():
            yield name, tensor.contiguous()
        block.clear()

    for name, tensor in _merged(base):
        block_name = _block(name) if alone else ""
        if block_name != key and block:
            yield from converted()
        key = block_name
        tensor = full_tensor(tensor.detach())
        if main and name not in left_out:
            exported = tensor.to(device, dtype if tensor.is_floating_point() else None)
            block[name] = exported.clone() if own_head and name == _HEAD else exported  # files share no memory
    if block:
        yield from converted()


def _each_layer_alone(base: Any, left_out: set[str]) -> bool:
    """Whether transformers stores each layer under the same names and shapes if it gets the layer alone."""
    from transformers.core_model_loading import revert_weight_conversion

    blocks: dict[str, dict[str, Tensor]] = {}
    for name, shape in dense_shapes(base.state_dict(), base).items():
        if ".lora_" not in name and _base_name(name) not in left_out:
            blocks.setdefault(_block(_base_name(name)), {})[_base_name(name)] = torch.empty(shape, device="meta")
    together = {name: tensor for block in blocks.values() for name, tensor in block.items()}
    try:
        shapes = [{n: t.shape for n, t in revert_weight_conversion(base, block).items()} for block in blocks.values()]
        expected = {n: t.shape for n, t in revert_weight_conversion(base, together).items()}
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError):  # from operations that need values
        return False
    return sum(map(len, shapes)) == len(expected) and {n: s for shard in shapes for n, s in shard.items()} == expected


def _block(name: str) -> str:
    """Returns the name of a tensor's layer, such as model.layers.3, or of the tensor itself outside of layers."""
    match = re.match(r"(.*?\.\d+)\.", name)
    return match[1] if match else name


def _merged(base: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields the base model's tensors under its own names, adapters merged. The model does not change by a bit."""
    adapted: dict[str, Any] = {}  # tensor -> the layer that adds to it; fused experts have two, nested
    for name, module in base.named_modules():
        if hasattr(module, "get_delta_weight"):
            adapted[f"{_base_name(name)}.{getattr(module, 'parameter_name', 'weight')}"] = module
    packed = {f"{name}.weight": layer for name, layer in packed_layers(base).items()}
    for name, tensor in base.state_dict().items():
        if ".lora_" in name:
            continue
        base_name = _base_name(name)
        tensor = packed[name].dense if name in packed else tensor
        delta = _delta(adapted[base_name]) if base_name in adapted else None
        yield base_name, tensor if delta is None else full_tensor(tensor).float() + delta


def _base_name(name: str) -> str:
    return name.replace(".base_layer", "")


def _delta(layer: Any) -> Tensor | None:
    name = layer.active_adapters[0]
    if name not in layer.lora_A:
        return None
    if hasattr(layer, "parameter_name"):
        return layer.get_delta_weight(name).detach().float()
    a, b = full_tensor(layer.lora_A[name].weight.detach()), full_tensor(layer.lora_B[name].weight.detach())
    delta = (b.float() @ a.float()) * layer.scaling[name]
    if name in layer.lora_magnitude_vector:
        weight = full_tensor(layer.get_base_layer().weight.detach()).float()
        weight = weight.t() if layer.fan_in_fan_out else weight
        magnitude = full_tensor(layer.lora_magnitude_vector[name].weight.detach()).float()
        moved = weight + delta
        delta = moved * (magnitude / moved.norm(dim=1)).unsqueeze(1) - weight
    return delta.t() if layer.fan_in_fan_out else delta  # GPT-2 keeps its weights transposed


def export_adapters(directory: Path, lm: LanguageModel, path: str, main: bool) -> None:
    """Writes the adapters in peft's format: adapter_config.json and adapter_model.safetensors.

    Every rank must call it; the main rank writes, and reads the folder back with peft.

    Args:
      path: model.path, the base model that the adapters belong to.
    Raises: ConfigError: the folder, read back, holds other adapters.
    """
    from peft import get_peft_model_state_dict

    tensors = {name: full_tensor(tensor.detach()) for name, tensor in lm.state_dict().items() if ".lora_" in name}
    if not main:
        return
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    (name,) = lm.peft_config
    written = copy.copy(lm.peft_config[name])
    written.inference_mode, written.base_model_name_or_path = True, path
    written.save_pretrained(directory)
    named = get_peft_model_state_dict(lm, state_dict=dict(tensors), adapter_name=name, save_embedding_layers=False)
    save_file(named, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    _read_back(directory, lm, named, name)
    sync_tree(directory)


def _read_back(directory: Path, lm: LanguageModel, named: dict[str, Tensor], name: str) -> None:
    """Reads the file back, and loads the folder onto the base model without its weights: the adapters must be the same.

    Raises: ConfigError: other layers get adapters, their scale differs, or the file has other values.
    """
    from peft import PeftModel

    base = lm.get_base_model()
    with torch.device("meta"):
        empty = type(base)(copy.deepcopy(base.config))
    with without_peft_warnings():
        loaded = PeftModel.from_pretrained(empty, directory, name, torch_device="cpu", low_cpu_mem_usage=True)
    ours, theirs = (
        _scales(model, name)
        | {key: tuple(tensor.shape) for key, tensor in model.state_dict().items() if ".lora_" in key}
        for model in (lm, loaded)
    )
    stored = load_file(directory / "adapter_model.safetensors")
    wrong = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    wrong += sorted(stored.keys() ^ named.keys())
    wrong = wrong or [key for key, tensor in named.items() if not torch.equal(stored[key], tensor)]
    if wrong:
        raise ConfigError(
            f"the adapters in {directory}, read back by peft, are not those of {type(base).__name__}: {len(wrong)} "
            f"differ, the first {wrong[0]}; export the merged model instead (without --adapters)"
        )


def _scales(lm: nn.Module, name: str) -> dict[str, float]:
    """Returns alpha / rank of each layer's adapter. The `scaling` of an attention layer is something else."""
    scalings = {key: getattr(module, "scaling", None) for key, module in lm.named_modules()}
    return {key: scaling[name] for key, scaling in scalings.items() if isinstance(scaling, dict)}
