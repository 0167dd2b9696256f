"""The policy's whole state on disk, for training to go on: safetensors and JSON alone."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from gvpo_core.training.policy.checkpoint import MOMENTS, check_files, check_tensors, write_header, write_shards
from gvpo_mlx.model import Scorer
from gvpo_mlx.update import AdamW


def save(
    directory: Path, scorer: Scorer, optimizer: AdamW, header: Mapping[str, Any], reference: Sequence[mx.array]
) -> None:
    """Writes parameters, moments and `header` into a folder, a gibibyte a file.

    Args:
      reference: parameters of a renewed reference; empty: the reference is the initial model.
    """

    def tensors() -> Iterator[tuple[str, mx.array]]:
        for i, (name, value) in enumerate(zip(scorer.names, scorer.parameters, strict=True)):
            yield f"parameter.{name}", value
            for moment, held in zip(MOMENTS, optimizer.moments[i] if optimizer.moments else (), strict=False):
                yield f"{moment}.{name}", held
        for name, value in zip(scorer.names, reference, strict=False):
            yield f"reference.{name}", value

    def write(part: dict[str, mx.array], path: str) -> None:
        mx.save_safetensors(path, part)

    files = write_shards(directory, tensors(), "state-{:05d}.safetensors", write)
    write_header(directory, {**header, "optimizer_steps": optimizer.steps, "files": list(files)})


def restore(directory: Path, scorer: Scorer, optimizer: AdamW, header: Mapping[str, Any]) -> list[mx.array]:
    """Reads what `save` wrote into model and optimizer.

    Returns: the parameters of a renewed reference, if it has one.
    Raises: ConfigError: files or tensors that do not fit the model; nothing was changed.
    """
    check_files(directory, header["files"])
    found: dict[str, mx.array] = {}
    for file in header["files"]:
        found |= mx.load(str(directory / file))
    moved, renewed = bool(header["optimizer_steps"]), bool(header.get("renewed"))
    kinds = ("parameter", *(MOMENTS if moved else ()), *(("reference",) if renewed else ()))
    own = dict(zip(scorer.names, scorer.parameters, strict=True))
    wanted = {f"{kind}.{name}": value.shape for kind in kinds for name, value in own.items()}
    check_tensors(directory, wanted, {name: value.shape for name, value in found.items()})
    values = [found[f"parameter.{name}"].astype(value.dtype) for name, value in own.items()]
    moments = [tuple(found[f"{m}.{name}"] for m in MOMENTS) for name in own] if moved else []
    mx.eval(values, moments)
    scorer.parameters = values
    optimizer.moments = moments  # type: ignore[assignment]
    optimizer.steps = int(header["optimizer_steps"])
    return [found[f"reference.{name}"] for name in own] if renewed else []
