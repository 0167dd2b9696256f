"""Reads and writes Hugging Face folders for all backends: location, tokenizer, config.json."""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from gvpo_core.training.config import ConfigError, ModelConfig
from gvpo_core.training.files.disk import refuse_special
from gvpo_core.training.files.hub import unreachable_for
from gvpo_core.training.files.lfs import is_pointer, pointer_message
from gvpo_core.training.policy.text import exported_eos
from gvpo_core.training.policy.weight_files import check_settings, refuse_adapter, refuse_quantizer

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.tiktoken", "*.jinja"]
_UNUSED = ["consolidated*", "original/*", "onnx/*"]  # second copies of the weights


def source(config: ModelConfig) -> dict[str, Any]:
    """Arguments of transformers' `from_pretrained` that locate the model.

    Raises: ConfigError: the path is empty; the folder does not exist, has no config.json or holds an adapter.
    """
    path = os.path.expanduser(config.path)
    if not path:
        raise ConfigError("model.path is empty: give a Hugging Face folder or hub name")
    if os.path.isdir(path):
        refuse_adapter(Path(path))
        if not os.path.isfile(os.path.join(path, "config.json")):
            raise ConfigError(f"model.path {config.path!r} has no config.json: expected a Hugging Face model folder")
    elif os.path.isabs(path) or path.startswith(".") or path.count("/") > 1:
        raise ConfigError(f"model.path {config.path!r} is not a folder")
    options = {
        "pretrained_model_name_or_path": path,
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
    }
    # Code may be in another repository than the weights. Without this, its newest commit would be used.
    return options | {"code_revision": config.revision} if config.trust_remote_code and config.revision else options


def located(config: ModelConfig) -> dict[str, Any]:
    """Returns `source` with the downloaded folder instead of a hub name, so that the hub is asked once.

    With trust_remote_code the hub name stays: transformers looks up the code by it.

    Raises: ConfigError: see `local_folder`.
    """
    arguments, folder = source(config), local_folder(config)
    return arguments if config.trust_remote_code else arguments | {"pretrained_model_name_or_path": str(folder)}


def local_folder(config: ModelConfig) -> Path:
    """Returns the model's folder. Downloads it first if `model.path` is a hub name.

    Raises: ConfigError: see `source`; or the model cannot be downloaded.
    """
    path = Path(source(config)["pretrained_model_name_or_path"])
    folder = path if path.is_dir() else _downloaded(config.path, config.revision)
    refuse_adapter(folder)
    refuse_quantizer(folder)
    for path in folder.iterdir():
        try:
            refuse_special(path)
        except OSError as e:
            raise ConfigError(f"model.path {config.path!r}: {path}: {e.strerror}") from e
    return folder


@lru_cache(maxsize=8)  # the hub is asked once per process, so tokenizer, model and reference are of one commit
def _downloaded(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at, unreachable = f" at revision {revision!r}" if revision else "", ""
    try:
        unreachable = unreachable_for(name, "model", revision)
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=_WANTED,
                ignore_patterns=_UNUSED,
                local_files_only=bool(unreachable),
            )
        )
    except LocalEntryNotFoundError as error:  # checked first: it shares base classes with the errors below
        offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "on", "yes", "true")
        why = (
            "HF_HUB_OFFLINE is set"
            if offline
            else f"the hub cannot be reached: {unreachable or _first_line(error.__cause__ or error)}"
        )
        raise ConfigError(
            f"model.path {name!r} is not a folder here, was not downloaded before{at}, and {why}; give a folder, or"
            f" download the model on a machine with a network: hf download {name}"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ConfigError(
            f"model.path {name!r} is not a folder here, and the hub has no such model{at} or hides it: check the"
            " name and model.revision; a private or gated model needs HF_TOKEN"
        ) from error
    except HFValidationError as error:
        raise ConfigError(
            f"model.path {name!r}: no such folder here, and not a valid name of the hub: {_first_line(error)}"
        ) from error
    except Exception as error:  # huggingface_hub and its HTTP client may raise anything
        access = "; a private or gated model needs HF_TOKEN" if "401" in str(error) or "403" in str(error) else ""
        raise ConfigError(
            f"model.path {name!r} is not a folder here and cannot be downloaded: {type(error).__name__}:"
            f" {_first_line(error)}{access}"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextlib.contextmanager
def explained(part: str, config: ModelConfig) -> Iterator[None]:
    """Converts an error of the library that loads `part` into a one-line ConfigError that names the model."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # a damaged file may raise anything in the library
        if "trust_remote_code" in str(error) and not config.trust_remote_code:
            raise ConfigError(
                f"{part} of model.path {config.path!r} needs code that comes with it: read that code, then set"
                " model.trust_remote_code = true, and for a hub name model.revision to the commit that you read"
            ) from error
        raise ConfigError(
            f"{part} of model.path {config.path!r} cannot be loaded: {type(error).__name__}:"
            f" {' '.join(str(error).split())[:300]}"
        ) from error


def load_tokenizer(config: ModelConfig) -> Any:
    """Loads the model's tokenizer with transformers.

    Raises: ConfigError: there is no tokenizer, or it cannot be read.
    """
    from transformers import AutoTokenizer

    folder = local_folder(config)
    files = [folder / name for name in _TOKENIZERS if (folder / name).is_file()]
    if not files:
        raise ConfigError(
            f"model.path {config.path!r} has no tokenizer: expected one of {', '.join(_TOKENIZERS)} in the folder"
        )
    for file in [*files, folder / "config.json"]:
        if is_pointer(file):
            raise ConfigError(pointer_message(file))
    with explained("the tokenizer", config):
        return AutoTokenizer.from_pretrained(**located(config))


def generation_eos(folder: Path) -> int | list[int] | None:
    """Returns the end tokens of generation_config.json, or else those of config.json.

    Raises: ConfigError: a file is not a JSON object.
    """
    config = read_json(folder / "config.json")
    for settings in (read_json(folder / "generation_config.json"), config, text_config(config)):
        ids: int | list[int] | None = settings.get("eos_token_id")
        if ids is not None:
            return ids
    return None


def generation_settings(folder: Path, end: Sequence[int]) -> dict[str, Any]:
    """Returns generation_config.json for an export of the model in `folder`.

    Args:
      end: the tokens that end a response; eos_token_id will have all of them.
    """
    settings = read_json(folder / "generation_config.json")
    return settings | {"eos_token_id": exported_eos(generation_eos(folder), end)}


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; empty if the file does not exist. Raises: ConfigError: it is not a JSON object."""
    if not path.is_file():
        return {}
    if is_pointer(path):
        raise ConfigError(pointer_message(path))
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(read, dict):
        raise ConfigError(f"{path} holds a {type(read).__name__}; expected a JSON object")
    return read


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings of the text model: `text_config` if config.json has one, as for models that also read images."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def context(config: Mapping[str, Any]) -> int | None:
    """Number of positions that a model supports, including RoPE scaling; None if config.json does not say."""
    config = text_config(config)
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    if not isinstance(positions, int):
        return None
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    each = [rope, *(v for v in rope.values() if isinstance(v, Mapping))]  # one for all layers, or one per kind of layer
    return int(positions * max(1.0, *(float(r.get("factor") or 1.0) for r in each)))


def read_config(folder: Path, wanted: Callable[[str], Iterable[str]]) -> dict[str, Any]:
    """Reads config.json and completes it with transformers, if transformers knows the model.

    A file may leave out the defaults of its family, or set them to null: for example a sliding window of 4096 or a RoPE
    base of 10000. Older files use other names. transformers also reads some files as another model type (Mistral with
    `layer_types` becomes Ministral), and gives the last layer of Gemma 4 full attention.

    Args:
      wanted: model type -> names of the settings to complete. Settings of RoPE are always completed.
    Raises: ConfigError: the file is not JSON, has no model type, or has a value that is invalid for its family.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    path = folder / "config.json"
    config = read_json(path)
    if not isinstance(config.get("model_type"), str):
        raise ConfigError(f"{path} has no model_type")
    check_settings(config, folder)
    names = {*wanted(config["model_type"]), "layer_types", "sliding_window"}
    try:
        known = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except StrictDataclassError as error:
        raise ConfigError(f"{path} cannot be used: {' '.join(str(error).split())}") from error
    except (ValueError, KeyError, OSError, TypeError, AttributeError):
        return config
    config["model_type"] = known.model_type
    for name in names:
        mended = name == "layer_types" and {*(config.get(name) or ())} <= {"full_attention", "sliding_attention"}
        if name == "sliding_window" and hasattr(known, name):
            config[name] = known.sliding_window
        elif (mended or config.get(name) is None) and not name.startswith("rope"):
            value = getattr(known, name, None)
            if isinstance(value, (bool, int, float, str, list)):
                config[name] = value
    rope = getattr(known, "rope_parameters", None)
    if rope:  # transformers has converted older forms to this one
        config = {k: v for k, v in config.items() if k not in ("rope_theta", "rope_scaling")}
        config["rope_parameters"] = dict(rope)
    return config


def check_window(config: Mapping[str, Any]) -> None:
    """Rejects a missing or invalid sliding window if config.json has layers that need one.

    Args:
      config: completed config.json of the language model.
    Raises: ConfigError: there are sliding layers and no window, or the window is below 1.
    """
    window, kind = config.get("sliding_window"), config.get("model_type")
    sliding = "sliding_attention" in (config.get("layer_types") or ())
    if window is None and sliding:
        unused = config.get("use_sliding_window") is False
        why = "use_sliding_window is false" if unused else "sliding_window is null"
        raise ConfigError(
            f"config.json of {kind} has layers of sliding_attention, and {why}: give the window, or layer_types of"
            " full_attention alone"
        )
    if window is None or (config.get("use_sliding_window") is False and not sliding):
        return
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ConfigError(f"sliding_window of {kind} is {window!r}; expected at least 1, or null for none")


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Reads RoPE's settings from config.json: rope_type, rope_theta and the settings of the type.

    transformers 5 writes `rope_parameters`; earlier versions write a top-level `rope_theta` and `rope_scaling`.

    Raises: ConfigError: neither place has rope_theta, or their values differ.
    """
    rope = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"
    thetas = {float(t) for t in (rope.get("rope_theta"), config.get("rope_theta")) if t is not None}
    if len(thetas) != 1:
        raise ConfigError(
            f"config.json of {config.get('model_type')} has {sorted(thetas) or 'no'} rope_theta in rope_parameters and"
            " at its top level; expected one value"
        )
    return rope | {"rope_theta": thetas.pop()}


def portable_config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Returns config.json for an export. It also has RoPE's settings in the old place, where mlx-lm reads them.

    Leaves out the name of the weight file, which changes in an export.
    """
    left_out = ("torch_dtype", "transformers_weights")
    result = {name: value for name, value in config.items() if name not in left_out} | {"dtype": dtype}
    if isinstance(config.get("text_config"), Mapping):
        result["text_config"] = portable_config(config["text_config"], dtype)
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        result["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            result["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return result
