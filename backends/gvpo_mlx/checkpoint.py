"""The policy's whole state on disk, for training to go on: safetensors and JSON alone."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from gvpo_core.training.policy.checkpoint import MOMENTS, check_files, check_tensors, write_header, write_shards
from gvpo_mlx.model import Scorer
from gvpo_mlx.update import AdamW


def save(directory: Path, scorer: Scorer, optimizer: AdamW, header: Mapping[str, Any]) -> None:
    """Writes parameters, moments and `header` into a folder, a gibibyte a file."""

    def tensors() -> Iterator[tuple[str, mx.array]]:
        for i, (name, value) in enumerate(zip(scorer.names, scorer.parameters, strict=True)):
            yield f"parameter.{name}", value
            for moment, held in zip(MOMENTS, optimizer.moments[i] if optimizer.moments else (), strict=False):
                yield f"{moment}.{name}", held

    def write(part: dict[str, mx.array], path: str) -> None:
        mx.save_safetensors(path, part)

    files = write_shards(directory, tensors(), "state-{:05d}.safetensors", write)
    write_header(directory, {**header, "optimizer_steps": optimizer.steps, "files": list(files)})


def restore(directory: Path, scorer: Scorer, optimizer: AdamW, header: Mapping[str, Any]) -> None:
    """Reads what `save` wrote into model and optimizer.

    Raises: ConfigError: files or tensors that do not fit the model; nothing was changed.
    """
    check_files(directory, header["files"])
    found: dict[str, mx.array] = {}
    for file in header["files"]:
        found |= mx.load(str(directory / file))
    kinds = ("parameter", *(MOMENTS if header["optimizer_steps"] else ()))
    own = dict(zip(scorer.names, scorer.parameters, strict=True))
    wanted = {f"{kind}.{name}": value.shape for kind in kinds for name, value in own.items()}
    check_tensors(directory, wanted, {name: value.shape for name, value in found.items()})
    values = [found[f"parameter.{name}"].astype(value.dtype) for name, value in own.items()]
    moments = [tuple(found[f"{m}.{name}"] for m in MOMENTS) for name in own] if len(kinds) > 1 else []
    mx.eval(values, moments)
    scorer.parameters = values
    optimizer.moments = moments  # type: ignore[assignment]
    optimizer.steps = int(header["optimizer_steps"])
