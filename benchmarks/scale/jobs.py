"""Four jobs to think with, and what a step of each costs at least: memory, FLOPs, bytes, and the time that these take.

The bounds follow from shapes and from the chips' data sheets alone. All responses have their full length R, so they are
upper bounds of the work and lower bounds of the time that this work takes. The expected times take the shares of its
peak that one H200 reached (docs/benchmarks.md).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

GIB = 2**30


@dataclass(frozen=True)
class Model:
    """A Qwen2.5 decoder."""

    name: str
    vocabulary: int
    hidden: int
    layers: int
    inner: int
    heads: int
    kv_heads: int
    tied: bool

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def linear(self) -> int:
        """Parameters in the layers' linear maps: 2 FLOPs each a token forward, 4 backward."""
        attention = self.hidden * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.inner)

    @property
    def head(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        biases = self.layers * self.head_size * (self.heads + 2 * self.kv_heads)
        norms = (2 * self.layers + 1) * self.hidden
        return self.linear + biases + norms + self.head * (1 if self.tied else 2)

    @property
    def cache_bytes(self) -> int:
        """Keys and values of a token in 16 bits."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_size


QWEN_1_5B = Model("Qwen2.5-1.5B", 151936, 1536, 28, 8960, 12, 2, True)
QWEN_3B = Model("Qwen2.5-3B", 151936, 2048, 36, 11008, 16, 2, True)
QWEN_7B = Model("Qwen2.5-7B", 152064, 3584, 28, 18944, 28, 4, False)


@dataclass(frozen=True)
class Chip:
    """Peak figures of a data sheet: dense bfloat16 FLOP/s, memory bytes and bytes/s."""

    name: str
    flops: float
    memory: float
    bandwidth: float


H100 = Chip("H100 SXM", 989e12, 80e9, 3.35e12)
V5E = Chip("TPU v5e", 197e12, 16e9, 0.819e12)
M4_MAX = Chip("M4 Max", 40 * 128 * 2 * 1.8e9, 64e9, 0.546e12)  # cores x lanes x 2 x clock: Apple publishes no FLOP/s
H200 = Chip("H200 SXM", 989e12, 141e9, 4.8e12)


@dataclass(frozen=True)
class Measured:
    """What one H200 reached with Qwen2.5-1.5B's shape; see docs/benchmarks.md.

    FLOP/s count 2 (scoring), 6 (update) and 4 (update of LoRA) a parameter and token, without attention and what is
    computed again. Sampling is of 64 prompts of 512 tokens, 8 rows each.
    """

    scoring: float
    update: float
    decoded: float  # tokens a second
    response: int  # tokens of each row
    shares: bool  # whether rows shared their prompts' keys and values


FULL = Measured(127e12, 170e12, 24_870, 2035, True)  # a step of J1
LORA = Measured(132e12, 76e12, 30_529, 128, False)  # short responses, without gradient checkpointing


@dataclass(frozen=True)
class Job:
    """One step: `prompts` groups of `responses`, prompts of `prompt` tokens, responses of `response` tokens."""

    name: str
    model: Model
    chip: Chip
    chips: int
    prompts: int
    responses: int
    prompt: int
    response: int
    lora_rank: int = 0
    sharded: bool = False
    tensor: int = 1  # chips that hold the copy to sample from together
    shares: bool = False  # a prompt's keys and values are held once for its responses, not in each row

    @property
    def rows(self) -> int:
        """Responses a chip."""
        return -(-self.prompts * self.responses // self.chips)

    @property
    def trained(self) -> int:
        """Parameters that the optimizer holds; LoRA is on every linear map of the layers."""
        if not self.lora_rank:
            return self.model.parameters
        m = self.model
        kv = m.kv_heads * m.head_size
        sizes = 2 * (m.hidden + m.hidden) + 2 * (m.hidden + kv) + 3 * (m.hidden + m.inner)
        return m.layers * self.lora_rank * sizes

    @property
    def held(self) -> float:
        """Bytes a chip of weights, gradients, moments and the reference: what a step holds whatever its rows are.

        Full: float32 masters, gradients and two moments, a reference in 16 bits. LoRA: a base in 16 bits, which is the
        reference with the adapters off, and float32 adapters with gradients and moments.
        """
        total = 2 * self.model.parameters + 16 * self.trained
        return total / (self.chips if self.sharded else 1)

    @property
    def sampling_weights(self) -> float:
        """Bytes of the copy in 16 bits that a chip samples from, beside `held`; LoRA samples from its base."""
        return 0 if self.lora_rank else 2 * self.model.parameters / self.tensor

    @property
    def cache(self) -> float:
        """Bytes a chip of keys and values, if all its rows are decoded at once."""
        holders = self.rows / self.responses if self.shares else self.rows
        return (holders * self.prompt + self.rows * self.response) * self.model.cache_bytes

    @property
    def copied(self) -> float:
        """Bytes of `cache` that hold a prompt's keys and values again, beside the first time."""
        return self.cache - replace(self, shares=True).cache

    @property
    def tokens(self) -> int:
        """Tokens of a step in packed rows: a prompt once, then all its responses."""
        return self.prompts * (self.prompt + self.responses * self.response)

    def _attended(self) -> float:
        """Pairs of a token and one that it sees."""
        of_response = self.response * (self.response + 1) / 2 + self.response * self.prompt
        return self.prompts * (self.prompt * (self.prompt + 1) / 2 + self.responses * of_response)

    @property
    def forward_flops(self) -> float:
        """Of one pass over the packed rows, with the head on what is predicted."""
        m = self.model
        predicted = self.prompts * self.responses * self.response
        attention = 4 * m.layers * m.heads * m.head_size * self._attended()
        return 2 * m.linear * self.tokens + 2 * m.head * predicted + attention

    @property
    def step_flops(self) -> float:
        """Reference forward, policy forward, backward; LoRA's backward is that of activations alone."""
        return self.forward_flops * (3 if self.lora_rank else 4)

    @property
    def sampling_bytes(self) -> float:
        """Bytes a chip reads: the weights once a token, the cache of each row once a token, a shared prompt once."""
        return self._read(self.rows / self.responses)

    def _read(self, prompts: float) -> float:
        """Bytes that sampling reads, with `prompts` prompts' keys and values a token."""
        lengths = self.response * (self.response - 1) / 2
        cached = self.rows * lengths + prompts * self.prompt * self.response
        return self.response * 2 * self.model.parameters / self.tensor + cached * self.model.cache_bytes

    @property
    def gathered(self) -> float:
        """Bytes a chip sends in an update of one micro-batch: parameters gathered in 16 bits twice, gradients reduced
        in float32 once.
        """
        if not self.sharded:
            return 0 if self.chips == 1 else 2 * 4 * self.trained
        return (self.chips - 1) / self.chips * self.model.parameters * (2 * 2 + 4)

    @property
    def sampling_seconds(self) -> float:
        """What the bytes take at peak, or the FLOPs where they take longer."""
        return max(self.sampling_bytes / self.chip.bandwidth, self.forward_flops / self.chips / self.chip.flops)

    @property
    def step_seconds(self) -> float:
        """What the FLOPs take at peak."""
        return self.step_flops / self.chips / self.chip.flops

    @property
    def measured(self) -> Measured:
        return LORA if self.lora_rank else FULL

    @property
    def expected_sampling_seconds(self) -> float:
        """A token of all rows takes what it took on the H200 beyond reading its bytes, and its own bytes at peak."""
        of = self.measured
        there = Job("", QWEN_1_5B, H200, 1, 64, 8, 512, of.response, shares=of.shares)
        beyond = there.rows / of.decoded - there._decoding_bytes / there.response / H200.bandwidth
        return self.response * beyond + self._decoding_bytes / self.chip.bandwidth

    @property
    def _decoding_bytes(self) -> float:
        """Bytes that sampling reads, of prompts in each row or once."""
        return self._read(self.rows / self.responses if self.shares else self.rows)

    @property
    def expected_step_seconds(self) -> float:
        """Reference scored, update, at the shares of peak FLOP/s that were measured."""
        work = self.model.parameters * self.tokens / self.chips
        update = (4 if self.lora_rank else 6) * work / self.measured.update
        return (2 * work / self.measured.scoring + update) * H200.flops / self.chip.flops


JOBS = (
    Job("J1 full", QWEN_1_5B, H100, 1, 64, 8, 512, 2048, shares=True),
    Job("J1 LoRA", QWEN_1_5B, H100, 1, 64, 8, 512, 2048, lora_rank=16, shares=True),
    Job("J2", QWEN_7B, H100, 8, 128, 16, 1024, 4096, sharded=True, shares=True),
    Job("J3", QWEN_7B, V5E, 16, 128, 16, 1024, 4096, sharded=True, tensor=4, shares=True),
    Job("J4", QWEN_3B, M4_MAX, 1, 8, 8, 512, 1024, lora_rank=16),
)


def table() -> str:
    """The jobs and their bounds in Markdown."""
    return "\n".join(_rows())


def _rows() -> Iterator[str]:
    yield "| | " + " | ".join(job.name for job in JOBS) + " |"
    yield "|---|" + "---:|" * len(JOBS)
    for title, value in {
        "model": lambda j: j.model.name,
        "chips": lambda j: f"{j.chips} x {j.chip.name}",
        "prompts x responses": lambda j: f"{j.prompts} x {j.responses}",
        "P, R tokens": lambda j: f"{j.prompt}, {j.response}",
        "parameters": lambda j: f"{j.model.parameters / 1e9:.2f} B",
        "trained parameters": lambda j: f"{j.trained / 1e9:.3f} B",
        "held per chip: weights, gradients, moments, reference": lambda j: f"{j.held / GIB:.1f} GiB",
        "copy to sample from": lambda j: f"{j.sampling_weights / GIB:.1f} GiB",
        "cache of all rows at once": lambda j: f"{j.cache / GIB:.1f} GiB",
        "of which copies of prompts": lambda j: f"{j.copied / GIB:.1f} GiB, {j.copied / j.cache:.1%}",
        "tokens of a step, packed": lambda j: f"{j.tokens / 1e6:.2f} M",
        "FLOPs: reference, forward, backward": lambda j: f"{j.step_flops:.2e}",
        "bytes read to sample, per chip": lambda j: f"{j.sampling_bytes / 1e12:.1f} TB",
        "sent per chip and micro-batch": lambda j: f"{j.gathered / 1e9:.1f} GB",
        "sampling, at least": lambda j: f"{j.sampling_seconds:.0f} s",
        "reference and update, at least": lambda j: f"{j.step_seconds:.0f} s",
        "sampling, expected": lambda j: f"{j.expected_sampling_seconds:.0f} s",
        "reference and update, expected": lambda j: f"{j.expected_step_seconds:.0f} s",
    }.items():
        yield f"| {title} | " + " | ".join(value(job) for job in JOBS) + " |"


if __name__ == "__main__":
    print(table())
