"""Checks a model against its folder: Tunix reads more weight files than transformers, and does not read config.json."""

import json
from pathlib import Path
from typing import Any

from gvpo_core.hosts import SettingsError

_SAME = {  # name in Tunix's configurations -> name in config.json
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "weight_tying": "tie_word_embeddings",
    "use_tied_embedding": "tie_word_embeddings",
}
_SILU = ("Llama3", "Qwen2", "Qwen3")  # Tunix's models that always compute silu
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def check_files(model_path: str | Path) -> None:
    """Checks that every *.safetensors file of the folder belongs to the model, since Tunix loads them all.

    Raises: SettingsError: there are other files. Their tensors would go into the model if their names fit.
    """
    folder = Path(model_path)
    files = {path.name for path in folder.glob("*.safetensors")}
    if _WHOLE in files:
        source, named = _WHOLE, {_WHOLE}
    elif (folder / _INDEX).is_file():
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        source, named = f"what {_INDEX} names", set(index["weight_map"].values())
    else:  # the model's files are unknown
        return
    if stray := sorted(files - named):
        raise SettingsError(
            f"{folder} has {', '.join(stray)} beside {source}: Tunix reads all *.safetensors of a folder, so the actor"
            " may have weights of another model; move the other files elsewhere and load it again"
        )


def check_config(model: Any, model_path: str | Path) -> None:
    """Compares the model with config.json, except RoPE (see `check_rope`).

    Raises: SettingsError: they differ, for example in a number of heads that also fits the weights' shapes, or
      config.json asks for something that Tunix's models do not have.
    """
    path, name = Path(model_path) / "config.json", type(model).__name__
    config = json.loads(path.read_text(encoding="utf-8"))
    if heads := config.get("num_attention_heads"):
        config = {"head_dim": config["hidden_size"] // heads, "num_key_value_heads": heads} | {
            key: value for key, value in config.items() if value is not None
        }
    for ours, theirs in _SAME.items():
        value = getattr(model.config, ours, None)
        if value is not None and theirs in config and value != config[theirs]:
            raise SettingsError(
                f"the model's config.{ours} is {value}, and {path} has {theirs} = {config[theirs]}: make the model with"
                f" dataclasses.replace(config, {ours}={config[theirs]})"
            )
    activation = config.get("hidden_act", "silu")
    if name in _SILU and activation != "silu":
        raise SettingsError(f"{path} has hidden_act = {activation!r}, and Tunix's {name} computes silu: another model")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise SettingsError(f"{path} has {key} = true, and Tunix's {name} leaves these biases out: another model")
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window and not hasattr(model.config, "sliding_window_size"):
        raise SettingsError(f"{path} has sliding_window = {window}, and Tunix's {name} has no window: another model")


def check_reference(actor: Any, reference: Any) -> None:
    """Compares the settings of actor and reference, if they have one class.

    Raises: SettingsError: with equal weights, the reference would compute another function than the actor.
    """
    if type(actor) is not type(reference):
        return
    for name in (*_SAME, "rope_theta"):
        values = [getattr(model.config, name, None) for model in (actor, reference)]
        if values[0] != values[1]:
            raise SettingsError(
                f"the actor's config.{name} is {values[0]} and the reference's {values[1]}: the reference is the actor"
                " before training; make both with one configuration"
            )
