"""What a policy says of itself: `PolicyFacts`, and `MemoryFacts` for the estimate of a run's memory."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FRAMEWORK_BYTES = 450 * 2**20  # a process that has imported a framework, or a CUDA context with its libraries


@dataclass(frozen=True, kw_only=True)
class MemoryFacts:
    """The model's sizes, and what one device holds; see `memory.estimate_memory`."""

    layers: int
    hidden: int
    intermediate: int  # what one token passes, of all its experts
    heads: int
    kv_heads: int
    head_dim: int
    device: int | None = None  # bytes that the device has; None: the machine's memory
    framework: int = FRAMEWORK_BYTES  # bytes of the process before a model is loaded
    head: int = 0  # bytes of a chunk of logits
    cache: int | None = None  # bytes of keys and values that generation takes at most; None: no limit
    cache_share: float | None = None  # of the device that nothing else holds: what generation takes at most; None: all
    sampled: int = 0  # bytes of weights that are held only while responses are drawn
    cache_step: int = 1  # tokens by which a row's keys and values grow
    shares_prompts: bool = False  # while sampling a prompt's keys and values are held once for all its rows
    block: int | None = None  # bytes that a token of a layer keeps for the backward pass; None: as a Llama in PyTorch
    frozen: int | None = None  # bytes of the parameters that are not trained; None: all in model.dtype
    moments: int | None = None  # bytes of the optimizer's state; None: two float32 moments of what is trained
    split: int = 1  # devices over which each parameter, its gradient and its moments are cut
    parts: int = 1  # devices over which a rank's rows are cut; micro_batch_tokens is of each
    devices: int = 1  # in the memory that is counted: 1, or all that a CPU simulates
    in_blocks: bool = False  # attention of packed rows is computed by blocks: without a mask, whatever a row's length
    fills: bool = False  # rows are filled with several prompts, see `memory._filled`, and keep no attention scores
    allocator: float = 1.0  # by how many times what is kept for the backward pass the process grows
    defers: bool = False  # a group in several micro-batches goes forward once; see `StepPlan.deferred`
    advice: str = ""  # what else makes a run of this backend take less


@dataclass(frozen=True, kw_only=True)
class PolicyFacts:
    """Facts for the console's header and environment.json. Empty and None: not known, and left out there."""

    backend: str
    architecture: str = ""
    device: str = ""
    device_name: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)  # a backend's own facts, by name
    ranks: int = 1
    sharding: str = ""  # how ranks share the model
    dtype: str = ""  # of products
    end_tokens: str = ""
    context: int | None = None  # positions that the model is made for
    parameters: int = 0  # over all ranks
    trainable_parameters: int = 0
    layout: str = ""  # packed or plain
    layout_reason: str = ""
    vocabulary: int | None = None  # token ids are below it
    versions: Mapping[str, str] = field(default_factory=dict)  # library -> version
    memory: MemoryFacts | None = None  # None: memory is not estimated

    def as_dict(self) -> dict[str, Any]:
        """All known facts as plain data, including the entries of `details`."""
        known: dict[str, Any] = {}
        for name, value in dataclasses.asdict(self).items():
            if name == "details":
                known |= value
            elif value not in (None, "", {}):
                known[name] = value
        return known
