"""The policy on disk: its whole state for training to go on, and an export for others. safetensors and JSON alone."""

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from gvpo_core.training.config import ConfigError, ModelConfig
from gvpo_core.training.policy.hugging_face import generation_settings, local_folder, portable_config
from gvpo_mlx.adapters import adapted, merged
from gvpo_mlx.model import Scorer, read_back
from gvpo_mlx.update import AdamW
from gvpo_mlx.weights import constants

log = logging.getLogger("gvpo.mlx")
SHARD_BYTES = 2**30
MOMENTS = ("exp_avg", "exp_avg_sq")
FORMAT = 1


def save(directory: Path, scorer: Scorer, optimizer: AdamW, facts: Mapping[str, Any]) -> None:
    """Writes parameters, moments and `facts` into a folder, a gibibyte a file."""

    def tensors() -> Iterator[tuple[str, mx.array]]:
        for i, (name, value) in enumerate(zip(scorer.names, scorer.parameters, strict=True)):
            yield f"parameter.{name}", value
            for moment, held in zip(MOMENTS, optimizer.moments[i] if optimizer.moments else (), strict=False):
                yield f"{moment}.{name}", held

    files = _write(directory, tensors(), "state-{:05d}.safetensors", {})
    state = {"format": FORMAT, **facts, "optimizer_steps": optimizer.steps, "files": files}
    (directory / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def _write(
    directory: Path, tensors: Iterable[tuple[str, mx.array]], pattern: str, metadata: dict[str, str]
) -> list[str]:
    files: list[str] = []
    part: dict[str, mx.array] = {}
    size = 0

    def flush() -> None:
        nonlocal part, size
        if part:
            files.append(pattern.format(len(files) + 1))
            mx.save_safetensors(str(directory / files[-1]), part, metadata)
        part, size = {}, 0

    for name, tensor in tensors:
        if size and size + tensor.nbytes > SHARD_BYTES:
            flush()
        part[name] = tensor
        size += tensor.nbytes
    flush()
    return files


def restore(directory: Path, scorer: Scorer, optimizer: AdamW, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Reads what `save` wrote into model and optimizer; `facts` it must agree with are checked first.

    Returns: the saved facts.
    Raises: ConfigError: a folder without state, or the state of another model or kind of training.
    """
    path = directory / "state.json"
    if not path.is_file():
        raise ConfigError(f"{directory} has no state.json: not a checkpoint of this backend")
    state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if state.get("format") != FORMAT:
        raise ConfigError(f"{path} has format {state.get('format')}; this version reads {FORMAT}")
    for name, value in facts.items():
        if state.get(name) != value:
            raise ConfigError(f"the checkpoint {directory} has {name} = {state.get(name)}; this run has {value}")
    found: dict[str, mx.array] = {}
    for file in state["files"]:
        if os.path.basename(file) != file or not (directory / file).is_file():
            raise ConfigError(f"the checkpoint {directory} lacks its file {file}")
        found |= mx.load(str(directory / file))
    kinds = ("parameter", *(MOMENTS if state["optimizer_steps"] else ()))
    own = dict(zip(scorer.names, scorer.parameters, strict=True))
    _check(directory, {f"{kind}.{name}": value.shape for kind in kinds for name, value in own.items()}, found)
    values = [found[f"parameter.{name}"].astype(value.dtype) for name, value in own.items()]
    moments = [tuple(found[f"{m}.{name}"] for m in MOMENTS) for name in own] if len(kinds) > 1 else []
    mx.eval(values, moments)
    scorer.parameters = values
    optimizer.moments = moments  # type: ignore[assignment]
    optimizer.steps = int(state["optimizer_steps"])
    return state


def _check(directory: Path, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, mx.array]) -> None:
    lacking, foreign = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    unlike = sorted(name for name in wanted.keys() & found.keys() if tuple(wanted[name]) != tuple(found[name].shape))
    for what, names in (("lacks", lacking), ("has besides", foreign), ("has another shape of", unlike)):
        if names:
            raise ConfigError(
                f"the checkpoint {directory} does not fit the model: "
                f"it {what} {len(names)} tensors, the first {names[0]}"
            )


def export(directory: Path, scorer: Scorer, config: ModelConfig, tokenizer: Any, end: Sequence[int]) -> None:
    """Writes a Hugging Face folder: weights with adapters merged in and unpacked, by the names and shapes of the folder
    that was trained; config, tokenizer; under `adapters`, where there are any, the adapters alone as mlx-lm loads them
    onto the model that they were trained on. The folder is then read back and scored.

    Args:
      end: the tokens that ended responses; all of them are in generation_config.json.
    Raises: ConfigError: the folder does not score as the model that was trained; its weights are removed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    folder, loaded = local_folder(config), scorer.loaded
    dtype = scorer.dtype
    constant = constants(str(loaded.config.get("model_type")))
    tensors = {}
    for name, value in loaded.origin.tensors(dict(merged(scorer.lm))).items():
        if name.rpartition(".")[2] in constant and not loaded.origin.mlx_format:
            value = loaded.origin.stored(name)  # never trained: some are float32 in a folder of 16 bits
        elif mx.issubdtype(value.dtype, mx.floating):
            value = value.astype(dtype)
        tensors[name] = value
    if loaded.origin.mlx_format and any(".switch_mlp." in name for name in tensors):
        log.warning(
            "%s is in MLX's own format, and so is its export: mlx-lm reads it, transformers may not", config.path
        )
    head = "lm_head.weight"
    if head not in tensors and "lm_head" not in scorer.language and loaded.written.get("tie_word_embeddings") is False:
        tensors[head] = tensors[next(n for n in tensors if n.endswith("embed_tokens.weight"))]
    files = _write(directory, tensors.items(), "model-{:05d}.safetensors", {"format": "pt"})
    written = _index(directory, files, tensors)
    # The completed settings: mlx-lm asks for some by names that transformers 5 no longer writes.
    settings = portable_config(loaded.written, config.dtype)
    (directory / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    generation = json.dumps(generation_settings(folder, end), indent=2) + "\n"
    (directory / "generation_config.json").write_text(generation, encoding="utf-8")
    tokenizer.save_pretrained(directory)
    try:
        read_back(directory, scorer, config)
    except ConfigError:
        for path in written:
            path.unlink()
        raise
    if scorer.adapted:
        _export_adapters(directory / "adapters", scorer, config)


def _index(directory: Path, files: list[str], tensors: Mapping[str, mx.array]) -> list[Path]:
    if len(files) == 1:  # the name that every reader knows
        return [(directory / files[0]).rename(directory / "model.safetensors")]
    names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    where = {}
    for file, name in zip(files, names, strict=True):
        where |= dict.fromkeys(mx.load(str(directory / file)), name)
        (directory / file).rename(directory / name)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return [directory / name for name in names]


def _export_adapters(directory: Path, scorer: Scorer, config: ModelConfig) -> None:
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
    (directory / "adapter_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
