"""What a run will take of memory, reckoned before it starts, and what the device has."""

import logging
import os
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

if TYPE_CHECKING:
    from gvpo_mlx.policy import MLXPolicy

log = logging.getLogger("gvpo.mlx")
GIB = 2**30


def count(lm: nn.Module) -> int:
    """Parameters of the model, quantized ones as many as they stand for."""
    total = 0
    for module in lm.modules():
        for key, value in module.items():
            if isinstance(value, mx.array) and not key.startswith("_") and key not in ("scales", "biases"):
                packed = key == "weight" and "scales" in module
                total += value.size * 32 // module.bits if packed else value.size
    return total


def held(lm: nn.Module) -> int:
    """Bytes of the model's arrays."""
    return sum(v.nbytes for module in lm.modules() for v in module.values() if isinstance(v, mx.array))


def available(device: mx.Device) -> int:
    """Bytes that the device may hold: Metal's recommended working set, the machine's memory on CPU."""
    if device.type == mx.gpu:
        info = mx.device_info(device)
        return int(info.get("max_recommended_working_set_size") or info.get("memory_size") or 0)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def for_cache(device: mx.Device) -> int:
    """Bytes for the key-value cache of generation: half of what is free, on CPU at most a gibibyte."""
    free = (available(device) - mx.get_active_memory()) // 2
    return max(0, free) if device.type == mx.gpu else max(0, min(GIB, free))


def allow_wired(device: mx.Device) -> None:
    """On Metal, lets the model stay resident up to the recommended working set; elsewhere there is no such limit."""
    if device.type == mx.gpu and mx.metal.is_available():
        mx.set_wired_limit(int(mx.device_info(device)["max_recommended_working_set_size"]))


def estimate(policy: "MLXPolicy") -> dict[str, int]:
    """Bytes by purpose.

    A layer takes about 32 arrays of its width and 6 of its inner width for each token of a micro-batch, forward and
    backward (measured on a tiny Llama on CPU, conformance/test_mlx_models.py); where layers are recomputed, one of them
    takes that at a time, the others one array each. The head's chunk counts ten times (logprobs.py says why).
    """
    from gvpo_mlx.logprobs import CPU_CHUNK_BYTES, DEVICE_CHUNK_BYTES

    scorer, c = policy.scorer, policy.scorer.config
    width, layers = c.get("hidden_size") or 0, len(scorer.lm.layers)
    inner = c.get("intermediate_size") or 4 * width
    a_layer = 32 * width + 6 * inner
    kept = layers * width + a_layer if policy.config.gradient_checkpointing else layers * a_layer
    chunk = DEVICE_CHUNK_BYTES if policy.device.type == mx.gpu else CPU_CHUNK_BYTES
    trained = sum(p.nbytes for p in scorer.parameters)
    return {
        "model": held(scorer.lm),
        "reference": held(policy._reference.lm) if policy._reference else 0,
        "gradients": trained,
        "optimizer": 2 * trained,
        "activations": policy.optimizer_config.micro_batch_tokens * kept * scorer.dtype.size,
        "head": 10 * chunk,
    }


def report(policy: "MLXPolicy") -> None:
    """Logs the estimate; a warning with advice where the device has less."""
    parts = estimate(policy)
    total, has = sum(parts.values()), available(policy.device)
    text = ", ".join(f"{name} {_size(size)}" for name, size in parts.items() if size)
    log.info("on %s; memory by estimate: %s (%s), of %s", policy.device, _size(total), text, _size(has))
    if has and total > has:
        log.warning(
            "the run is estimated to take %s and the device has %s: %s", _size(total), _size(has), _advice(policy)
        )


def _advice(policy: "MLXPolicy") -> str:
    advice: list[Any] = [f"lower optimizer.micro_batch_tokens ({policy.optimizer_config.micro_batch_tokens})"]
    if not policy.config.gradient_checkpointing:
        advice.append("set model.gradient_checkpointing = true")
    if not policy.config.lora_rank:
        advice.append("set model.lora_rank (adapters need no second copy of the model)")
    if not any("scales" in module for module in policy.scorer.lm.modules()):
        advice.append("take a model quantized to 4 bits, with model.lora_rank")
    return "; ".join(advice)


def _size(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
