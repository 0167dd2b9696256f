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
Mask = tuple[bool, ...]  # of a response's tokens: True = drawn by the policy, False = context (a tool's result, say)


@dataclass(frozen=True)
class Segment:
    """A later part of an episode: what the policy drew after the chat template had rewritten what came before."""

    prompt: Tokens  # all that the policy saw before `response`, its own earlier turns included; never scored
    response: Tokens
    mask: Mask | None = None  # see `Response.mask`

    @property
    def length(self) -> int:
        """Tokens of the policy's own."""
        return len(self.response) if self.mask is None else sum(self.mask)


@dataclass(frozen=True)
class Response:
    """One sampled response. An episode may continue in segments, which have prompts of their own."""

    tokens: Tokens  # with the sampled end token, where there is one
    finished: bool  # True: ended by an end token or a stop text; False: cut at the token limit
    mask: Mask | None = field(default=None, kw_only=True)  # the policy's own tokens. None: all
    stopped: bool = field(default=False, kw_only=True)  # by a stop text, without an end token
    later: tuple[Segment, ...] = field(default=(), kw_only=True)  # segments after `tokens`, in order

    @property
    def length(self) -> int:
        """The policy's own tokens, over all segments."""
        first = len(self.tokens) if self.mask is None else sum(self.mask)
        return first + sum(segment.length for segment in self.later)

    @property
    def all_tokens(self) -> Tokens:
        """The tokens of all segments, without the prompts of the later ones."""
        return (*self.tokens, *(token for segment in self.later for token in segment.response))


class ResponseError(ValueError):
    """A recorded response that the policy cannot score; `number` is its place among those given."""

    def __init__(self, message: str, number: int = 0) -> None:
        super().__init__(message)
        self.number = number


@dataclass(frozen=True)
class Batch:
    """N responses with their prompts, one row each; rows of a group may be anywhere, on any rank.

    Lengths come from these lists, never from comparing ids with a padding id. A token that is not the policy's own is
    an input of the model and never a target: log pi(y|x) is the sum over own tokens, of all segments of a response.
    """

    prompts: Sequence[Tokens]  # N; responses of one group share the same prompt
    responses: Sequence[Tokens]  # N, each at least one token
    groups: Sequence[int]  # N, the group's label: equal on every rank for the same group
    masks: Sequence[Mask | None] | None = None  # N, see `Response.mask`. None: every token of every response
    later: Sequence[Sequence[Segment]] | None = field(default=None, kw_only=True)  # N, see `Response.later`. None: none
    complete: bool = field(default=False, kw_only=True)  # none of its groups has a row on another rank; see `by_group`

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
        """The batch of the given rows, in the given order."""
        masks = None if self.masks is None else [self.masks[i] for i in rows]
        later = None if self.later is None else [self.later[i] for i in rows]
        prompts, responses = [self.prompts[i] for i in rows], [self.responses[i] for i in rows]
        return Batch(prompts, responses, [self.groups[i] for i in rows], masks, later=later)

    def by_segment(self) -> tuple["Batch", np.ndarray]:
        """The batch with a row for each segment, and the response of each row, (M,) int64.

        The first N rows are the first segments. Without later segments it is the batch itself.
        """
        owners = np.arange(len(self), dtype=np.int64)
        added = [(i, segment) for i, of_one in enumerate(self.later or ()) for segment in of_one]
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
    """What is wrong with the mask of a response of `tokens` tokens; None: nothing."""
    if len(mask) != tokens:
        return f"its mask has {len(mask)} entries for {tokens} tokens; expected equal numbers"
    return None if any(mask) else f"none of its {tokens} tokens is the policy's own; expected at least one"


def masks_of(responses: Sequence[Response]) -> list[Mask | None] | None:
    """`Batch.masks` of these responses: None where all their tokens are the policy's own."""
    masks = [response.mask for response in responses]
    return None if all(mask is None for mask in masks) else masks


def later_of(responses: Sequence[Response]) -> list[tuple[Segment, ...]] | None:
    """`Batch.later` of these responses: None where none has later segments."""
    later = [response.later for response in responses]
    return later if any(later) else None


Coefficients = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(logprobs (n,), rows (n,)) -> c (n,): the factor of each row's log-probability gradient.

`rows` index the batch given to `update` and must hold every row of each group that they touch."""


@dataclass(frozen=True)
class Update:
    """The result of one optimizer step."""

    logprobs: np.ndarray  # (N,) float, nats: log pi_theta of each row before the step
    gradient_norm: float  # before clipping, over all parameters and ranks
    learning_rate: float  # of this step
    tokens: int  # computed in forward passes on this rank, prompt and padding included
    peak_memory: int  # bytes, on this rank's device; resident memory of the process on CPU
    details: Mapping[str, float] = field(default_factory=dict)  # backend-specific numbers, logged unchanged


@dataclass(frozen=True)
class PolicySettings:
    """The arguments of a backend's `load`."""

    optimizer: OptimizerConfig
    updates: int
    reference: bool
    seed: int
    model: ModelConfig | None = None  # None: not loaded from a model folder


class Policy(Protocol):
    """A language model that can be sampled, scored, stepped and saved.

    A backend's `policy.py` has `load(model, optimizer, *, updates, reference, seed) -> Policy`: the two config
    sections, the optimizer steps of the whole run (for the schedule), whether `logprobs(reference=True)` will be
    asked for, and the run's seed.
    """

    rank: int
    world_size: int
    settings: PolicySettings

    @property
    def steps_taken(self) -> int:
        """Optimizer steps taken since `load`, those before a restored checkpoint included."""

    def reset(self) -> None:
        """Returns to the state that `load` gave: initial parameters, no optimizer state; every rank calls."""

    def encode(self, prompt: Prompt) -> Tokens:
        """Token ids of a prompt, with the generation prompt of the chat template for messages."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of a response, without the tokens that end it; other special tokens stay."""

    def prompt_text(self, tokens: Sequence[int]) -> str:
        """Text of a prompt, from which a server with the same tokenizer makes these token ids."""

    def encode_responses(
        self,
        prompt: Prompt,
        responses: Sequence[str | Sequence[int]],
        finished: Sequence[bool | None],
        masks: Sequence[Mask | None] | None = None,
    ) -> list[Response]:
        """Recorded responses to a prompt, each as text or token ids, by the rule of `text.encode_responses`.

        Args:
          masks: of each response, the mask of the policy's own tokens; given only where one of them is not None.
        Raises: ResponseError: one of them cannot be a response of this policy.
        """

    def generate(
        self, prompts: Sequence[Tokens], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[Response]]:
        """len(seeds[i]) responses to prompts[i]; a response depends only on its prompt, its seed and the parameters.

        The t-th token of a row is drawn with `sampling.uniforms`: the token at which the cumulative distribution, in
        vocabulary order, first exceeds the t-th number. Temperature 0 takes the most likely token.

        A policy may have `reusing_prefixes()` beside it, a context manager that every rank enters: within it, a prompt
        that begins with an earlier prompt and its response computes the rest alone. It gives an object that counts the
        tokens of prompts, `reused` and `computed`, or None where nothing is kept. Parameters do not change within.
        """

    def logprobs(self, batch: Batch, *, reference: bool = False) -> np.ndarray:
        """(N,) float: log pi(y|x) of the policy or of the reference (Eq. 5's pi_ref), nats, at temperature 1.

        Summed over the own tokens of each response (`Batch.masks`), given all tokens before them.
        """

    def renew_reference(self) -> None:
        """Makes the present policy the reference, which `save` keeps from then on; every rank calls."""

    def update(self, batch: Batch, coefficients: Coefficients, *, scored: np.ndarray | None = None) -> Update:
        """One optimizer step along -sum_i c_i grad log pi_i, exact however the batch is split or sharded.

        On several ranks each holds its own rows, perhaps none; the gradient is the sum over ranks. `coefficients`
        communicates there, so every rank calls it exactly once, with all its rows, unless world_size is 1 or the batch
        is complete. Batches are complete only for a policy with an attribute `by_group` that is True: there the
        callback may be called group by group, does not communicate, and may raise on one rank alone.

        Args:
          scored: (N,) what `logprobs(batch)` gives with the present parameters, where known: saves that pass.
        """

    def save(self, directory: Path) -> None:
        """Writes the whole state into an empty folder; every rank calls, the main rank may write alone.

        A policy may have `saving(directory)` beside it, which returns a function that writes this rank's part later, in
        another thread, without waiting for another rank, and returns the `tensor_file.Digest` of each of its files, by
        name. The run then samples the next step meanwhile, and changes nothing of the policy until the function has
        returned.

        A policy that can be copied has `save_parameters(directory)` and `load_parameters(directory)` beside it: what is
        trained alone, without moments and reference, which a policy of the same model loads that was made with
        updates = 0, on any device. It then draws as this one does. Every rank calls.
        """

    def restore(self, directory: Path) -> None:
        """Reads what `save` wrote; training then continues bit for bit."""

    def export(self, directory: Path, *, own_head: bool = False) -> None:
        """Writes a Hugging Face folder that transformers, vLLM and mlx-lm load.

        Args:
          own_head: write a head that is the embedding as a tensor of its own (lm_head.weight, tie_word_embeddings =
            false): a running vLLM server then reloads it. A policy without this argument is exported as it is.

        A policy of PyTorch may have `tensors()` beside it: an iterator of (name, tensor) of what `export` writes, which
        every rank goes through to its end and which gives them to the main rank. vLLM in the same process loads these
        without a folder, and needs `end_tokens`, the ids that end a response. `weight_channel(kind)` gives the
        `samplers.channels.Channel` that carries them to a server, `release_memory()` frees unused memory for it.
        """

    def export_adapters(self, directory: Path) -> None:
        """Writes the LoRA or DoRA adapters alone into an empty folder, in the form of peft or of mlx-lm.

        Called only where `model.lora_rank` > 0; every rank calls.

        Raises: ConfigError: adapters that the form cannot hold, or that read back otherwise.
        """

    def describe(self) -> PolicyFacts:
        """Facts for the header, the run folder and the estimate of memory."""

    def gather(self, values: np.ndarray) -> np.ndarray:
        """Concatenates the ranks' arrays in rank order along axis 0; lengths may differ. World size 1: `values`."""
