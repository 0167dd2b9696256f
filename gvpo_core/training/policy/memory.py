"""How much memory a run will take, by arithmetic from the policy's facts and the settings, and how much there is.

Parameters, AdamW's moments and the reference are held throughout. A step also holds its sampling state (the
cache of keys and values) or its training state (gradients, activations of one micro-batch, a chunk of the head).
docs/training.md compares it with measurements.
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
    """Bytes on one device, by what they are for."""

    framework: int
    parameters: int
    reference: int
    optimizer: int
    gradients: int  # not counted: those that replace freed activations in a step of one micro-batch
    activations: int  # of the largest micro-batch, with what the allocator keeps back
    head: int  # a chunk of logits, and the gradient of the head's and embedding's weights
    sampling: int  # keys, values and logits of the rows that are decoded together, and weights for it alone
    teacher: int = 0  # of a teacher on the same device
    copy: int = 0  # of the process of a copy of the policy that draws ahead, on the same device

    @property
    def peak(self) -> int:
        """The most that is held at once: a step samples, then learns."""
        learning = self.gradients + self.activations + self.head
        held = self.framework + self.parameters + self.reference + self.optimizer + self.teacher + self.copy
        return held + max(learning, self.sampling)


def estimate_memory(
    facts: PolicyFacts, config: Config, prompt_tokens: int, teacher: PolicyFacts | None = None
) -> Memory | None:
    """The memory of one of a rank's devices, or of all that a CPU simulates.

    Args:
      facts: what `Policy.describe` gives.
      prompt_tokens: length of the longest prompt.
      teacher: what `describe` of a teacher gives that this process has loaded; it counts on the policy's device alone.
    Returns: None where the facts say nothing of the model's sizes.
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
    held_parameters = trained * _WIDE + (frozen * narrow if m.frozen is None else m.frozen)
    parameters = share(held_parameters)
    reference = share(total * narrow + 2 * vocabulary * m.hidden * (_WIDE - narrow)) if separate else 0
    if config.model.lora_rank and config.objective.reference_every:  # the adapters of the reference
        reference = share(trained * _WIDE)
    optimizer = share(2 * trained * _WIDE if m.moments is None else m.moments)
    taught = 0
    if teacher is not None and teacher.device == facts.device:
        taught = share(_held(teacher))
    left = None if m.device is None else m.device - m.framework - parameters - reference - optimizer - taught
    sampling = _sampling(m, vocabulary, config, prompt_tokens, ranks, narrow, left)
    copied = 0
    if config.rollout.ahead and config.rollout.sampler == "policy" and _beside(config, facts):
        weights = total * narrow if trained == total else held_parameters
        copied = m.framework + weights * m.devices // m.split + sampling  # ranks that shard the model have whole copies
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
    """Whether the copy that draws ahead is on the policy's device; a device without a number is the first one."""
    device, *policys = (
        (*name.split(":"), "0")[:2] for name in (config.rollout.ahead_device, facts.device, config.model.device)
    )
    return not config.rollout.ahead_device or device in policys


def _held(teacher: PolicyFacts) -> int:
    """Bytes of the parameters of a model that is not trained, of one process or of all shards."""
    frozen = teacher.parameters - teacher.trainable_parameters
    narrow = 2 if teacher.dtype == "bfloat16" else _WIDE
    exact = teacher.memory.frozen if teacher.memory is not None else None
    return teacher.trainable_parameters * _WIDE + (frozen * narrow if exact is None else exact)


def _per_token(m: MemoryFacts, config: Config, narrow: int) -> int:
    """Bytes that a token's forward pass keeps for its backward pass: what a Llama block saves, times the blocks."""
    queries = m.heads * m.head_dim
    # Two norms keep their input and its normalised form in float32 and hand on a third; attention keeps queries, keys
    # and values (repeated to as many heads) and its result twice; the feed-forward part keeps four of its width.
    block = 4 * m.hidden * _WIDE + (2 * m.hidden + 5 * queries + 4 * m.intermediate) * narrow
    block = block if m.block is None else m.block
    return m.layers * m.hidden * _WIDE + block if config.model.gradient_checkpointing else m.layers * block


def _largest(
    m: MemoryFacts, packed: bool, config: Config, prompt_tokens: int, ranks: int
) -> tuple[int, int, int, bool]:
    """(tokens, entries of attention masks over all layers) of the largest micro-batch, the tokens whose layer inputs a
    deferred backward pass holds beside it, and whether it is the only one.

    Planned as the backends do, with rows as long as they can be.
    """
    rollout, optimizer = config.rollout, config.optimizer
    prompts = max(1, rollout.prompts // config.objective.minibatches // (ranks * m.parts))
    # Beyond those of one micro-batch groups change nothing but that there are more.
    row = prompt_tokens + rollout.max_tokens - 1
    prompts = min(prompts, optimizer.micro_batch_tokens // row + 2)
    prompt, count = (0,) * prompt_tokens, prompts * rollout.responses
    responses = [(i, *(0,) * (rollout.max_tokens - 1)) for i in range(count)]  # that have no beginning in common
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
    """Tokens of a device's part of a micro-batch with filled rows, which are as long as the budget, halved as often as
    the longest row still fits."""
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
    """Bytes of the rows that are decoded together: all of this rank's, or as many as the backend's limit holds."""
    rollout = config.rollout
    rows = -(-rollout.prompts * rollout.responses // (ranks * (m.parts if m.devices == 1 else 1)))
    token = 2 * m.layers * m.kv_heads * m.head_dim * narrow
    logits = vocabulary * 28  # in float32, and in float64 thrice while a token is drawn
    room = None if m.cache_share is None or left is None else int(m.cache_share * (left - m.sampled))
    if m.shares_prompts:
        of = [row // rollout.responses for row in range(rows)]
        prompt, response = prompt_tokens * token, rollout.max_tokens * token + logits
        rows, prompts = rows_at_once(of, prompt, response, room)
        return prompts * prompt + rows * response + m.sampled
    row = -(-(prompt_tokens + rollout.max_tokens) // m.cache_step) * m.cache_step * token
    if m.cache is not None:
        rows = max(1, min(rows, m.cache // row))
    if room is not None:
        rows = max(1, min(rows, room // (row + logits)))
    return rows * (row + logits) + m.sampled


def rows_at_once(prompts: Sequence[int], prompt: int, response: int, room: int | None) -> tuple[int, int]:
    """How many rows are decoded together where a prompt is held once for its rows, and how many prompts that takes.

    Where rows wait for others to end, room is left for three times the prompts that begin together: rows of one prompt
    end at different times, and the prompt is held until the last one has.

    Args:
      prompts: of each row, in the order in which rows begin; those of one prompt follow one another, numbered from 0.
      prompt, response: what a prompt takes, and a row beside its prompt, in the unit of `room`.
      room: what both may take; None: no limit.
    Returns: (rows, prompts), at least one of each.
    """
    of = np.asarray(prompts)
    every = (len(of), int(of[-1]) + 1)
    if room is None or every[1] * prompt + every[0] * response <= room:
        return every

    def held(rows: int) -> int:
        together = int((of[rows - 1 :] - of[: len(of) - rows + 1]).max()) + 1
        return min(rows, 3 * together, every[1])

    sizes = range(1, len(of) + 1)
    rows = max(1, bisect_right(sizes, room, key=lambda rows: held(rows) * prompt + rows * response))
    return rows, held(rows)


def peak_memory() -> int:
    """Bytes that this process has had in memory at most.

    On Linux from /proc: there `ru_maxrss` of a process begins with what the one that started it had.
    """
    try:
        status = Path("/proc/self/status").read_bytes()  # a script's name in it may be cut within a character
        match = re.search(rb"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    except OSError:  # not Linux
        match = None
    if match:
        return int(match[1]) * 1024
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available_memory(facts: PolicyFacts) -> int | None:
    """Bytes that the device has, or a process of the machine may take; None: not known."""
    return facts.memory.device if facts.memory is not None and facts.memory.device else machine_memory()


def machine_memory() -> int | None:
    """Bytes that a process of this machine may take; None: not known."""
    try:
        known = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (ValueError, OSError, AttributeError):  # not on every system
        known = []
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            known.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # no such control group, or "max"
            continue
    return min(known, default=None)


def advice(facts: PolicyFacts, config: Config) -> str:
    """What makes a run take less, of the settings that are not taken yet."""
    steps = [f"lower optimizer.micro_batch_tokens ({config.optimizer.micro_batch_tokens})"]
    steps += [] if config.model.gradient_checkpointing else ["set model.gradient_checkpointing = true"]
    steps += [] if config.model.lora_rank else ["set model.lora_rank (then the reference needs no copy)"]
    steps += [facts.memory.advice] if facts.memory is not None and facts.memory.advice else []
    return "; ".join(steps)


def in_words(memory: Memory, available: int | None, ranks: int = 1) -> str:
    """The estimate for the header: the peak, the available memory, and the parts held at the peak."""
    learning = ("gradients", "activations", "head")
    absent = learning if memory.sampling > sum(getattr(memory, name) for name in learning) else ("sampling",)
    parts = [f"{name} {gib(size)}" for name, size in memory._asdict().items() if size and name not in absent]
    have = f" of {gib(available)}" if available else ""
    return f"{gib(memory.peak)}{have} GiB{f' a rank, {ranks} ranks' if ranks > 1 else ''}: {', '.join(parts)}"


def gib(size: int) -> str:
    """Bytes as GiB with two decimals."""
    return f"{size / 2**30:.2f}"
