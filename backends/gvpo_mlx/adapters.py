"""LoRA and DoRA on mlx-lm's layers: adds them with a seed, disables them for the reference, merges them for exports."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from gvpo_core.training.config import ConfigError, ModelConfig


def add_adapters(lm: nn.Module, config: ModelConfig, seed: int) -> None:
    """Freezes the model and adds adapters to the linear layers that `model.lora_targets` names.

    As in peft and mlx-lm, lora_a is uniform in +-1/sqrt(inputs), drawn from the seed, and lora_b is zero.

    Raises: ConfigError: a target matches nothing, or a layer does not support this kind of adapter.
    """
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
    from mlx_lm.tuner.utils import linear_to_lora_layers

    lm.freeze()
    kinds = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)
    names = {name for layer in lm.layers for name, module in layer.named_modules() if isinstance(module, kinds)}
    keys = names
    if config.lora_targets != ("all-linear",):
        keys = {name for name in names for t in config.lora_targets if name == t or name.endswith(f".{t}")}
        for target in config.lora_targets:
            if not any(name == target or name.endswith(f".{target}") for name in keys):
                raise ConfigError(
                    f"model.lora_targets has {target!r}, which is not a linear layer of {config.path!r}; it "
                    f"has {', '.join(sorted(names))}"
                )
    alpha = config.lora_alpha or 2 * config.lora_rank
    settings = {"rank": config.lora_rank, "scale": alpha / config.lora_rank, "dropout": 0.0, "keys": keys}
    try:
        linear_to_lora_layers(lm, len(lm.layers), settings, use_dora=config.lora_kind == "dora")
    except ValueError as error:
        raise ConfigError(f"model.lora_kind = {config.lora_kind} cannot adapt {config.path!r}: {error}") from error
    key = mx.random.key(seed % 2**63)
    for _, module in adapted(lm):
        key, layer_key = mx.random.split(key)
        inputs = module.lora_a.shape[-1] if module.lora_a.ndim == 3 else module.lora_a.shape[0]
        bound = 1 / math.sqrt(inputs)
        module.lora_a = mx.random.uniform(-bound, bound, module.lora_a.shape, key=layer_key)


def adapted(lm: nn.Module) -> list[tuple[str, Any]]:
    """Returns the layers with adapters as (name, layer), in a fixed order."""
    return sorted((name, module) for name, module in lm.named_modules() if "lora_a" in module)


@contextlib.contextmanager
def switched_off(lm: nn.Module) -> Iterator[None]:
    """Removes the adapters while the context is open."""
    layers = adapted(lm)
    lm.update_modules(tree_unflatten([(name, module.linear) for name, module in layers]))
    try:
        yield
    finally:
        lm.update_modules(tree_unflatten(layers))


def merged(lm: nn.Module) -> Iterator[tuple[str, mx.array]]:
    """Yields the model's tensors under its own names, adapters merged, quantized ones unpacked. Changes nothing."""
    for name, module in lm.named_modules():
        base_name = name.removesuffix(".linear")
        if base_name != name and "lora_a" in _at(lm, base_name):
            continue
        if "lora_a" in module:
            fused = _fused(module)
            yield from ((f"{name}.{key}", fused[key]) for key in ("weight", "bias") if key in fused)
            continue
        for key, value in module.items():
            if not isinstance(value, mx.array) or key.startswith("_"):
                continue
            quantized = "scales" in module
            if quantized and key in ("scales", "biases"):
                continue
            if quantized and key == "weight":
                value = _dense(module)
            yield f"{name}.{key}" if name else key, value


def _fused(module: Any) -> Any:
    """Returns the layer with its adapter merged in, unpacked. Quantized weights and the adapter are summed in float32.

    mlx-lm's `fuse` sums in the dtype of the scales, which loses a change of a thousandth of a weight.
    """
    from mlx_lm.models.switch_layers import SwitchLinear

    packed = module.linear
    if "scales" not in packed:
        return module.fuse(dequantize=True)
    plain = nn.Linear(1, 1, bias=False) if packed.weight.ndim == 2 else SwitchLinear(1, 1, 1, bias=False)
    plain.weight = _dense(packed)
    if "bias" in packed:
        plain.bias = packed.bias
    try:
        module.linear = plain
        return module.fuse(dequantize=True)
    finally:
        module.linear = packed


def _dense(packed: Any) -> mx.array:
    """Returns the weight that a quantized layer represents, exactly, in float32."""
    options = (packed.group_size, packed.bits, packed.mode)
    return mx.dequantize(packed.weight, packed.scales, packed.get("biases"), *options).astype(mx.float32)


def _at(lm: nn.Module, path: str) -> Any:
    module: Any = lm
    for part in path.split("."):
        module = module[int(part)] if isinstance(module, list) else module[part]
    return module
