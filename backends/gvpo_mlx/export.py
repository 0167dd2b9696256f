"""Exports: a Hugging Face folder with adapters merged in, and the adapters alone. Both are read back and checked."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from gvpo_core.training.config import ConfigError, ModelConfig
from gvpo_core.training.files.disk import sync_tree
from gvpo_core.training.policy.export import with_own_head, write_json, write_settings, write_weights
from gvpo_core.training.policy.hugging_face import local_folder
from gvpo_mlx.adapters import adapted, merged
from gvpo_mlx.check import read_back, read_back_adapters
from gvpo_mlx.model import Scorer
from gvpo_mlx.weights import constants

log = logging.getLogger("gvpo.mlx")
_HEAD = "lm_head.weight"


def export(
    directory: Path, scorer: Scorer, config: ModelConfig, tokenizer: Any, end: Sequence[int], own_head: bool = False
) -> None:
    """Writes a Hugging Face folder, then reads it back and compares its log-probs.

    It holds the weights, adapters merged in and unpacked, under the names and shapes of the original folder, and config
    and tokenizer. The subfolder `adapters` holds the adapters alone, if there are any, in mlx-lm's format.

    Args:
      end: tokens that end a response; all of them go into generation_config.json.
      own_head: see `Policy.export`.
    Raises: ConfigError: the folder scores differently from the trained model; its weights are then removed. Or
      `own_head` is not possible for this model.
    """
    directory.mkdir(parents=True, exist_ok=True)
    loaded, dtype = scorer.loaded, scorer.dtype
    constant = constants(str(loaded.config.get("model_type")))
    tensors = {}
    for name, value in loaded.origin.tensors(dict(merged(scorer.lm))).items():
        if name.rpartition(".")[2] in constant and not loaded.origin.mlx_format:
            value = loaded.origin.stored(name)  # never trained; some are float32 in a 16-bit folder
        elif mx.issubdtype(value.dtype, mx.floating):
            value = value.astype(dtype)
        tensors[name] = value
    written_config = loaded.written
    if own_head:
        written_config = with_own_head(written_config)
        if isinstance(scorer.head, (nn.Embedding, nn.QuantizedEmbedding)):
            tensors[_HEAD] = tensors[_embedding(scorer, tensors)]
    other = "text_config" in loaded.written or any(".switch_mlp." in name for name in tensors)
    if loaded.origin.mlx_format and other:
        log.warning(
            "%s is in MLX's own format, and so is its export: mlx-lm reads it, transformers may not", config.path
        )

    def write(part: dict[str, mx.array], path: str) -> None:
        mx.save_safetensors(path, part, {"format": "pt"})

    written = write_weights(directory, tensors.items(), write)
    # The completed settings, because mlx-lm reads some under names that transformers 5 no longer writes.
    write_settings(directory, written_config, config.dtype, local_folder(config), end, tokenizer)
    try:
        read_back(directory, scorer, config)
    except ConfigError:
        for path in written:
            path.unlink()
        raise
    if scorer.adapted:
        export_adapters(directory / "adapters", scorer, config)
    sync_tree(directory)


def _embedding(scorer: Scorer, tensors: Mapping[str, mx.array]) -> str:
    """Returns the name of the embedding that is the head. Raises: ConfigError: the export has another name for it."""
    name = next((n for n, m in scorer.lm.named_modules() if m is scorer.head), "") + ".weight"
    if name not in tensors:
        raise ConfigError(
            f"the export of {scorer.name} has no {name}: gvpo_mlx cannot write its head as a tensor of its own"
        )
    return name


def export_adapters(directory: Path, scorer: Scorer, config: ModelConfig) -> None:
    """Writes the adapters in mlx-lm's format, and loads them back onto the base model with mlx-lm.

    Raises: ConfigError: other layers got adapters, or their numbers differ.
    """
    directory.mkdir(exist_ok=True)
    layers = adapted(scorer.lm)
    tensors = dict(tree_flatten(scorer.lm.trainable_parameters()))
    mx.save_safetensors(str(directory / "adapters.safetensors"), tensors)
    inside = sorted({re.sub(r"^.*?\.\d+\.", "", name) for name, _ in layers})
    settings = {
        "model": config.path,
        "fine_tune_type": config.lora_kind,
        "num_layers": len(scorer.lm.layers),
        "lora_parameters": {"rank": config.lora_rank, "scale": layers[0][1].scale, "dropout": 0.0, "keys": inside},
    }
    write_json(directory / "adapter_config.json", settings)
    read_back_adapters(directory, scorer, config)
    sync_tree(directory)
