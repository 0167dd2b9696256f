"""Loads mlx-lm's models and checks them against their folder. A model that would be computed differently is rejected.

mlx-lm reads from config.json only the names that its class for the model type has, and silently drops the rest: RoPE
that transformers 5 writes into `rope_parameters`, an activation, a window. Log-probs are then off by more than a nat.
The checks and corrections are gvpo_mlx's.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from gvpo_mlx import read, twin, weights
from gvpo_mlx.read import Loaded
from mlx.utils import tree_unflatten
from mlx_lm import utils
from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear

from gvpo_core.training.config import ConfigError, ModelConfig
from gvpo_core.training.policy.hugging_face import local_folder

_ADAPTERS = (LoRALinear, LoRAEmbedding, LoRASwitchLinear, DoRALinear, DoRAEmbedding)
_OF_TRAINING = ("_no_grad", "_training")


class ModelError(ValueError):
    """mlx-lm would compute the model differently from its folder. The message says what to do."""


def load(
    path: str | Path,
    tokenizer_config: dict[str, Any] | None = None,
    *,
    adapter_path: str | None = None,
    lazy: bool = False,
    return_config: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Loads as `mlx_lm.load` does, and checks that the model computes what its folder says.

    Args:
      path: a folder or hub name.
      tokenizer_config, adapter_path, lazy, return_config, revision, trust_remote_code: as mlx_lm.load's.
    Returns: as mlx_lm.load: (model, tokenizer), and the config with `return_config`.
    Raises: ModelError: there is no such model, mlx-lm cannot load it or computes it differently from transformers, or
      the adapters belong to another model.
    """
    folder = _folder(path, revision)
    loaded = _pretrained(path, folder, trust_remote_code)
    model = loaded.lm
    if not lazy:
        mx.eval(model.parameters())
    if adapter_path is not None:
        try:
            model = utils.load_adapters(model, adapter_path)
        except (OSError, ValueError, KeyError, AttributeError) as error:  # missing files, other tensors, no rank
            text = " ".join(f"{type(error).__name__}: {error}".split())
            raise ModelError(f"adapter_path = {adapter_path!r} does not fit {str(path)!r}: {text}") from error
    model.eval()
    config = utils.load_config(folder)
    try:
        tokenizer = utils.load_tokenizer(folder, tokenizer_config, eos_token_ids=config.get("eos_token_id"))
    except (OSError, ValueError) as error:
        raise ModelError(f"mlx-lm cannot load {str(path)!r}: {error}") from error
    return (model, tokenizer, config) if return_config else (model, tokenizer)


def _pretrained(path: str | Path, folder: Path, trust_remote_code: bool, *, compare: bool = True) -> Loaded:
    config = ModelConfig(path=str(folder), trust_remote_code=trust_remote_code)
    try:
        return (twin if compare else read).pretrained(config, local_folder(config))
    except (ConfigError, OSError, ValueError) as error:  # no weights, invalid JSON, unknown model type
        text = " ".join(str(error).replace("model.path ", "").split())
        raise ModelError(f"mlx-lm cannot load {str(path)!r}: {text}") from error


def _folder(path: str | Path, revision: str | None = None) -> Path:
    text = str(path)
    if not Path(text).exists() and (text.count("/") != 1 or text.startswith((".", "~", "/"))):
        raise ModelError(f"model = {text!r}: there is no such folder, and names of the hub are like org/name")
    try:
        return Path(utils._download(text, revision=revision))
    except (OSError, ValueError) as error:
        raise ModelError(f"model = {text!r}: there is no such folder, and the hub has none: {error}") from error


def check_model(model: nn.Module, path: str | Path) -> int | None:
    """Compares the model's modules with those that its folder asks for, and freezes constants.

    Returns: the longest row, in tokens, that the model scores as transformers does; None: no limit.
    Raises: ModelError: the model computes something else.
    """
    expected = _pretrained(path, _folder(path), False, compare=False)
    with adapters_off(model):
        modules = _computed(model)
    for name, target in _computed(expected.lm).items():
        actual = modules.get(name)
        if actual is None or not _same(actual, target):
            asked = _shown(target, actual or {}).removeprefix("has ")
            raise ModelError(
                f"{name or 'the model'} {_shown(actual, target)}, and {path}/config.json asks for {asked}: mlx_lm.load"
                " does not read all that the file says for this model type; load it with gvpo_mlx_lm.load"
            )
    weights.freeze_constants(model, str(expected.config["model_type"]))
    return expected.window


check_rope = check_model


def _computed(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Returns module name -> what it computes with: its classes, its numbers, and the tables of rotary embeddings."""
    modules = {}
    for name, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str, tuple, type(None)))}
        facts = {k: v for k, v in plain.items() if k not in _OF_TRAINING}
        if type(module).__name__.lower().endswith(("rope", "rotaryembedding")):
            facts |= {k: v for k, v in {**vars(module), **module}.items() if isinstance(v, mx.array)}
        # gvpo_mlx corrects a module with a subclass of the same name
        modules[name] = facts | {"class": " of ".join(c.__name__ for c in type(module).__mro__[:2])}
        modules[name] |= {"window": getattr(module, "applied_window", None)}
    return modules


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, mx.array) and isinstance(b, mx.array):
        return a.shape == b.shape and bool(mx.allclose(a, b).item())
    return not isinstance(a, mx.array) and not isinstance(b, mx.array) and bool(a == b)


def _shown(values: dict[str, Any] | None, other: dict[str, Any]) -> str:
    """Describes the entries in which two modules differ."""
    if values is None:
        return "is not there"
    different = {k: v for k, v in values.items() if k not in other or not _equal(v, other[k])}
    parts = [f"{k.lstrip('_')} {v}" for k, v in different.items() if not isinstance(v, mx.array)]
    if any(isinstance(v, mx.array) for v in different.values()):
        parts.append("other frequencies")
    return "has " + (", ".join(parts) or "fewer settings")


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Replaces each LoRA or DoRA layer with the layer that it adapts, within the block: the base model."""
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
    """Returns (name, probability) of each dropout layer with a probability above 0."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Dropout))
    return [(name, 1 - layer._p_1) for name, layer in layers if layer._p_1 < 1]


def quantized(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Returns (name, layer) of each layer with quantized weights."""
    return [(name, module) for name, module in model.named_modules() if "scales" in module]
