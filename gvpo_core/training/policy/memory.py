"""Estimates the memory of a run from the policy's facts and the settings, and finds the available memory.

Parameters, AdamW's moments and the reference are held throughout. A step also holds its sampling state (the
cache of keys and values) or its training state (gradients, activations of one micro-batch, a chunk of the head).
docs/training.md compares the estimate with measurements.
"""

import os
import re
import sys
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gvpo_core.training.config import Config
from gvpo_core.training.policy import Batch
from gvpo_core.training.policy.facts import MemoryFacts, PolicyFacts
from gvpo_core.training.policy.layout import Splitting, plan_rows
from gvpo_core.training.policy.step import HELD_MICRO_BATCHES, held_part

_WIDE = 4  # bytes of a float32


class Memory(NamedTuple):
    """Bytes on one device, by purpose."""

    framework: int
    parameters: int
    reference: int
    optimizer: int
    gradients: int  # without those that replace freed activations in a step of one micro-batch
    activations: int  # of the largest micro-batch, including memory that the allocator keeps
    head: int  # a chunk of logits, and the gradients of the head's and the embedding's weights
    sampling: int  # keys, values and logits of the rows decoded together, and weights held only for sampling
    teacher: int = 0  # of a teacher on the same device
    copy: int = 0  # of a copy of the policy that draws ahead, in its own process on the same device

    @property
    def peak(self) -> int:
        """The most that is held at once. A step first samples, then learns."""
        learning = self.gradients + self.activations + self.head
        permanent = self.framework + self.parameters + self.reference + self.optimizer + self.teacher + self.copy
        return permanent + max(learning, self.sampling)


def estimate_memory(
    facts: PolicyFacts, config: Config, prompt_tokens: int, teacher: PolicyFacts | None = None
) -> Memory | None:
    """Estimates the memory of one device of a rank, or of all devices that a CPU simulates.

    Args:
      facts: result of `Policy.describe`.
      prompt_tokens: length of the longest prompt.
      teacher: result of `describe` of a teacher that this process has loaded. Counts only on the policy's device.
    Returns: the estimate; None if the facts do not have the model's sizes.
    """
    if facts.memory is None or facts.vocabulary is None:
        return None
    m, vocabulary = facts.memory, facts.vocabulary
    ranks, total, trained = facts.ranks, facts.parameters, facts.trainable_parameters
    narrow = 2 if facts.dtype == "bfloat16" else _WIDE
    frozen = total - trained
    split = ranks if config.model.sharding == "fsdp" else m.split
    separate = config.objective.reference == "initial" and not config.model.lora_rank
    tokens, attention, held, single = _largest(m, facts.layout == "packed", config, prompt_tokens, ranks)
    embedding = 0 if config.model.lora_rank else vocabulary * m.hidden * _WIDE
    inputs = held * m.layers * m.hidden * _WIDE
    kept = int((tokens * _per_token(m, config, narrow) + attention * narrow + inputs) * m.allocator) * m.devices

    def share(size: int) -> int:
        return size * m.devices // split

    gradients = share(trained * _WIDE)
    casts = total * narrow if narrow < _WIDE and trained == total else 0  # kept from forward to backward
    parameter_bytes = trained * _WIDE + (frozen * narrow if m.frozen is None else m.frozen)
    parameters = share(parameter_bytes)
    reference = share(total * narrow + 2 * vocabulary * m.hidden * (_WIDE - narrow)) if separate else 0
    if config.model.lora_rank and config.objective.reference_every:  # adapters of the reference
        reference = share(trained * _WIDE)
    optimizer = share(2 * trained * _WIDE if m.moments is None else m.moments)
    taught = 0
    if teacher is not None and teacher.device == facts.device:
        taught = share(_held(teacher))
    left = None if m.device is None else m.device - m.framework - parameters - reference - optimizer - taught
    sampling = _sampling(m, vocabulary, config, prompt_tokens, ranks, narrow, left)
    copied = 0
    if config.rollout.ahead and config.rollout.sampler == "policy" and _beside(config, facts):
        weights = total * narrow if trained == total else parameter_bytes
        copied = m.framework + weights * m.devices // m.split + sampling  # a full copy, also of a sharded model
    return Memory(
        framework=m.framework,
        parameters=parameters,
        reference=reference,
        optimizer=optimizer,
        gradients=max(0, gradients - kept) if single else gradients,
        activations=kept + (casts if m.split == 1 else share(casts)),
        head=(m.head + 2 * embedding) * m.devices if m.split == 1 else m.head * m.devices + share(2 * embedding),
        sampling=sampling,
        teacher=taught,
        copy=copied,
    )


def _beside(config: Config, facts: PolicyFacts) -> bool:
    """Whether the copy that draws ahead is on the policy's device. A device without a number is the first one."""
    device, *policys = (
        (*name.split(":"), "0")[:2] for name in (config.rollout.ahead_device, facts.device, config.model.device)
    )
    return not config.rollout.ahead_device or device in policys


def _held(teacher: PolicyFacts) -> int:
    """Bytes of the parameters of a model that is not trained, over all its shards."""
    frozen = teacher.parameters - teacher.trainable_parameters
    narrow = 2 if teacher.dtype == "bfloat16" else _WIDE
    exact = teacher.memory.frozen if teacher.memory is not None else None
    return teacher.trainable_parameters * _WIDE + (frozen * narrow if exact is None else exact)


def _per_token(m: MemoryFacts, config: Config, narrow: int) -> int:
    """Bytes that a token's forward pass keeps for the backward pass: those of a Llama block, times the blocks."""
    queries = m.heads * m.head_dim
    # Each of two norms keeps its input and the normalised input in float32, and passes on a third tensor. Attention
    # keeps queries, keys and values (repeated to the number of heads) and its result twice. The feed-forward part keeps
    # four tensors of its width.
    block = 4 * m.hidden * _WIDE + (2 * m.hidden + 5 * queries + 4 * m.intermediate) * narrow
    block = block if m.block is None else m.block
    return m.layers * m.hidden * _WIDE + block if config.model.gradient_checkpointing else m.layers * block


def _largest(
    m: MemoryFacts, packed: bool, config: Config, prompt_tokens: int, ranks: int
) -> tuple[int, int, int, bool]:
    """Plans the micro-batches of a step as the backends do, with rows of the greatest length.

    Returns: tokens of the largest micro-batch; entries of its attention masks over all layers; further tokens for which
      a deferred backward pass holds layer inputs; whether it is the only micro-batch.
    """
    rollout, optimizer = config.rollout, config.optimizer
    prompts = max(1, rollout.prompts // config.objective.minibatches // (ranks * m.parts))
    # More groups than fit in one micro-batch do not change its size.
    row = prompt_tokens + rollout.max_tokens - 1
    prompts = min(prompts, optimizer.micro_batch_tokens // row + 2)
    prompt, count = (0,) * prompt_tokens, prompts * rollout.responses
    responses = [(i, *(0,) * (rollout.max_tokens - 1)) for i in range(count)]  # without common beginnings
    batch = Batch([prompt] * count, responses, [i // rollout.responses for i in range(count)])
    filled = _filled(batch, packed, config, m) if m.fills else 0
    hidden = 0 if m.in_blocks else m.hidden
    parts = m.parts if m.fills else 1
    limits = (optimizer.micro_batch_tokens * parts, optimizer.micro_batch_responses * parts)
    splitting = Splitting(packed, *limits, hidden)
    together = (ranks == 1 or m.defers) and optimizer.strategy == "group"
    complete, rest = splitting.groups(batch) if together else ([], list(range(count)))
    group = splitting.rows(batch, rest[: rollout.responses]) if rest and together and m.defers else []
    group = held_part(group, HELD_MICRO_BATCHES * splitting.tokens)
    held = sum(len(rows) * rows[0].length for rows in group[:-1])  # the last one keeps its activations
    if m.fills:
        return filled, 0, held // parts, False
    sizes = [(len(rows), rows[0].length) for rows in complete + splitting.rows(batch, rest)]
    tokens = max(rows * width for rows, width in sizes)
    layers = 1 if config.model.gradient_checkpointing else m.layers
    masks = layers * max(rows * width**2 for rows, width in sizes) if packed and not m.in_blocks else 0
    return tokens, masks, held, len(sizes) == 1


def _filled(batch: Batch, packed: bool, config: Config, m: MemoryFacts) -> int:
    """Tokens in a device's part of a micro-batch with filled rows.

    Filled rows have the length of the budget, halved as often as the longest row still fits.
    """
    budget, responses = config.optimizer.micro_batch_tokens, config.optimizer.micro_batch_responses
    hidden = 0 if m.in_blocks else m.hidden
    rows = plan_rows(batch, packed=packed, tokens=budget, responses=responses, hidden_size=hidden)
    longest, length = max(row.length for row in rows), budget
    while length // 2 >= longest:
        length //= 2
    filled = -(-sum(row.length for row in rows) // length)
    return min(1 << (filled - 1).bit_length(), max(1, budget // length)) * max(length, longest)


def _sampling(
    m: MemoryFacts, vocabulary: int, config: Config, prompt_tokens: int, ranks: int, narrow: int, left: int | None
) -> int:
    """Bytes of the rows decoded together: all rows of this rank, or as many as fit in the backend's limit."""
    rollout = config.rollout
    rows = -(-rollout.prompts * rollout.responses // (ranks * (m.parts if m.devices == 1 else 1)))
    token = 2 * m.layers * m.kv_heads * m.head_dim * narrow
    logits = vocabulary * 28  # one float32, and three float64 while a token is drawn
    room = None if m.cache_share is None or left is None else int(m.cache_share * (left - m.sampled))
    if m.shares_prompts:
        prompt_of_row = [row // rollout.responses for row in range(rows)]
        prompt, response = prompt_tokens * token, rollout.max_tokens * token + logits
        rows, prompts = rows_at_once(prompt_of_row, prompt, response, room)
        return prompts * prompt + rows * response + m.sampled
    row = -(-(prompt_tokens + rollout.max_tokens) // m.cache_step) * m.cache_step * token
    if m.cache is not None:
        rows = max(1, min(rows, m.cache // row))
    if room is not None:
        rows = max(1, min(rows, room // (row + logits)))
    return rows * (row + logits) + m.sampled


def rows_at_once(prompts: Sequence[int], prompt: int, response: int, room: int | None) -> tuple[int, int]:
    """Returns how many rows, and how many prompts, are decoded together if a prompt is held once for all its rows.

    If some rows must wait, there is room for three times the prompts that begin together. Rows of one prompt end at
    different times, and the prompt is held until its last row has ended.

    Args:
      prompts: prompt number of each row, from 0, in the order in which rows begin; rows of one prompt are adjacent.
      prompt, response: size of a prompt, and of a row without its prompt, in the unit of `room`.
      room: limit for both together; None: no limit.
    Returns: (rows, prompts), at least one of each.
    """
    prompt_of_row = np.asarray(prompts)
    all_rows, all_prompts = len(prompt_of_row), int(prompt_of_row[-1]) + 1
    if room is None or all_prompts * prompt + all_rows * response <= room:
        return all_rows, all_prompts

    def prompts_held(rows: int) -> int:
        together = int((prompt_of_row[rows - 1 :] - prompt_of_row[: all_rows - rows + 1]).max()) + 1
        return min(rows, 3 * together, all_prompts)

    sizes = range(1, all_rows + 1)
    rows = max(1, bisect_right(sizes, room, key=lambda rows: prompts_held(rows) * prompt + rows * response))
    return rows, prompts_held(rows)


def peak_memory() -> int:
    """Returns the peak resident memory of this process, bytes.

    On Linux it comes from /proc, since `ru_maxrss` there starts at the value of the parent process.
    """
    try:
        status = Path("/proc/self/status").read_bytes()  # the script's name in it may end inside a character
        match = re.search(rb"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    except OSError:  # not Linux
        match = None
    if match:
        return int(match[1]) * 1024
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available_memory(facts: PolicyFacts) -> int | None:
    """Bytes of the device, or bytes that a process may take on this machine; None: not known."""
    return facts.memory.device if facts.memory is not None and facts.memory.device else machine_memory()


def machine_memory() -> int | None:
    """Bytes that a process may take on this machine; None: not known."""
    try:
        limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (ValueError, OSError, AttributeError):  # not on every system
        limits = []
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # no such control group, or "max"
            continue
    return min(limits, default=None)


def advice(facts: PolicyFacts, config: Config) -> str:
    """Suggests settings that reduce the memory of a run and are not used yet."""
    steps = [f"lower optimizer.micro_batch_tokens ({config.optimizer.micro_batch_tokens})"]
    steps += [] if config.model.gradient_checkpointing else ["set model.gradient_checkpointing = true"]
    steps += [] if config.model.lora_rank else ["set model.lora_rank (then the reference needs no copy)"]
    steps += [facts.memory.advice] if facts.memory is not None and facts.memory.advice else []
    return "; ".join(steps)


def in_words(memory: Memory, available: int | None, ranks: int = 1) -> str:
    """Formats the estimate for the header: the peak, the available memory, and the parts held at the peak."""
    learning = ("gradients", "activations", "head")
    absent = learning if memory.sampling > sum(getattr(memory, name) for name in learning) else ("sampling",)
    parts = [f"{name} {gib(size)}" for name, size in memory._asdict().items() if size and name not in absent]
    have = f" of {gib(available)}" if available else ""
    return f"{gib(memory.peak)}{have} GiB{f' a rank, {ranks} ranks' if ranks > 1 else ''}: {', '.join(parts)}"


def gib(size: int) -> str:
    """Formats bytes as GiB with two decimals."""
    return f"{size / 2**30:.2f}"
