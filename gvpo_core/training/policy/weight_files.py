"""Safetensors files of a Hugging Face folder: which ones transformers reads, their tensors, and checks of them."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gvpo_core.training.config import ConfigError
from gvpo_core.training.files.lfs import is_pointer, pointer_message

INDEX = "model.safetensors.index.json"
_ONE = "model.safetensors"
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors")
_QUANTIZED = ("quantization_config", "compression_config")  # in config.json, at the top level or in a part of the model
_QUANTIZED_AT_THE_TOP = ("quantization", "quant_config", "quantize_config", "quantization_bit", "load_in_4bit",
                         "load_in_8bit")  # fmt: skip
_QUANTIZERS = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quanto_qmap.json",
               "quant_strategy.json")  # fmt: skip
_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}
_BYTES |= {"I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8}
_FLOATS = ("F64", "F32", "F16", "BF16")


class Tensor(NamedTuple):
    """Location of a tensor."""

    path: Path
    dtype: str  # as safetensors names it: F32, BF16, I8, F8_E4M3, ...
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    stop: int


def weight_files(folder: Path) -> list[Path]:
    """Returns the files that transformers reads, and no others.

    That is the file in `transformers_weights` of config.json, else `model.safetensors`, else the files of the index.

    Raises: ConfigError: no file exists, the index cannot be read, or a named file is missing or outside the folder.
    """
    if named := _named_by_config(folder / "config.json"):
        by = f"{folder / 'config.json'} (transformers_weights)"
        file = _inside(folder, named, by)
        if not file.is_file():
            raise ConfigError(f"{by} names {named}, which is not in the folder")
        return _of_index(file) if named.endswith(".index.json") else [file]
    if (folder / _ONE).is_file():
        return [folder / _ONE]
    if (folder / INDEX).is_file():
        return _of_index(folder / INDEX)
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    also = f"; {', '.join(others[:3])} is not a name that transformers reads" if others else ""
    raise ConfigError(f"{folder} has no {_ONE} and no {INDEX}{also}: expected safetensors weights")


def _named_by_config(path: Path) -> str | None:
    """Returns the weight file that config.json names. Other errors in config.json are reported elsewhere."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    named = config.get("transformers_weights") if isinstance(config, dict) else None
    if named is not None and not (
        isinstance(named, str) and named.endswith((".safetensors", ".safetensors.index.json"))
    ):
        raise ConfigError(f"{path} has transformers_weights = {named!r}; expected the name of a safetensors file")
    return named


def _of_index(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        paths = [_inside(index.parent, name, str(index)) for name in names]
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index} cannot be read: {type(error).__name__}: {error}") from error
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ConfigError(f"{index} names {missing[0]}, which is not in the folder ({len(missing)} files are missing)")
    return paths


def _inside(folder: Path, name: str, by: str) -> Path:
    """Returns the path of a file. Raises: ConfigError: it is outside the folder."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ConfigError(f"{by} names {name}, which is outside the model's folder {folder}")
    return folder / name


def tensors(folder: Path) -> dict[str, Tensor]:
    """Returns name -> location of every tensor in `weight_files`. Reads only the headers of the files.

    Raises: ConfigError: see `weight_files`; a file is not safetensors, is damaged, or is a Git LFS pointer; two files
      hold the same tensor.
    """
    headers: dict[str, Tensor] = {}
    for path in weight_files(folder):
        try:
            file_header = _header(path)
            if duplicates := headers.keys() & file_header.keys():
                name = min(duplicates)
                raise ConfigError(
                    f"{folder}: {name} is in {headers[name].path.name} and in {path.name}: take the file that does not"
                    " belong to the model out of the index"
                )
            headers |= file_header
        except ConfigError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} cannot be read as safetensors: {type(error).__name__}: {error}") from error
    return headers


def _header(path: Path) -> dict[str, Tensor]:
    if is_pointer(path):
        raise ConfigError(pointer_message(path))
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"the file has {size} bytes and ends inside its header")
        file.seek(8)
        header = json.loads(file.read(length))
    entries = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, last = (8 + length + int(offset) for offset in entry["data_offsets"])
        if last > size:
            raise ValueError(f"the file ends inside {name}")
        tensor = Tensor(path, str(entry["dtype"]), tuple(entry["shape"]), first, last)
        nbytes = math.prod(tensor.shape) * _BYTES.get(tensor.dtype, 0)
        if tensor.dtype in _BYTES and last - first != nbytes:
            raise ValueError(f"{name}, {tensor.dtype} of {list(tensor.shape)}, has {last - first} bytes, not {nbytes}")
        entries[name] = tensor
    at = 8 + length
    for name, tensor in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != at:  # as in the safetensors library: tensors do not overlap and leave no gaps
            raise ValueError(f"{name} begins at byte {tensor.start} and the tensor before it ends at byte {at}")
        at = tensor.stop
    if at != size:
        raise ValueError(f"the file has {size} bytes and its last tensor ends at byte {at}")
    return entries


def check_settings(config: Mapping[str, Any], folder: Path) -> None:
    """Rejects sizes in config.json that the weight files cannot have. Building such a model takes all memory, or hours.

    Raises: ConfigError: more layers than tensors; a size larger than all weights together; architectures that are not
      names; see `tensors`.
    """
    named = config.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ConfigError(f"config.json has architectures = {named!r}; expected a list of class names")
    stored = tensors(folder)
    weights = sum(math.prod(tensor.shape) for tensor in stored.values())
    for part in (config, *(v for v in config.values() if isinstance(v, Mapping))):
        for name, value in part.items():
            if isinstance(value, bool) or not isinstance(value, int) or not _is_size(name):
                continue
            if value > (len(stored) if "layer" in name else 32 * weights):  # a number may hold eight 4-bit weights
                holds = f"{len(stored)} tensors" if "layer" in name else f"{weights} numbers"
                raise ConfigError(f"config.json has {name} = {value}, and the weight files hold {holds}")


def _is_size(name: str) -> bool:
    return name in ("head_dim", "n_embd", "n_head", "n_layer") or bool(
        re.fullmatch(r"(?!sliding|chunk).*(hidden|intermediate|vocab)_size|num_\w*(heads|layers|experts)", name)
    )


def refuse_integers(stored: Mapping[str, Tensor], quantized: Iterable[str] = ()) -> None:
    """Rejects weights that are integers or 8-bit floats: without their scales, their values are wrong.

    Masks (BOOL, with a name that does not end in weight), single numbers and `position_ids` are not weights.

    Args:
      quantized: names that the backend reads together with their scales.
    Raises: ConfigError: there is such a weight; the message names the first one.
    """
    allowed = set(quantized)
    masks = {name for name, t in stored.items() if t.dtype == "BOOL" and not name.endswith("weight")}
    doubtful = {n: t for n, t in stored.items() if t.dtype not in _FLOATS and n not in masks and t.shape != ()}
    bad = sorted(name for name in doubtful if name not in allowed and not name.endswith("position_ids"))
    if bad:
        first = stored[bad[0]]
        raise ConfigError(
            f"{first.path}: {bad[0]} is {first.dtype}, and so are {len(bad)} weights in all; expected one of "
            f"{', '.join(_FLOATS)}. Quantised weights cannot be trained: use the original model"
        )


def quantization(config: Mapping[str, Any]) -> str | None:
    """Returns the quantisation method in config.json (gptq, awq, fp8, ...), or None.

    Looks at the top level and in all parts of the model.
    """
    return _method(config, (*_QUANTIZED, *_QUANTIZED_AT_THE_TOP))


def _method(part: Mapping[str, Any], names: Sequence[str]) -> str | None:
    for name in names:
        settings = part.get(name)
        if settings:
            method = settings.get("quant_method") if isinstance(settings, Mapping) else None
            return str(method or name)
    inner = [(name, value) for name, value in part.items() if isinstance(value, Mapping)]
    methods = (_method(value, names if name == "text_config" else _QUANTIZED) for name, value in inner)
    return next((method for method in methods if method), None)


def refuse_quantization(config: Mapping[str, Any], backend: str) -> None:
    """Raises ConfigError if config.json says that the weights are quantised. The message names the method."""
    method = quantization(config)
    if method:
        raise ConfigError(
            f"config.json says that the weights are quantised ({method}), which {backend} does not read: use the "
            "original model"
        )


def refuse_quantizer(folder: Path) -> None:
    """Raises ConfigError if the folder holds settings of a quantisation in a separate file."""
    files = [name for name in _QUANTIZERS if (folder / name).exists()]
    if files:
        raise ConfigError(
            f"{folder} holds the settings of quantised weights ({files[0]}), which no backend reads: use the original "
            "model; if the weights are the original ones, take that file out of the folder"
        )


def refuse_adapter(folder: Path) -> None:
    """Raises ConfigError if the folder holds an adapter's file, with or without its model.

    transformers loads the adapter on top of the model, other libraries load only the model. Either could be wrong.
    """
    files = [name for name in _ADAPTERS if (folder / name).exists()]
    if files:
        raise ConfigError(
            f"{folder} holds an adapter ({files[0]}): merge it into its model first (in peft: "
            "`merge_and_unload()`, then `save_pretrained`), or take the adapter's files out of the folder"
        )
