"""Parts of a checkpoint that all backends share: the header `state.json`, its checks, tensors split into files.

A backend's `checkpoint.py` writes and reads the arrays; see docs/new_backend.md.
"""

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from gvpo_core.training.config import ConfigError, ModelConfig
from gvpo_core.training.files.disk import retried

FORMAT = 1
SHARD_BYTES = 2**30  # largest file; a larger tensor gets its own file
HEADER = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")
_OF_OLDER = {"lora_kind": "lora", "quantization": "none"}  # values that headers of earlier versions leave out


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=_Sized)


def identity(config: ModelConfig, architecture: str) -> dict[str, Any]:
    """Facts that must be equal in a checkpoint and the run that restores it."""
    facts: dict[str, Any] = {"architecture": architecture, "lora_rank": config.lora_rank}
    if config.lora_rank:
        facts |= {"lora_kind": config.lora_kind, "lora_alpha": config.lora_alpha or 2 * config.lora_rank}
        facts |= {"lora_targets": list(config.lora_targets), "quantization": config.quantization}
    return facts


def write_header(directory: Path, facts: Mapping[str, Any]) -> None:
    """Writes `facts` as state.json. The main rank calls this after the arrays are written."""
    text = json.dumps({"format": FORMAT, **facts}, indent=1) + "\n"
    (directory / HEADER).write_text(text, encoding="utf-8")


def read_header(directory: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Reads what `write_header` wrote.

    Args:
      facts: `identity` of the run; the header must have the same values.
    Raises: ConfigError: there is no header, it has another format, or it is of another model or kind of training.
    """
    path = directory / HEADER
    try:
        text = retried(lambda: path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise ConfigError(f"{directory} has no {HEADER}: not a checkpoint of this backend") from e
    saved: dict[str, Any] = _OF_OLDER | json.loads(text)
    if saved.get("format") != FORMAT:
        raise ConfigError(f"{path} has format {saved.get('format')}; this version reads {FORMAT}")
    for name, value in facts.items():
        if saved.get(name) != value:
            raise ConfigError(f"the checkpoint {directory} has {name} = {saved.get(name)}; this run has {value}")
    return saved


@contextlib.contextmanager
def library_reads(directory: Path, *errors: type[Exception]) -> Iterator[None]:
    """Converts errors of a library that reads a checkpoint to OSError: the checkpoint cannot be read.

    The error says nothing about its content. `attempt` then shares it with all ranks.
    """
    try:
        yield
    except (ConfigError, OSError):
        raise
    except errors as e:
        text = " ".join(str(e).split())[:300]
        raise OSError(errno.EIO, f"{type(e).__name__}: {text}", str(directory)) from e


def check_files(directory: Path, names: Iterable[str]) -> None:
    """Raises ConfigError if a file or folder in the header is missing from the checkpoint, or is outside it."""
    for name in names:
        if os.path.basename(name) != name or not (directory / name).exists():
            raise ConfigError(f"the checkpoint {directory} lacks its file {name}")


def check_tensors(
    directory: Path, wanted: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]]
) -> None:
    """Compares names and shapes. Call this before anything is changed.

    Raises: ConfigError: tensors are missing, unknown or have another shape. The message names the first one.
    """
    lacking, foreign = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    unlike = sorted(name for name in wanted.keys() & stored.keys() if tuple(wanted[name]) != tuple(stored[name]))
    for what, names in (("lacks", lacking), ("also has", foreign), ("has another shape of", unlike)):
        if names:
            raise ConfigError(
                f"the checkpoint {directory} does not fit the model: "
                f"it {what} {len(names)} tensors, the first {names[0]}"
            )


def write_shards(
    directory: Path, tensors: Iterable[tuple[str, T]], pattern: str, save: Callable[[dict[str, T], str], None]
) -> dict[str, list[str]]:
    """Writes tensors as they arrive, up to `SHARD_BYTES` per file, so that few are in memory at once.

    Args:
      tensors: names and tensors. Yields nothing on ranks that only help to gather them.
      pattern: file names, such as "state-{:05d}.safetensors"; counted from 1.
      save: writes one file, given its tensors by name and its path.
    Returns: file name -> names of its tensors.
    """
    files: dict[str, list[str]] = {}
    part: dict[str, T] = {}
    size = 0

    def flush() -> None:
        nonlocal part, size
        if part:
            name = pattern.format(len(files) + 1)
            save(part, str(directory / name))
            files[name] = list(part)
        part, size = {}, 0

    for name, tensor in tensors:
        if size and size + tensor.nbytes > SHARD_BYTES:
            flush()
        part[name] = tensor
        size += tensor.nbytes
    flush()
    return files
