"""Loads a model of mlx-lm from a Hugging Face folder: completes its settings, selects its files, checks both."""

import contextlib
import functools
import importlib
import importlib.util
import inspect
import io
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn

from gvpo_core.training.config import ConfigError, ModelConfig
from gvpo_core.training.policy import weight_files
from gvpo_core.training.policy.hugging_face import check_window, explained, read_config
from gvpo_mlx import corrections, rope, settings, weights


@dataclass(frozen=True)
class Loaded:
    """A lazily loaded model: its weights are not in memory yet."""

    lm: nn.Module
    config: Mapping[str, Any]  # of the language model, completed; the `text_config` of a multimodal model
    written: Mapping[str, Any]  # config.json for an export, without quantization
    origin: weights.Origin
    window: int | None  # sliding window that is not applied
    settings: Mapping[str, Any]  # config.json of the language model, as in the folder
    compared: str = "not compared with transformers"  # result, or why there is none; see twin.py


def pretrained(config: ModelConfig, folder: Path) -> Loaded:
    """Builds the model and checks that mlx-lm reads its settings, files and tensors correctly.

    Raises: ConfigError: unknown architecture; mlx-lm reads settings, files or tensors differently.
    """
    with explained("the model", config):
        return _pretrained(config, folder)


def _pretrained(config: ModelConfig, folder: Path) -> Loaded:
    from mlx_lm.utils import load_model

    tensors = weight_files.tensors(folder)
    text = (folder / "config.json").read_text(encoding="utf-8")
    arguments_of = functools.partial(arguments, path=config.path)
    completed = read_config(folder, arguments_of)
    written = json.loads(text, object_hook=settings.special_floats)
    settings.check_quantization(written, folder)
    known = arguments_of(completed["model_type"])
    lm_config, lm_written = completed, written
    nested = "text_config" in known and isinstance(completed.get("text_config"), Mapping)
    if nested:
        lm_config, lm_written = _text_config(folder, completed), written["text_config"]
        lm_written = {"model_type": lm_config["model_type"]} | lm_written
        known = _text_arguments(completed["model_type"], lm_config["model_type"], config.path)
    check_window(lm_config)
    settings.check_dropped(lm_written, known)
    rope_override = rope.settings_for(known, lm_config)
    override = {k: v for k, v in lm_config.items() if k != "rope_parameters" or (nested and k in known)}
    override |= rope_override | settings.pattern_of_layers(known, lm_config)
    if nested:
        outer = {k: v for k, v in completed.items() if k != "rope_parameters"}
        override = outer | {"text_config": override, "vocab_size": lm_config["vocab_size"]}
    override["model_type"] = _mlx_kind(completed["model_type"])
    override |= settings.other_words(lm_config)
    with weights.alone(folder) as files:
        try:
            lm, _ = load_model(files, lazy=True, model_config=override, trust_remote_code=config.trust_remote_code)
        except ValueError as error:  # lists tensors, one per line
            raise _explained(" ".join(str(error).split())[:300], completed["model_type"], config.path) from error
    weight_files.refuse_integers(tensors, settings.packed_names(lm, tensors))
    origin = weights.Origin(lm, folder)
    origin.check(lm_config)
    language = language_model(lm)
    settings.check_activation(language, lm_written)
    settings.check_head(language, folder, lm_config)
    settings.check_experts(language, lm_config)
    rope.check(language, rope_override, lm_config)
    rope.correct_yarn(language, rope_override)
    weights.freeze_constants(lm, lm_config["model_type"])
    window = corrections.apply_window(language, lm_config)
    corrections.scale_embedding_exactly(language)
    export = {k: v for k, v in (written if nested else completed).items() if k not in settings.QUANTIZATION}
    return Loaded(lm, lm_config, export, origin, window, lm_written)


_NAMES_OF_TENSORS = {
    r"Received (\d+) parameters not in model: ": "has {} weights that mlx-lm's {} does not use",
    r"Missing (\d+) parameters: ": "lacks {} weights of mlx-lm's {}",
}


def _explained(message: str, kind: str, path: str) -> Exception:
    """Rewords mlx-lm's error about missing or unused tensors so that it says what to do."""
    for beginning, problem in _NAMES_OF_TENSORS.items():
        if match := re.match(beginning, message):
            first = message[match.end() :].partition(",")[0].rstrip(".")
            description = f"model.path {path!r} {problem.format(match[1], kind)}, the first {first}"
            return ConfigError(f"{description}; gvpo_torch may take the model")
    return ValueError(message)


def language_model(lm: nn.Module) -> nn.Module:
    """Returns the language model of a multimodal model; any other model itself."""
    inner = lm.get("language_model") if isinstance(lm, dict) else None
    return inner if isinstance(inner, nn.Module) else lm


def arguments(kind: str, *, path: str) -> Mapping[str, Any]:
    """Returns the settings that mlx-lm's model of this type reads, by name."""
    module = _module(kind, path)
    if _mlx_kind(kind) != kind:
        return _text_arguments(kind, kind, path)
    return inspect.signature(module.ModelArgs).parameters


def _module(kind: str, path: str) -> Any:
    from mlx_lm.utils import MODEL_REMAPPING

    printed = io.StringIO()
    kind = _mlx_kind(kind)
    try:
        with contextlib.redirect_stdout(printed):
            module = importlib.import_module(f"mlx_lm.models.{MODEL_REMAPPING.get(kind, kind)}")
        module.ModelArgs  # noqa: B018 - other modules of mlx-lm have none
    except (ImportError, AttributeError, TypeError) as error:
        raise ConfigError(f"model.path {path!r} is of type {kind!r}, which mlx-lm does not have") from error
    except SystemExit as error:  # mlx-lm's olmo exits if a package is missing
        raise ConfigError(
            f"model.path {path!r} is of type {kind!r}, which mlx-lm cannot load here: "
            f"{printed.getvalue().strip() or 'it exits without a message'}"
        ) from error
    return module


def _mlx_kind(kind: str) -> str:
    """Returns mlx-lm's name of a model type. The multimodal class also reads the language model of Qwen3.5 alone."""
    short = kind.removesuffix("_text")
    lacks = importlib.util.find_spec(f"mlx_lm.models.{kind}") is None
    return short if lacks and importlib.util.find_spec(f"mlx_lm.models.{short}") is not None else kind


def _text_arguments(kind: str, text_kind: str, path: str) -> Mapping[str, Any]:
    for base in _module(kind, path).Model.__mro__:
        module = sys.modules[base.__module__]
        for name in ("TextModelArgs", "TextArgs", "TextConfig"):
            if hasattr(module, name):
                return inspect.signature(getattr(module, name)).parameters
    return inspect.signature(_module(text_kind, path).ModelArgs).parameters


def _text_config(folder: Path, completed: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `text_config` with all defaults of transformers: Gemma 3's file has five of its thirty settings."""
    from transformers import AutoConfig

    config = dict(completed["text_config"])
    try:
        multimodal = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        known = multimodal.get_text_config().to_dict()
    except (ValueError, KeyError, OSError, TypeError, AttributeError):
        return {"model_type": completed["model_type"]} | config
    simple = {k: v for k, v in known.items() if isinstance(v, (bool, int, float, str, list))}
    text = simple | {k: v for k, v in config.items() if v is not None}
    # The multimodal model's setting decides whether the head is tied, not its language model's.
    text |= {"model_type": known["model_type"], "tie_word_embeddings": bool(multimodal.tie_word_embeddings)}
    if known.get("rope_parameters"):
        text = {k: v for k, v in text.items() if k not in ("rope_theta", "rope_scaling")}
        text["rope_parameters"] = known["rope_parameters"]
    return text
