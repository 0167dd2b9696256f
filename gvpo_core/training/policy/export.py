"""What every backend's export shares: the files of a Hugging Face folder."""

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
    """Writes model.safetensors, or several files and their index where the tensors take more than `SHARD_BYTES`.

    Args: as `write_shards`. Returns: the files of weights.
    """
    total = 0

    def counted() -> Iterator[tuple[str, T]]:
        nonlocal total
        for name, tensor in tensors:
            total += tensor.nbytes
            yield name, tensor

    files = write_shards(directory, counted(), "model-{:05d}.safetensors", save)
    if len(files) == 1:  # the name that every reader knows
        return [(directory / next(iter(files))).rename(directory / "model.safetensors")]
    where: dict[str, str] = {}
    written = []
    for i, (file, names) in enumerate(files.items(), 1):
        path = directory / f"model-{i:05d}-of-{len(files):05d}.safetensors"
        written.append((directory / file).rename(path))
        where |= dict.fromkeys(names, path.name)
    if files:
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    return written


def with_own_head(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the same model whose head is a tensor of its own, lm_head.weight, instead of its embedding."""
    parts = {name: with_own_head(part) for name, part in config.items() if name == "text_config" and part}
    return {**config, **parts, "tie_word_embeddings": False}


def write_settings(
    directory: Path, config: Mapping[str, Any], dtype: str, source: Path, end: Sequence[int], tokenizer: Any
) -> None:
    """Writes config.json, generation_config.json and the tokenizer's files.

    Args:
      config: of the model, as config.json has it.
      source: the folder that was trained from.
      end: the tokens that ended responses; all of them are in generation_config.json.
    """
    write_json(directory / "config.json", portable_config(config, dtype))
    write_json(directory / "generation_config.json", generation_settings(source, end))
    tokenizer.save_pretrained(directory)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes JSON with an indent of two spaces and a final newline."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
