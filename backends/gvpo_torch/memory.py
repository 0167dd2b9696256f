"""The memory that a model needs, for the core's estimate of a run, and the memory that the device has."""

from typing import Any

import torch

from gvpo_core.training.policy import MemoryFacts
from gvpo_core.training.policy.memory import machine_memory, peak_memory
from gvpo_torch.adapters import mergeable
from gvpo_torch.logprobs import CPU_TILE_BYTES, DEVICE_TILE_BYTES
from gvpo_torch.model import Scorer, cast_parameters
from gvpo_torch.quantized import frozen_bytes, packed_layers

CPU_CACHE_BYTES = 2**30  # for keys and values; a layer's are held twice while they grow


def facts(
    scorer: Scorer, device: torch.device, defers: bool = False, sampled: int = 0, moments: int | None = None
) -> MemoryFacts | None:
    """Returns the sizes for the core's estimate of memory; None for a model whose sizes have other names.

    Args:
      sampled: bytes of weights that are held only while sampling.
      moments: bytes of the optimizer's state; None: two float32 moments.
    """
    sizes = shape(scorer)
    if sizes is None:
        return None
    sizes |= {"sampled": sampled, "moments": moments, "frozen": frozen_bytes(scorer), "in_blocks": scorer.in_blocks}
    if device.type == "cuda":  # head: a tile of logprobs.py
        total = torch.cuda.get_device_properties(device).total_memory
        sizes |= {"cache_share": 0.5, "shares_prompts": scorer.decodes_fixed}
        return MemoryFacts(**sizes, device=total, head=DEVICE_TILE_BYTES, defers=defers)
    # malloc returns little of a step's freed memory to the system: measured on SmolLM2 and on a smaller model
    return MemoryFacts(**sizes, head=CPU_TILE_BYTES, cache=CPU_CACHE_BYTES // 2, allocator=1.7, defers=defers)


def merged(scorer: Scorer, device: torch.device) -> int:
    """Returns the bytes of the layers' merged weights, which sampling uses if they fit in a quarter of the memory.

    0: sampling uses the unmerged adapters. Decides by total memory, not by free memory, so that a resumed run does the
    same.
    """
    size = mergeable(scorer.lm)
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else machine_memory()
    return size if total is None or 4 * size <= total else 0


def narrowed(scorer: Scorer) -> int:
    """Returns the bytes of the layers' weights in the dtype of products, which sampling holds beside wider ones."""
    return sum(p.numel() for *_, p in cast_parameters(scorer)) * scorer.dtype.itemsize


def gathered(scorer: Scorer) -> int:
    """Returns the bytes of a sharded model's gathered parameters, which sampling holds beside the shards."""
    casts = sum(p.numel() * (p.dtype.itemsize - scorer.dtype.itemsize) for *_, p in cast_parameters(scorer))
    return sum(p.numel() * p.dtype.itemsize for p in scorer.parameters()) - casts


def cache_tokens(scorer: Scorer, device: torch.device) -> int:
    """Returns how many tokens of key-value cache fit in half of the free device memory (a gibibyte on CPU)."""
    sizes = shape(scorer) or {"layers": 32, "kv_heads": 1, "head_dim": 4096}
    token = 2 * sizes["layers"] * sizes["kv_heads"] * sizes["head_dim"] * scorer.dtype.itemsize
    free = CPU_CACHE_BYTES
    if device.type == "cuda":  # memory that the caching allocator has reserved and does not use is free too
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = (torch.cuda.mem_get_info(device)[0] + idle) // 2
    return max(1, free // (2 * token))  # growing a cache or dropping rows holds a layer twice


def count(scorer: Scorer) -> tuple[int, int]:
    """Returns the numbers of all parameters and of trained parameters."""
    counts = {True: 0, False: 0}
    packed = {id(layer.weight): layer.shape.numel() for layer in packed_layers(scorer).values()}
    for p in scorer.parameters():
        counts[p.requires_grad] += packed.get(id(p), p.numel())
    return sum(counts.values()), counts[True]


def peak(device: torch.device) -> int:
    """Returns the peak memory in bytes since the last call; on CPU, of the process since its start."""
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return most
    return peak_memory()


def shape(scorer: Scorer) -> dict[str, Any] | None:
    """Returns the model's sizes under the names of `MemoryFacts`; None if its configuration has other names.

    If layers have different sizes, the largest counts.
    """
    try:
        layers = [_layer_shape(layer) for layer in getattr(scorer.config, "per_layer_config", None) or [scorer.config]]
        sizes = {name: max(layer[name] for layer in layers) for name in layers[0]}
        return {"layers": scorer.config.num_hidden_layers} | sizes
    except (AttributeError, TypeError, IndexError):
        return None


def _layer_shape(c: Any) -> dict[str, int]:
    heads = c.num_attention_heads
    width = getattr(c, "head_dim", None) or c.hidden_size // heads
    kv_heads = getattr(c, "num_key_value_heads", None) or heads
    if getattr(c, "kv_lora_rank", None):  # the cache of latent attention holds keys and values of all heads
        width, kv_heads = c.qk_nope_head_dim + c.qk_rope_head_dim, heads
    experts = getattr(c, "num_experts_per_tok", None)
    inner = getattr(c, "moe_intermediate_size", None) if experts else None
    inner = experts * inner if inner else c.intermediate_size
    inner = max(inner) if isinstance(inner, (list, tuple)) else inner
    sizes = {"hidden": c.hidden_size, "intermediate": inner}
    return sizes | {"heads": heads, "kv_heads": kv_heads, "head_dim": width}
