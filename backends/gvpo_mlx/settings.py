"""Compares the settings in config.json with what mlx-lm's model computes.

mlx-lm reads only the settings that its `ModelArgs` names. It silently ignores all others, such as an activation, a
pattern of layers or a separate head. This module rejects an ignored setting by name, unless it changes no log-prob or
the model computes it anyway.
"""

import inspect
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from gvpo_core.training.config import ConfigError
from gvpo_core.training.policy import weight_files

_ELSEWHERE = frozenset(
    (
        *("model_type", "tie_word_embeddings", "max_position_embeddings", "n_positions"),
        *("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq"),
        *("layer_types", "sliding_window_pattern", "_sliding_window_pattern"),
        *("sliding_window", "use_sliding_window", "max_window_layers"),
        *("hidden_act", "hidden_activation", "activation_function"),
    )
)
"""Settings that rope.py or other functions of this file check."""

_HARMLESS = re.compile(
    r"dropout|pdrop|initializer|time_step_(min|max|floor|init_scheme)|rescale_prenorm|_jitter_|aux_loss|router_logits"
    r"|token_(id|index)$|use_cache|pretraining_tp|kernels$|mambapy|associative_scan|^(mamba_)?chunk_size$|in_fp32$"
    r"|upcast_attn|_dtype$|^summary_|num_nextn|^mtp_|num_logits_to_keep|classifier|is_decoder|add_cross_attention"
    r"|_config$|num_(local_)?experts$|num_key_value_heads$|head_dim$|n_inner$|intermediate_size$"
)
"""Settings of training, initialisation and precision, of parts that do not affect log-probs, and sizes, which mlx-lm
checks against the weights."""


QUANTIZATION = ("quantization", "quantization_config", "compression_config", "torch_dtype")
"""Settings that an export's config.json omits, because its weights are unpacked."""


def check_quantization(written: Mapping[str, Any], folder: Path) -> None:
    """Rejects weights that are not packed in MLX's own format. gpt-oss's mxfp4 is allowed.

    Raises: ConfigError: another quantisation; the message names the method.
    """
    method = weight_files.quantization(written)
    packing = written.get("quantization")
    if (
        method is None
        or method == "mxfp4"
        or (isinstance(packing, Mapping) and {"bits", "group_size"} <= packing.keys())
    ):
        return
    raise ConfigError(
        f"{folder} says that its weights are quantised ({method}); gvpo_mlx reads MLX's own quantisation. Quantise the "
        "original model with mlx_lm.convert -q, or give the model before it was quantised"
    )


def packed_names(lm: nn.Module, tensors: Mapping[str, Any]) -> list[str]:
    """Returns the tensors of the files that may be integers: all if each integer weight of the model has scales."""
    bare = quantized = False
    for module in lm.modules():
        quantized |= "scales" in module
        weight = module.get("weight")
        bare |= isinstance(weight, mx.array) and not mx.issubdtype(weight.dtype, mx.floating) and "scales" not in module
    return list(tensors) if quantized and not bare else []


def other_words(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns GraniteMoeHybrid's settings in mlx-lm's words: types of layers, and RoPE only if it is "rope"."""
    if config["model_type"] != "granitemoehybrid":
        return {}
    words = {"full_attention": "attention", "linear_attention": "mamba"}
    rope = config.get("position_embedding_type") == "rope"
    return {
        "layer_types": [words.get(kind, kind) for kind in config.get("layer_types") or []],
        "position_embedding_type": "rope" if rope else "nope",
    }


def pattern_of_layers(known: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the pattern of sliding layers in the setting that mlx-lm's architecture reads; empty if it reads none.

    transformers 5 saves only `layer_types`. mlx-lm would use the pattern of the first model of that architecture, so
    some layers would get the wrong RoPE, and log-probs would be off by a nat.

    Args:
      known: names of the settings that the architecture's `ModelArgs` takes.
    Raises: ConfigError: the setting cannot express the pattern.
    """
    kinds = config.get("layer_types")
    name = next((n for n in ("sliding_window_pattern", "full_attention_interval") if n in known), None)
    if not kinds or name is None or "layer_types" in known:
        return {}
    full = [kind == "full_attention" for kind in kinds]
    if config["model_type"] == "exaone4" and any(full):
        return {"sliding_window_pattern": None if all(full) else "".join("LG"[f] for f in full)}
    every = full.index(True) + 1 if any(full) else len(full) + 1
    if not any(full) or full != [(i + 1) % every == 0 for i in range(len(full))]:
        raise ConfigError(
            f"layer_types of {config['model_type']} is {', '.join(kinds)}; mlx-lm's model supports only patterns "
            "whose every n-th layer is full_attention: its log-probs would be wrong"
        )
    return {name: every}


def ignored_window(lm: nn.Module, config: Mapping[str, Any], name: str) -> int | None:
    """Returns the sliding window of config.json if mlx-lm's model applies it to no layer, else None.

    Raises: ConfigError: the model applies it to other layers than config.json says.
    """
    from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

    window = config.get("sliding_window")
    if window is None or config.get("use_sliding_window") is False:
        return None
    windowed = [isinstance(cache, RotatingKVCache) for cache in make_prompt_cache(lm)]
    kinds = config.get("layer_types") or ["sliding_attention"] * len(windowed)
    expected = [kind == "sliding_attention" for kind in kinds]
    if not any(expected) or windowed == expected:
        return None
    if any(windowed):
        raise ConfigError(
            f"{name} of mlx-lm has its window in layers {_numbers(windowed)}, and layer_types has it in"
            f" {_numbers(expected)}"
        )
    return int(window)


def _numbers(chosen: list[bool]) -> str:
    return ", ".join(str(i) for i, is_one in enumerate(chosen) if is_one) or "none"


def check_experts(lm: nn.Module, config: Mapping[str, Any]) -> None:
    """Rejects models that normalise the weight of a single expert: mlx-lm normalises only several weights.

    Raises: ConfigError: the model is of this kind.
    """
    if config.get("num_experts_per_tok") != 1 or not config.get("norm_topk_prob"):
        return
    if re.search(r"top_k\s*>\s*1\s+and", inspect.getsource(inspect.getmodule(type(lm)))):  # type: ignore[arg-type]
        raise ConfigError(
            f"config.json has num_experts_per_tok = 1 and norm_topk_prob, and mlx-lm's {config.get('model_type')} does"
            " not normalise the weight of one expert: its log-probs would be wrong. gvpo_torch takes it"
        )


def special_floats(entry: dict[str, Any]) -> Any:
    """`object_hook` for a config.json of transformers, which writes infinity as {"__float__": "Infinity"}."""
    return float(entry["__float__"]) if entry.keys() == {"__float__"} else entry


def check_dropped(written: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Looks for settings that transformers' model reads and mlx-lm's does not.

    Args:
      written: config.json as in the folder.
      known: names of the settings that the architecture's `ModelArgs` takes.
    Raises: ConfigError: such a setting differs from transformers' default.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, PretrainedConfig

    anywhere = PretrainedConfig().to_dict().keys()
    relevant = {k: v for k, v in written.items() if k not in anywhere or k in ("model_type", "tie_word_embeddings")}
    for name in sorted(relevant.keys() - known.keys() - _ELSEWHERE):
        if _HARMLESS.search(name):
            continue
        try:
            default = getattr(AutoConfig.for_model(**{k: v for k, v in relevant.items() if k != name}), name)
            value = getattr(AutoConfig.for_model(**relevant), name)
        except (ValueError, KeyError, TypeError, AttributeError, StrictDataclassError):
            continue  # not known to transformers, so none of its models reads it
        if default != value:
            raise ConfigError(
                f"config.json has {name} = {_short(value)}, which mlx-lm's {written['model_type']} does not read: it "
                f"computes as with {_short(default)}. gvpo_torch takes it"
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."


_SAME = {
    "silu": ("swish",),
    "gelu": ("gelu_python",),
    "gelu_pytorch_tanh": ("gelu_new", "gelu_fast", "gelu_python_tanh", "gelu_accurate"),
    "quick_gelu": (),
    "relu": (),
    "relu2": (),
}
_NAMES = {other: name for name, others in _SAME.items() for other in (name, *others)}


def _values(name: str, x: np.ndarray) -> np.ndarray:
    if name == "gelu":
        return x * np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])
    if name == "gelu_pytorch_tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if name.startswith("relu"):
        return np.maximum(x, 0) ** (2 if name == "relu2" else 1)
    return x / (1 + np.exp(-x * (1.702 if name == "quick_gelu" else 1.0)))


_GATED = ("gate_proj", "up_proj", "down_proj")
_LAYERS = (
    _GATED,
    ("gate_up_proj", "down_proj"),
    *(("fc1", "fc2"), ("fc_in", "fc_out"), ("c_fc", "c_proj"), ("dense_h_to_4h", "dense_4h_to_h")),
    ("up_proj", "down_proj"),
)
"""Names of the linear layers of a feed-forward module: gate first, gate and up in one, or no gate."""


def check_activation(lm: nn.Module, written: Mapping[str, Any]) -> None:
    """Compares the activation in config.json with what the feed-forward modules of a loaded model compute.

    Stand-ins replace the linear layers of a module, so that its output is the activation itself.

    Args:
      written: config.json as in the folder.
    Raises: ConfigError: a module computes another activation.
    """
    kind = written["model_type"]
    expected, usual = _activation(written)
    if expected is None or kind == "gpt_oss":  # its experts use a special activation
        return
    one_of_class = {type(module): module for module in lm.modules()}  # all modules of a class use the same activation
    computed = {name for name in map(_computed, one_of_class.values()) if name is not None}
    if computed - {_NAMES.get(expected)} or (not computed and usual is not None and expected != usual):
        raise ConfigError(
            f"the activation of {kind} is {expected!r} by config.json; mlx-lm's model does not read that and computes "
            f"{' and '.join(sorted(computed)) or usual}: its log-probs would be wrong. gvpo_torch takes it"
        )


def _activation(written: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Returns the activation that transformers uses, and its default if the file has none. None: not known."""
    from transformers import AutoConfig

    try:
        usual = AutoConfig.for_model(written["model_type"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return written.get("hidden_act"), None
    for name in ("hidden_activation", "hidden_act", "activation_function"):
        default = getattr(usual, name, None)
        if isinstance(default, str):
            return written.get(name) or default, default
    return None, None


def _computed(module: nn.Module) -> str | None:
    """Returns the activation of a feed-forward module; None if the module is of another kind or computes more."""
    from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

    x = np.linspace(-5, 5, 64)
    grid, factor = mx.array(x.astype(np.float32))[None, None], 1.5
    linear = next((names for names in _LAYERS if all(isinstance(module.get(n), nn.Module) for n in names)), None)
    if linear is None:
        return None
    parts = dict.fromkeys(linear, lambda _: grid) | {linear[-1]: lambda h: h}
    if linear == _GATED:
        parts["up_proj"] = lambda _: mx.full(grid.shape, factor)
    elif linear[0] == "gate_up_proj":
        parts[linear[0]] = lambda _: mx.concatenate([grid, mx.full(grid.shape, factor)], axis=-1)
    try:
        if isinstance(module, SwitchGLU):
            result = module.activation(mx.full(grid.shape, factor), grid)
        elif isinstance(module, SwitchMLP):
            result = module.activation(grid)
        else:
            result = _called_with(module, parts, grid)
        values = np.array(result.astype(mx.float32)).reshape(x.shape).astype(np.float64)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None
    gated = linear == _GATED or linear[0] == "gate_up_proj"
    expected = {name: _values(name, x) * (factor if gated else 1.0) for name in _SAME}
    return next((name for name, reference in expected.items() if np.abs(values - reference).max() < 5e-5), None)


def _called_with(module: nn.Module, parts: Mapping[str, Callable[[mx.array], mx.array]], x: mx.array) -> mx.array:
    before = {name: module[name] for name in parts}
    try:
        for name, part in parts.items():
            dict.__setitem__(module, name, part)
        result: mx.array = module(x)
        mx.eval(result)
        return result
    finally:
        for name, part in before.items():
            dict.__setitem__(module, name, part)


def check_head(lm: nn.Module, folder: Path, config: Mapping[str, Any]) -> None:
    """Looks for a head in the files that mlx-lm ignores because it ties the head to the embedding.

    Args:
      config: config.json of the language model, completed.
    Raises: ConfigError: the files have a head that differs from the embedding, which transformers uses; or config.json
      does not tie the two.
    """
    if "lm_head" in lm:
        return
    if config.get("tie_word_embeddings") is False:
        raise ConfigError(
            f"config.json has tie_word_embeddings = false, and mlx-lm's {config.get('model_type')} always ties its head"
            " to the embedding. gvpo_torch takes this model"
        )
    tensors = {name: value for path in weight_files.weight_files(folder) for name, value in _lazy(path)}
    for name, head in tensors.items():
        part = re.fullmatch(r"(?:.*\.)?lm_head\.(\w+)", name)
        if part is None:
            continue
        embedding = next(
            (t for n, t in tensors.items() if re.search(rf"embed\w*\.{part[1]}$|\bwte\.{part[1]}$", n)), None
        )
        same = embedding is not None and head.shape == embedding.shape and bool(mx.array_equal(head, embedding))
        if not same:
            raise ConfigError(
                f"{folder} ties its head to the embedding (tie_word_embeddings), but also has a different {name}: "
                "transformers uses that head, mlx-lm drops it. Set tie_word_embeddings = false in config.json to "
                "train with it, or remove it from the file"
            )


def _lazy(path: Path) -> list[tuple[str, mx.array]]:
    return list(cast("dict[str, mx.array]", mx.load(str(path))).items())
