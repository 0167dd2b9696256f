"""The `Policy` protocol that backends implement, and its plain data types.

The loop has no tensors; a policy has all of them. Arguments and results are NumPy arrays and lists of token ids, so one
loop drives PyTorch, JAX, MLX and the NumPy table.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gvpo_core.training.config import ModelConfig, OptimizerConfig
from gvpo_core.training.policy.facts import PolicyFacts
from gvpo_core.training.sampling import Sampling

Prompt = str | Sequence[Mapping[str, Any]]  # text, or chat messages for the model's chat template
Tokens = tuple[int, ...]
Mask = tuple[bool, ...]  # of a response's tokens: True = drawn by the policy, False = context, such as a tool's result


@dataclass(frozen=True)
class Segment:
    """A later part of an episode. It begins when the chat template rewrites the turns before it."""

    prompt: Tokens  # everything the policy saw before `response`, including its own earlier turns; never scored
    response: Tokens
    mask: Mask | None = None  # see `Response.mask`

    @property
    def length(self) -> int:
        """Number of the policy's own tokens."""
        return len(self.response) if self.mask is None else sum(self.mask)


@dataclass(frozen=True)
class Response:
    """One sampled response. An episode may continue in later segments, each with its own prompt."""

    tokens: Tokens  # including the sampled end token, if any
    finished: bool  # True: ended by an end token or a stop text; False: cut at the token limit
    mask: Mask | None = field(default=None, kw_only=True)  # the policy's own tokens. None: all
    stopped: bool = field(default=False, kw_only=True)  # ended by a stop text, without an end token
    later: tuple[Segment, ...] = field(default=(), kw_only=True)  # segments after `tokens`, in order

    @property
    def length(self) -> int:
        """Number of the policy's own tokens, over all segments."""
        first = len(self.tokens) if self.mask is None else sum(self.mask)
        return first + sum(segment.length for segment in self.later)

    @property
    def all_tokens(self) -> Tokens:
        """The tokens of all segments, without the prompts of later segments."""
        return (*self.tokens, *(token for segment in self.later for token in segment.response))


class ResponseError(ValueError):
    """A recorded response that the policy cannot score; `number` is its index among the given responses."""

    def __init__(self, message: str, number: int = 0) -> None:
        super().__init__(message)
        self.number = number


@dataclass(frozen=True)
class Batch:
    """N responses with their prompts, one row each. Rows of a group may have any place and be on any rank.

    Lengths come from these lists, never from comparing ids with a padding id. A token that is not the policy's own is
    an input of the model and never a target: log pi(y|x) is the sum over own tokens, over all segments of a response.
    """

    prompts: Sequence[Tokens]  # N; responses of one group share the same prompt
    responses: Sequence[Tokens]  # N, each at least one token
    groups: Sequence[int]  # N group labels; a group has the same label on every rank
    masks: Sequence[Mask | None] | None = None  # N, see `Response.mask`. None: every token of every response
    later: Sequence[Sequence[Segment]] | None = field(default=None, kw_only=True)  # N, see `Response.later`. None: none
    complete: bool = field(default=False, kw_only=True)  # no group has a row on another rank; see `by_group`

    def __post_init__(self) -> None:
        if not len(self.prompts) == len(self.responses) == len(self.groups):
            raise ValueError(
                f"batch has {len(self.prompts)} prompts, {len(self.responses)} responses and {len(self.groups)} groups"
            )
        for i, (prompt, response) in enumerate(zip(self.prompts, self.responses, strict=True)):
            if not prompt or not response:
                raise ValueError(f"batch row {i} has an empty {'prompt' if not prompt else 'response'}")
        if self.masks is not None:
            self._check_masks(self.masks)
        if self.later is not None and len(self.later) != len(self.responses):
            raise ValueError(f"batch has {len(self.responses)} responses and later segments of {len(self.later)}")

    def _check_masks(self, masks: Sequence[Mask | None]) -> None:
        if len(masks) != len(self.responses):
            raise ValueError(f"batch has {len(self.responses)} responses and {len(masks)} masks of own tokens")
        for i, (response, mask) in enumerate(zip(self.responses, masks, strict=True)):
            if mask is not None and (problem := mask_problem(mask, len(response))):
                raise ValueError(f"batch row {i}: {problem}")

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: Sequence[int]) -> "Batch":
        """Returns a batch of the given rows, in the given order."""
        masks = None if self.masks is None else [self.masks[i] for i in rows]
        later = None if self.later is None else [self.later[i] for i in rows]
        prompts, responses = [self.prompts[i] for i in rows], [self.responses[i] for i in rows]
        return Batch(prompts, responses, [self.groups[i] for i in rows], masks, later=later)

    def by_segment(self) -> tuple["Batch", np.ndarray]:
        """Returns a batch with one row for each segment, and the response index of each row, (M,) int64.

        The first N rows are the first segments. Without later segments, returns the batch itself.
        """
        owners = np.arange(len(self), dtype=np.int64)
        added = [(i, segment) for i, segments in enumerate(self.later or ()) for segment in segments]
        if not added:
            return self, owners
        batch = Batch(
            [*self.prompts, *(segment.prompt for _, segment in added)],
            [*self.responses, *(segment.response for _, segment in added)],
            [*self.groups, *(self.groups[i] for i, _ in added)],
            [*(self.masks or [None] * len(self)), *(segment.mask for _, segment in added)],
            complete=self.complete,
        )
        return batch, np.concatenate([owners, np.asarray([i for i, _ in added], np.int64)])


def mask_problem(mask: Sequence[object], tokens: int) -> str | None:
    """Says what is wrong with the mask of a response of `tokens` tokens; None if the mask is valid."""
    if len(mask) != tokens:
        return f"its mask has {len(mask)} entries for {tokens} tokens; expected equal numbers"
    return None if any(mask) else f"none of its {tokens} tokens is the policy's own; expected at least one"


def masks_of(responses: Sequence[Response]) -> list[Mask | None] | None:
    """`Batch.masks` of these responses; None if all their tokens are the policy's own."""
    masks = [response.mask for response in responses]
    return None if all(mask is None for mask in masks) else masks


def later_of(responses: Sequence[Response]) -> list[tuple[Segment, ...]] | None:
    """`Batch.later` of these responses; None if no response has later segments."""
    later = [response.later for response in responses]
    return later if any(later) else None


Coefficients = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(logprobs (n,), rows (n,)) -> c (n,): the factor of each row's log-probability gradient.

`rows` are indices into the batch given to `update`. They must include every row of each group that they touch."""


@dataclass(frozen=True)
class Update:
    """The result of one optimizer step."""

    logprobs: np.ndarray  # (N,) float, nats: log pi_theta of each row before the step
    gradient_norm: float  # before clipping, over all parameters and ranks
    learning_rate: float  # of this step
    tokens: int  # computed in forward passes on this rank, including prompts and padding
    peak_memory: int  # bytes, on this rank's device; on CPU, resident memory of the process
    details: Mapping[str, float] = field(default_factory=dict)  # backend-specific numbers, logged unchanged


@dataclass(frozen=True)
class PolicySettings:
    """The arguments of a backend's `load`."""

    optimizer: OptimizerConfig
    updates: int
    reference: bool
    seed: int
    model: ModelConfig | None = None  # None: the policy was not loaded from a model folder


class Policy(Protocol):
    """A language model that can be sampled, scored, stepped and saved.

    A backend's `policy.py` has `load(model, optimizer, *, updates, reference, seed) -> Policy`. Its arguments are the
    two config sections, the number of optimizer steps of the whole run (for the schedule), whether
    `logprobs(reference=True)` will be called, and the run's seed.
    """

    rank: int
    world_size: int
    settings: PolicySettings

    @property
    def steps_taken(self) -> int:
        """Optimizer steps taken since `load`, including steps before a restored checkpoint."""

    def reset(self) -> None:
        """Restores the state after `load`: initial parameters, no optimizer state. Every rank calls this."""

    def encode(self, prompt: Prompt) -> Tokens:
        """Token ids of a prompt. For messages, they include the generation prompt of the chat template."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of a response, without the tokens that end it. Keeps other special tokens."""

    def prompt_text(self, tokens: Sequence[int]) -> str:
        """Text of a prompt. A server with the same tokenizer encodes it to these token ids."""

    def encode_responses(
        self,
        prompt: Prompt,
        responses: Sequence[str | Sequence[int]],
        finished: Sequence[bool | None],
        masks: Sequence[Mask | None] | None = None,
    ) -> list[Response]:
        """Encodes recorded responses to a prompt, each as text or token ids; see `text.encode_responses`.

        Args:
          masks: for each response, the mask of the policy's own tokens. Passed only if at least one is not None.
        Raises: ResponseError: one of them cannot be a response of this policy.
        """

    def generate(
        self, prompts: Sequence[Tokens], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[Response]]:
        """Draws len(seeds[i]) responses to prompts[i].

        A response depends only on its prompt, its seed and the parameters. The t-th token of a row is drawn with
        `sampling.uniforms`: the token at which the cumulative distribution, in vocabulary order, first exceeds the t-th
        number. Temperature 0 takes the most likely token.

        A policy may also have `reusing_prefixes()`, a context manager that every rank enters. Inside it, a prompt that
        begins with an earlier prompt and its response reuses their keys and values and computes only the rest. It
        yields an object that counts the tokens of prompts, `reused` and `computed`, or None if nothing is kept.
        Parameters must not change inside it.
        """

    def logprobs(self, batch: Batch, *, reference: bool = False) -> np.ndarray:
        """(N,) float: log pi(y|x) of the policy or of the reference (pi_ref in Eq. 5), nats, at temperature 1.

        The sum over the own tokens of each response (`Batch.masks`), given all tokens before them.
        """

    def renew_reference(self) -> None:
        """Makes the current policy the reference; from then on `save` includes it. Every rank calls this."""

    def update(self, batch: Batch, coefficients: Coefficients, *, scored: np.ndarray | None = None) -> Update:
        """Takes one optimizer step along -sum_i c_i grad log pi_i, exact however the batch is split or sharded.

        With several ranks, each rank holds its own rows, or none; the gradient is the sum over ranks. `coefficients`
        then communicates between ranks, so every rank calls it exactly once, with all its rows. There are two
        exceptions: world_size is 1, or the batch is complete. Batches are complete only for a policy with an attribute
        `by_group` that is True. Then the callback may be called group by group, does not communicate, and may raise on
        a single rank.

        Args:
          scored: (N,) the result of `logprobs(batch)` with the current parameters, if known. It saves that pass.
        """

    def save(self, directory: Path) -> None:
        """Writes the whole state into an empty folder. Every rank calls this; the main rank may be the only writer.

        A policy may also have `saving(directory)`. It returns a function that writes this rank's part later, in another
        thread, without waiting for another rank. The function returns the `tensor_file.Digest` of each of its files, by
        name. Meanwhile the run samples the next step. It does not change the policy until the function has returned.

        A policy that can be copied also has `save_parameters(directory)` and `load_parameters(directory)`. They write
        and read the trained parameters only, without moments and reference. A policy of the same model that was loaded
        with updates = 0, on any device, can read them and then draws like this one. Every rank calls them.
        """

    def restore(self, directory: Path) -> None:
        """Reads what `save` wrote. Training then continues bit for bit."""

    def export(self, directory: Path, *, own_head: bool = False) -> None:
        """Writes a Hugging Face folder that transformers, vLLM and mlx-lm load.

        Args:
          own_head: write a tied head as a separate tensor (lm_head.weight, tie_word_embeddings = false), so that a
            running vLLM server reloads it. A policy without this argument is exported unchanged.

        A PyTorch policy may also have `tensors()`, an iterator of (name, tensor) over what `export` writes. Every rank
        must exhaust it; only the main rank receives the tensors. vLLM in the same process loads these without a
        folder, and needs `end_tokens`, the ids that end a response. `weight_channel(kind)` returns the
        `samplers.channels.Channel` that carries the tensors to a server; `release_memory()` frees unused memory for it.
        """

    def export_adapters(self, directory: Path) -> None:
        """Writes only the LoRA or DoRA adapters into an empty folder, in the format of peft or mlx-lm.

        Called only if `model.lora_rank` > 0. Every rank calls this.

        Raises: ConfigError: the format cannot hold the adapters, or they differ when read back.
        """

    def describe(self) -> PolicyFacts:
        """Returns facts for the header, the run folder and the memory estimate."""

    def gather(self, values: np.ndarray) -> np.ndarray:
        """Concatenates the ranks' arrays in rank order along axis 0. Lengths may differ. With one rank: `values`."""
