"""Writes the files of a Hugging Face folder, for the exports of all backends."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gvpo_core.training.policy.checkpoint import T, write_shards
from gvpo_core.training.policy.hugging_face import generation_settings, portable_config
from gvpo_core.training.policy.weight_files import INDEX


def write_weights(
    directory: Path, tensors: Iterable[tuple[str, T]], save: Callable[[dict[str, T], str], None]
) -> list[Path]:
    """Writes model.safetensors, or several files and an index if the tensors take more than `SHARD_BYTES`.

    Args: see `write_shards`. Returns: the weight files.
    """
    total = 0

    def counted() -> Iterator[tuple[str, T]]:
        nonlocal total
        for name, tensor in tensors:
            total += tensor.nbytes
            yield name, tensor

    files = write_shards(directory, counted(), "model-{:05d}.safetensors", save)
    if len(files) == 1:  # the name that every library reads
        return [(directory / next(iter(files))).rename(directory / "model.safetensors")]
    weight_map: dict[str, str] = {}
    written = []
    for i, (file, names) in enumerate(files.items(), 1):
        path = directory / f"model-{i:05d}-of-{len(files):05d}.safetensors"
        written.append((directory / file).rename(path))
        weight_map |= dict.fromkeys(names, path.name)
    if files:
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return written


def with_own_head(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config.json with an untied head: a separate tensor lm_head.weight instead of the embedding."""
    parts = {name: with_own_head(part) for name, part in config.items() if name == "text_config" and part}
    return {**config, **parts, "tie_word_embeddings": False}


def write_settings(
    directory: Path, config: Mapping[str, Any], dtype: str, source: Path, end: Sequence[int], tokenizer: Any
) -> None:
    """Writes config.json, generation_config.json and the tokenizer's files.

    Args:
      config: the model's config.json.
      source: the folder of the model before training.
      end: the tokens that end a response; all of them are written to generation_config.json.
    """
    write_json(directory / "config.json", portable_config(config, dtype))
    write_json(directory / "generation_config.json", generation_settings(source, end))
    tokenizer.save_pretrained(directory)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes JSON with an indent of two spaces and a final newline."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
