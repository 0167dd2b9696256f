"""Facts about a loaded policy: `PolicyFacts`, and `MemoryFacts` for the estimate of a run's memory."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FRAMEWORK_BYTES = 450 * 2**20  # a process that has imported a framework, or a CUDA context with its libraries


@dataclass(frozen=True, kw_only=True)
class MemoryFacts:
    """Sizes of the model and of what one device holds; see `memory.estimate_memory`."""

    layers: int
    hidden: int
    intermediate: int  # width used by one token, summed over its experts
    heads: int
    kv_heads: int
    head_dim: int
    device: int | None = None  # bytes of the device; None: the machine's memory is used
    framework: int = FRAMEWORK_BYTES  # bytes that the process takes before a model is loaded
    head: int = 0  # bytes of a chunk of logits
    cache: int | None = None  # bytes of keys and values that generation may take; None: no limit
    cache_share: float | None = None  # share of the device's free memory that generation may take; None: all
    sampled: int = 0  # bytes of weights held only while responses are drawn
    cache_step: int = 1  # a row's keys and values grow by this many tokens at a time
    shares_prompts: bool = False  # sampling holds a prompt's keys and values once for all its rows
    block: int | None = None  # bytes kept for the backward pass, per token and layer; None: as a Llama in PyTorch
    frozen: int | None = None  # bytes of the frozen parameters; None: all in model.dtype
    moments: int | None = None  # bytes of the optimizer's state; None: two float32 moments per trained parameter
    split: int = 1  # devices over which each parameter, its gradient and its moments are sharded
    parts: int = 1  # devices over which a rank's rows are split; micro_batch_tokens applies to each
    devices: int = 1  # devices that share the counted memory: 1, or all devices that a CPU simulates
    in_blocks: bool = False  # attention of packed rows is computed in blocks, without a mask at any row length
    fills: bool = False  # rows hold several prompts, see `memory._filled`, and keep no attention scores
    allocator: float = 1.0  # growth of the process over the bytes kept for the backward pass, as a factor
    defers: bool = False  # a group in several micro-batches goes forward once; see `StepPlan.deferred`
    advice: str = ""  # further ways to reduce the memory of a run with this backend


@dataclass(frozen=True, kw_only=True)
class PolicyFacts:
    """Facts for the console's header and environment.json. Empty or None: not known, and left out there."""

    backend: str
    architecture: str = ""
    device: str = ""
    device_name: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)  # a backend's own facts, by name
    ranks: int = 1
    sharding: str = ""  # how ranks share the model
    dtype: str = ""  # that matrix products are computed in
    end_tokens: str = ""
    context: int | None = None  # positions that the model supports
    parameters: int = 0  # over all ranks
    trainable_parameters: int = 0
    layout: str = ""  # packed or plain
    layout_reason: str = ""
    vocabulary: int | None = None  # all token ids are smaller
    versions: Mapping[str, str] = field(default_factory=dict)  # library -> version
    memory: MemoryFacts | None = None  # None: memory is not estimated

    def as_dict(self) -> dict[str, Any]:
        """Returns all known facts as plain data, including the entries of `details`."""
        known: dict[str, Any] = {}
        for name, value in dataclasses.asdict(self).items():
            if name == "details":
                known |= value
            elif value not in (None, "", {}):
                known[name] = value
        return known
