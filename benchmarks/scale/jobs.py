"""Four example jobs, and the least that a step of each costs: memory, FLOPs, bytes and time.

The bounds follow from shapes and the chips' data sheets alone. All responses have their full length R. So the work is
an upper bound, and the time is a lower bound for this work. Expected times use the shares of peak that one H200
reached (docs/benchmarks.md).
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
        """Parameters in the layers' linear maps. Each takes 2 FLOPs per token forward and 4 backward."""
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
        """Bytes of a token's keys and values in 16 bits."""
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
    """Rates that one H200 reached with Qwen2.5-1.5B's shape; see docs/benchmarks.md.

    FLOP/s count 2 (scoring), 6 (update) and 4 (LoRA update) FLOPs per parameter and token, without attention and
    recomputation. Sampling is of 64 prompts of 512 tokens, 8 rows each.
    """

    scoring: float
    update: float
    decoded: float  # tokens a second
    response: int  # tokens of each row
    shares: bool  # whether rows share their prompt's keys and values


FULL = Measured(127e12, 170e12, 24_870, 2035, True)  # a step of J1
LORA = Measured(132e12, 76e12, 30_529, 128, False)  # short responses, without gradient checkpointing


@dataclass(frozen=True)
class Job:
    """One step: `prompts` groups of `responses` responses, with `prompt` tokens per prompt, `response` per response."""

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
    tensor: int = 1  # chips that share one sampling copy
    shares: bool = False  # a prompt's keys and values are held once for all its responses, not in each row

    @property
    def rows(self) -> int:
        """Responses per chip."""
        return -(-self.prompts * self.responses // self.chips)

    @property
    def trained(self) -> int:
        """Parameters that the optimizer updates. LoRA adapts every linear map of the layers."""
        if not self.lora_rank:
            return self.model.parameters
        m = self.model
        kv = m.kv_heads * m.head_size
        sizes = 2 * (m.hidden + m.hidden) + 2 * (m.hidden + kv) + 3 * (m.hidden + m.inner)
        return m.layers * self.lora_rank * sizes

    @property
    def held(self) -> float:
        """Bytes per chip of weights, gradients, moments and the reference, which do not depend on the rows.

        Full: float32 masters, gradients and two moments, and a reference in 16 bits. LoRA: a base in 16 bits, which is
        also the reference (adapters off), and float32 adapters with gradients and moments.
        """
        total = 2 * self.model.parameters + 16 * self.trained
        return total / (self.chips if self.sharded else 1)

    @property
    def sampling_weights(self) -> float:
        """Bytes per chip of the 16-bit sampling copy, in addition to `held`. LoRA samples from its base."""
        return 0 if self.lora_rank else 2 * self.model.parameters / self.tensor

    @property
    def cache(self) -> float:
        """Bytes per chip of keys and values, if all its rows are decoded at once."""
        holders = self.rows / self.responses if self.shares else self.rows
        return (holders * self.prompt + self.rows * self.response) * self.model.cache_bytes

    @property
    def copied(self) -> float:
        """Bytes of `cache` with further copies of a prompt's keys and values."""
        return self.cache - replace(self, shares=True).cache

    @property
    def tokens(self) -> int:
        """Tokens of a step in packed rows: each prompt once, then all its responses."""
        return self.prompts * (self.prompt + self.responses * self.response)

    def _attended(self) -> float:
        """Number of pairs of a token and a token that it attends to."""
        of_response = self.response * (self.response + 1) / 2 + self.response * self.prompt
        return self.prompts * (self.prompt * (self.prompt + 1) / 2 + self.responses * of_response)

    @property
    def forward_flops(self) -> float:
        """FLOPs of one pass over the packed rows, with the head on predicted tokens only."""
        m = self.model
        predicted = self.prompts * self.responses * self.response
        attention = 4 * m.layers * m.heads * m.head_size * self._attended()
        return 2 * m.linear * self.tokens + 2 * m.head * predicted + attention

    @property
    def step_flops(self) -> float:
        """FLOPs of reference forward, policy forward and backward. LoRA's backward pass is for activations only."""
        return self.forward_flops * (3 if self.lora_rank else 4)

    @property
    def sampling_bytes(self) -> float:
        """Bytes that a chip reads: for each token, the weights, the cache of each row, and each shared prompt once."""
        return self._read(self.rows / self.responses)

    def _read(self, prompts: float) -> float:
        """Bytes that sampling reads if each token reads the keys and values of `prompts` prompts."""
        lengths = self.response * (self.response - 1) / 2
        cached = self.rows * lengths + prompts * self.prompt * self.response
        return self.response * 2 * self.model.parameters / self.tensor + cached * self.model.cache_bytes

    @property
    def gathered(self) -> float:
        """Bytes that a chip sends in an update of one micro-batch.

        Parameters are gathered twice in 16 bits, gradients reduced once in float32.
        """
        if not self.sharded:
            return 0 if self.chips == 1 else 2 * 4 * self.trained
        return (self.chips - 1) / self.chips * self.model.parameters * (2 * 2 + 4)

    @property
    def sampling_seconds(self) -> float:
        """Time for the bytes or for the FLOPs at peak, whichever is longer."""
        return max(self.sampling_bytes / self.chip.bandwidth, self.forward_flops / self.chips / self.chip.flops)

    @property
    def step_seconds(self) -> float:
        """Time for the FLOPs at peak."""
        return self.step_flops / self.chips / self.chip.flops

    @property
    def measured(self) -> Measured:
        return LORA if self.lora_rank else FULL

    @property
    def expected_sampling_seconds(self) -> float:
        """Time to sample, from the H200's measured time.

        For each token of all rows: the measured time minus the H200's time to read its bytes, plus the time to read
        this job's bytes at peak.
        """
        rates = self.measured
        measured_job = Job("", QWEN_1_5B, H200, 1, 64, 8, 512, rates.response, shares=rates.shares)
        reading = measured_job._decoding_bytes / measured_job.response / H200.bandwidth
        beyond_reading = measured_job.rows / rates.decoded - reading
        return self.response * beyond_reading + self._decoding_bytes / self.chip.bandwidth

    @property
    def _decoding_bytes(self) -> float:
        """Bytes that sampling reads, with prompts in each row or shared."""
        return self._read(self.rows / self.responses if self.shares else self.rows)

    @property
    def expected_step_seconds(self) -> float:
        """Time to score the reference and update, at the measured shares of peak FLOP/s."""
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
    """Returns the jobs and their bounds as a Markdown table."""
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
