"""Models as mlx-lm has them: loaded with the RoPE that their folder names, with adapters off, without dropout.

transformers 5 writes RoPE's settings into `rope_parameters`; most families of mlx-lm 0.32 read them at config.json's
top level alone, and fall back to a default without a word. Log-probs are then off by more than a nat.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx.utils import tree_unflatten
from mlx_lm import utils
from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear

from gvpo_core.training.policy.hugging_face import rope_settings

_OTHERWISE = {
    "longrope": "mlx-lm takes the long factors at every length, transformers beyond the original one alone",
    "su": "mlx-lm takes the long factors at every length, transformers beyond the original one alone",
    "dynamic": "its frequencies depend on the length of a row, padding included",
}
_ADAPTERS = (LoRALinear, LoRAEmbedding, LoRASwitchLinear, DoRALinear, DoRAEmbedding)


class ModelError(ValueError):
    """A model that mlx-lm would compute otherwise than its folder says; the message says what to do."""


def load(path: str, **options: Any) -> Any:
    """`mlx_lm.load`, with RoPE's settings where mlx-lm reads them.

    Args:
      path: a folder or hub name.
      options: mlx_lm.load's.
    Returns: as mlx_lm.load: (model, tokenizer).
    Raises: ModelError: no such model, one that mlx-lm cannot load, or RoPE settings that it cannot be given.
    """
    folder = _folder(path, options.get("revision"))
    try:
        options["model_config"] = mended(utils.load_config(folder)) | (options.get("model_config") or {})
        return mlx_lm.load(str(path), **options)
    except ModelError:
        raise
    except (OSError, ValueError) as error:  # no weights, a file that is no JSON, an unknown model type
        raise ModelError(f"mlx-lm cannot load {str(path)!r}: {error}") from error


def _folder(path: str | Path, revision: str | None = None) -> Path:
    text = str(path)
    if not Path(text).exists() and (text.count("/") != 1 or text.startswith((".", "~", "/"))):
        raise ModelError(f"model = {text!r}: there is no such folder, and names of the hub are like org/name")
    try:
        return Path(utils._download(text, revision=revision))
    except (OSError, ValueError) as error:
        raise ModelError(f"model = {text!r}: there is no such folder, and the hub gave none: {error}") from error


def check_rope(model: nn.Module, path: str | Path) -> None:
    """Compares the model's rotary embeddings with those that config.json asks for.

    Raises: ModelError: they differ, or config.json asks for what mlx-lm cannot do.
    """
    config = utils.load_config(_folder(path))
    config |= mended(config)
    kind, arguments = utils._get_classes(config)
    expected = _ropes(kind(arguments.from_dict(config)))  # lazy: no weight of it is ever made
    found = _ropes(model)
    for name, values in expected.items():
        if name not in found or not _same(found[name], values):
            raise ModelError(
                f"{name} of the model has {_shown(found.get(name))}, and {path}/config.json asks for {_shown(values)}:"
                " mlx-lm does not read rope_parameters for this model type; load it with gvpo_mlx_lm.load"
            )


def mended(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of RoPE that config.json keeps in `rope_parameters`, by the names that mlx-lm reads.

    Raises: ModelError: settings that mlx-lm's class for the model type has no place for.
    """
    found: dict[str, Any] = {}
    if isinstance(config.get("text_config"), dict):
        found["text_config"] = config["text_config"] | mended(
            {"model_type": config.get("model_type")} | config["text_config"]
        )
    rope = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or {}
    for kind in {rope.get("rope_type"), scaling.get("rope_type"), scaling.get("type")} & _OTHERWISE.keys():
        raise ModelError(f"config.json asks for rope_type {kind!r}: {_OTHERWISE[kind]}; log-probs would not be its own")
    if not rope:
        if "text_config" not in found and config.get("rope_theta") is None and _reads(config, "rope_theta"):
            raise ModelError(
                f"config.json of {config.get('model_type')} names no rope_theta, at its top level or in"
                " rope_parameters; mlx-lm would take a default of its own: add the model's"
            )
        return found
    if any(isinstance(value, dict) for value in rope.values()):
        return found | _by_layer_type(config, rope)
    settings = rope_settings(config)
    found["rope_theta"] = settings["rope_theta"]
    if "partial_rotary_factor" in settings:
        found["partial_rotary_factor"] = settings["partial_rotary_factor"]
    if settings["rope_type"] != "default":
        if not _reads(config, "rope_scaling", "rope_parameters"):
            raise ModelError(
                f"config.json asks for rope_type {settings['rope_type']!r}, and mlx-lm's {config.get('model_type')} has"
                " no RoPE scaling: its log-probs would be of another model"
            )
        found["rope_scaling"] = settings | {"type": settings["rope_type"]}
    return found


def _by_layer_type(config: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    if config.get("model_type") in ("gemma3_text", "gemma3"):
        whole, local = rope["full_attention"], rope["sliding_attention"]
        found = {"rope_theta": whole["rope_theta"], "rope_local_base_freq": local["rope_theta"]}
        if whole.get("rope_type", "default") != "default":
            found["rope_scaling"] = whole | {"type": whole["rope_type"]}
        return found
    if _reads(config, "rope_parameters"):
        return {}
    raise ModelError(
        f"config.json of {config.get('model_type')} has rope_parameters by layer type, {', '.join(rope)}, which mlx-lm"
        " does not read for it"
    )


def _reads(config: dict[str, Any], *names: str) -> bool:
    fields = utils._get_classes(config)[1].__dataclass_fields__
    return any(name in fields for name in names)


def _ropes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What each rotary embedding of a model computes with, by the module's name."""
    return {
        name: {key: value for key, value in {**vars(module), **module}.items() if key not in ("_no_grad", "_training")}
        for name, module in model.named_modules()
        if type(module).__name__.lower().endswith(("rope", "rotaryembedding"))
    }


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    if one.keys() != other.keys():
        return False
    arrays = lambda a, b: isinstance(a, mx.array) and isinstance(b, mx.array)
    return all(
        (a.shape == b.shape and mx.allclose(a, b).item()) if arrays(a, b) else a == b
        for a, b in ((one[key], other[key]) for key in one)
    )


def _shown(values: dict[str, Any] | None) -> str:
    if values is None:
        return "no such rotary embedding"
    parts = (f"{key.lstrip('_')} {value}" for key, value in values.items() if not isinstance(value, mx.array))
    return ", ".join(parts) + (", other frequencies" if any(isinstance(v, mx.array) for v in values.values()) else "")


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The base model: each LoRA or DoRA layer replaced by the layer that it adapts."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, _ADAPTERS)]
    base = [(name, module["embedding" if "embedding" in module else "linear"]) for name, module in layers]
    if not layers:
        yield
        return
    model.update_modules(tree_unflatten(base))
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(layers))


def dropouts(model: nn.Module) -> list[tuple[str, float]]:
    """(name, probability) of each dropout layer that drops anything."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Dropout))
    return [(name, 1 - layer._p_1) for name, layer in layers if layer._p_1 < 1]
