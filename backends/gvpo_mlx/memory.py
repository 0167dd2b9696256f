"""The memory that a model needs, for the core's estimate of a run, and the memory that the device has."""

import os
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from gvpo_core.training.config import ModelConfig
from gvpo_core.training.policy import MemoryFacts

if TYPE_CHECKING:
    from gvpo_mlx.model import Scorer

GIB = 2**30
FRAMEWORK = 150 * 2**20  # process with MLX, mlx-lm and transformers imported; measured: 100 MiB on CPU
KEPT, RECOMPUTED = (20, 6), (48, 10)
"""Numbers that a layer stores per token, as multiples of its width and its inner width. KEPT: from the forward to the
backward pass. RECOMPUTED: at most while a layer is recomputed. Measured on tiny Llamas
(conformance/backends/test_mlx_memory.py)."""
CACHE_STEP = 256  # tokens by which mlx-lm's caches grow


def count(lm: nn.Module) -> int:
    """Number of parameters of the model; a quantized weight counts as the parameters that it represents."""
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
    """Memory limit of the device in bytes: Metal's recommended working set, or the machine's memory on CPU."""
    if device.type == mx.gpu:
        info = mx.device_info(device)
        return int(info.get("max_recommended_working_set_size") or info.get("memory_size") or 0)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def for_cache(device: mx.Device) -> int:
    """Bytes for the key-value cache of sampling: half of the free memory, on CPU at most 1 GiB."""
    free = (available(device) - mx.get_active_memory()) // 2
    return max(0, free) if device.type == mx.gpu else max(0, min(GIB, free))


def cache_tokens(scorer: "Scorer", device: mx.Device) -> int:
    """Returns how many tokens of key-value cache fit in a quarter of the free memory, on CPU at most 512 MiB."""
    c = scorer.config
    heads = c.get("num_key_value_heads") or c.get("num_attention_heads") or 1
    width = c.get("head_dim") or (c.get("hidden_size") or 1) // (c.get("num_attention_heads") or 1)
    token = 2 * len(scorer.lm.layers) * heads * width * scorer.dtype.size
    return max(1, for_cache(device) // (2 * token))  # a layer's cache exists twice while it grows


def peak() -> int:
    """Returns the peak memory in bytes since the last call."""
    most = mx.get_peak_memory()
    mx.reset_peak_memory()
    return most


def allow_wired(device: mx.Device) -> None:
    """Raises Metal's limit for resident memory to the recommended working set. Other devices have no such limit."""
    if device.type == mx.gpu and mx.metal.is_available():
        mx.set_wired_limit(int(mx.device_info(device)["max_recommended_working_set_size"]))


def facts(scorer: "Scorer", config: ModelConfig, tokens: int, device: mx.Device) -> MemoryFacts | None:
    """Returns the sizes for the core's estimate of memory; None for a model whose sizes have other names.

    Args:
      tokens: tokens of a micro-batch.
    """
    from gvpo_mlx.logprobs import CPU_CHUNK_BYTES, DEVICE_CHUNK_BYTES

    c, lm, narrow = scorer.config, scorer.lm, scorer.dtype.size
    hidden, heads, vocabulary = c.get("hidden_size"), c.get("num_attention_heads"), c.get("vocab_size")
    inner = (c.get("moe_intermediate_size") or 0) * (c.get("num_experts_per_tok") or 0) or c.get("intermediate_size")
    if not (hidden and heads and vocabulary and inner):
        return None
    of_hidden, of_inner = RECOMPUTED if config.gradient_checkpointing else KEPT
    on_gpu, quantized = device.type == mx.gpu, any("scales" in module for module in lm.modules())
    return MemoryFacts(
        layers=len(lm.layers),
        hidden=hidden,
        intermediate=inner,
        heads=heads,
        kv_heads=c.get("num_key_value_heads") or heads,
        head_dim=c.get("head_dim") or hidden // heads,
        device=available(device) if on_gpu else None,
        framework=FRAMEWORK,
        # About ten chunks are live at once, or fewer if the micro-batch has few tokens; see logprobs.py.
        head=min(10 * (DEVICE_CHUNK_BYTES if on_gpu else CPU_CHUNK_BYTES), 3 * tokens * vocabulary * 4),
        cache=for_cache(device) // 2,
        cache_step=CACHE_STEP,
        block=(of_hidden * hidden + of_inner * inner) * narrow,
        frozen=held(lm) - sum(p.nbytes for p in scorer.parameters),
        advice="" if quantized else "take a model quantized to 4 bits, with model.lora_rank",
    )
