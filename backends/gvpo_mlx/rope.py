"""Puts RoPE's settings where mlx-lm reads them, and checks the model that it builds.

transformers 5 stores them in `rope_parameters`. Many models of mlx-lm read only a top-level `rope_theta` and
`rope_scaling`; without these they silently use a default, and log-probs are off by a nat or more.
"""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from gvpo_core.training.config import ConfigError
from gvpo_core.training.policy.hugging_face import rope_settings

_YARN = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_MODULES = {
    "default": "RoPE",
    "linear": "RoPE",
    "llama3": "Llama3RoPE",
    "yarn": "YarnRoPE",
    "proportional": "ProportionalRoPE",
    "mrope": "RoPE",
}
"""rope_type -> the class of mlx-lm that computes it like transformers.

longrope is missing because mlx-lm uses the long factors at every length, transformers only beyond the original length.
dynamic is missing because it depends on the length of the row, so cached keys and new ones would not match."""


def settings_for(known: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings for config.json that give mlx-lm's model arguments the right RoPE.

    Args:
      known: names of the settings that the architecture's `ModelArgs` takes.
      config: config.json, with transformers' defaults filled in if it knows the model.
    Raises: ConfigError: mlx-lm computes the settings differently, or this architecture cannot take them.
    """
    nested: Any = config.get("rope_parameters")
    by_layer = isinstance(nested, Mapping) and nested and all(isinstance(v, Mapping) for v in nested.values())
    if by_layer and "rope_parameters" in known:
        return {}
    name = config.get("model_type")
    if by_layer:
        if not {"rope_theta", "rope_local_base_freq"} <= set(known) or set(nested) != {
            "full_attention",
            "sliding_attention",
        }:
            raise ConfigError(
                f"RoPE of {name} has settings by kind of layer ({', '.join(nested)}), and mlx-lm's {name} reads only "
                "one: its log-probs would be wrong"
            )
        local = _supported(name, {"rope_parameters": nested["sliding_attention"]})
        if local["rope_type"] != "default":
            raise ConfigError(f"rope_type {local['rope_type']} of sliding layers is not read by mlx-lm's {name}")
        return _arguments(known, name, _supported(name, {"rope_parameters": nested["full_attention"]}), config) | {
            "rope_local_base_freq": local["rope_theta"]
        }
    if nested is None and config.get("rope_theta") is None and config.get("rope_scaling") is None:
        return {}  # no RoPE, or settings that only mlx-lm knows; `check` then checks nothing
    return _arguments(known, name, _supported(name, config), config)


def _supported(name: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    rope = rope_settings(dict(config) | {"model_type": name})
    if rope["rope_type"] not in _MODULES:
        raise ConfigError(
            f"rope_type {rope['rope_type']!r} of {name} is not computed by mlx-lm as transformers does; supported: "
            f"{', '.join(_MODULES)}"
        )
    if rope["rope_type"] == "yarn":
        known = (*_YARN, "rope_type", "rope_theta", "partial_rotary_factor", "truncate", "attention_factor")
        unknown = sorted(k for k, v in rope.items() if k not in known and v is not None)
        if unknown:
            raise ConfigError(
                f"yarn RoPE of {name} has {', '.join(f'{k} = {rope[k]}' for k in unknown)}, which mlx-lm does not read"
            )
    return rope


def _arguments(known: Mapping[str, Any], name: Any, rope: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    if "rope_theta" not in known and "rope_parameters" not in known:
        raise ConfigError(
            f"mlx-lm's {name} takes no rope_theta, and the model asks for {rope['rope_theta']:g}: "
            "the value that mlx-lm uses is unknown"
        )
    settings: dict[str, Any] = {"rope_theta": rope["rope_theta"]}
    partial, at_top = rope.get("partial_rotary_factor"), config.get("partial_rotary_factor")
    if partial is not None and partial != (1.0 if at_top is None else at_top):  # transformers uses RoPE's setting
        if "partial_rotary_factor" not in known and "rope_parameters" not in known:
            raise ConfigError(f"mlx-lm's {name} takes no partial_rotary_factor, and the model asks for {partial:g}")
        settings["partial_rotary_factor"] = partial
    if rope["rope_type"] == "default":
        return settings | {"rope_scaling": None}
    if "rope_scaling" not in known and "rope_parameters" not in known:
        raise ConfigError(f"mlx-lm's {name} takes no rope_scaling, and the model asks for {rope['rope_type']}")
    scaling = {k: v for k, v in rope.items() if k != "rope_theta" and v is not None} | {"type": rope["rope_type"]}
    if rope["rope_type"] == "yarn":
        scaling.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
        # transformers uses defaults for zeros, and for both mscale settings if one of them is missing or zero.
        together = scaling.get("mscale") and scaling.get("mscale_all_dim")
        unset = [k for k in _YARN[2:] if not scaling.get(k) or ("mscale" in k and not together)]
        scaling = {k: v for k, v in scaling.items() if k not in unset}
    return settings | {"rope_scaling": scaling}


def check(lm: nn.Module, settings: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Checks the RoPE modules of a loaded model.

    Raises: ConfigError: a module has another type or base than the settings.
    """
    if not settings:
        return
    scaling = settings.get("rope_scaling") or {}
    kind, factor = scaling.get("rope_type", "default"), scaling.get("factor", 1.0)
    local = settings.get("rope_local_base_freq")
    if local is None:
        _check(lm, config, kind, settings.get("rope_theta"), factor)
        return
    for layer, layer_type in zip(lm.layers, config["layer_types"], strict=True):
        if layer_type == "sliding_attention":
            _check(layer, config, "default", local, 1.0)
        else:
            _check(layer, config, kind, settings["rope_theta"], factor)


def correct_yarn(lm: nn.Module, settings: Mapping[str, Any]) -> None:
    """Applies the settings of yarn RoPE that mlx-lm does not read: `truncate = false` and `attention_factor`.

    With `truncate = false`, the bounds of the ramp between the two kinds of frequencies are not rounded to integers.
    """
    scaling = settings.get("rope_scaling") or {}
    if scaling.get("rope_type") != "yarn":
        return
    for module in lm.modules():
        if type(module).__name__ != "YarnRoPE":
            continue
        if scaling.get("attention_factor") is not None:
            module.mscale = float(scaling["attention_factor"])
        if scaling.get("truncate", True):
            continue
        base, dims = float(settings["rope_theta"]), module.dims
        turns = np.asarray([scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1], dtype=np.float64)
        bounds = dims * np.log(scaling["original_max_position_embeddings"] / (turns * 2 * np.pi)) / (2 * np.log(base))
        low, high = max(bounds[0], 0), min(bounds[1], dims - 1)
        ramp = np.clip((np.arange(dims // 2) - low) / (high - low or 0.001), 0, 1)
        inverse = base ** (-np.arange(0, dims, 2) / dims)
        inverse = inverse / scaling["factor"] * ramp + inverse * (1 - ramp)
        module._freqs = mx.array((1 / inverse).astype(np.float32))


def _check(part: nn.Module, config: Mapping[str, Any], kind: str, theta: Any, factor: float) -> None:
    for module in part.modules():
        built = type(module).__name__
        if built == "RoPE":
            correct = float(module.base) == float(theta) and _MODULES[kind] == "RoPE"
            correct = correct and (kind != "linear" or abs(module.scale * factor - 1.0) < 1e-6)
        elif built.endswith("RoPE"):
            correct = built == _MODULES[kind]
        else:
            continue
        if not correct:
            raise ConfigError(
                f"mlx-lm built {built} with base {getattr(module, 'base', 'unknown')} for {config.get('model_type')}; "
                f"the model asks for {kind} RoPE with theta {theta:g}"
            )
