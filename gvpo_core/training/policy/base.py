"""`LanguageModelPolicy`: the part of a language model's policy that needs no tensors.

A backend subclasses it and adds the computations of its framework; docs/new_backend.md lists them.
"""

import abc
import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from gvpo_core.training.config import ConfigError, ModelConfig, OptimizerConfig
from gvpo_core.training.config.backends import refuse_settings
from gvpo_core.training.files.disk import anchored
from gvpo_core.training.policy import checkpoint, hugging_face, text
from gvpo_core.training.policy.facts import MemoryFacts, PolicyFacts
from gvpo_core.training.policy.layout import Splitting
from gvpo_core.training.policy.prefixes import Prefixes
from gvpo_core.training.policy.protocol import (
    Batch,
    Coefficients,
    Mask,
    PolicySettings,
    Prompt,
    Response,
    Tokens,
    Update,
)
from gvpo_core.training.policy.ranks import agree
from gvpo_core.training.policy.segments import firsts, sharing_beginnings, spread, summed
from gvpo_core.training.policy.step import HELD_MICRO_BATCHES, ByGroup, StepPlan, learning_rate, plan_step
from gvpo_core.training.sampling import Sampling


class RanksOfBackend(Protocol):
    """This process among the run's processes."""

    rank: int
    world_size: int
    auto_dtype: str  # the dtype that model.dtype = "auto" selects on its device

    def gather(self, values: np.ndarray) -> np.ndarray:
        """See `Policy.gather`."""
        ...


class OneRank:
    """The only process of a run, for a backend without ranks."""

    rank, world_size, auto_dtype = 0, 1, "float32"

    def __init__(self, config: ModelConfig) -> None:
        """Accepts any device."""

    def gather(self, values: np.ndarray) -> np.ndarray:
        """Returns `values`: there is no other process."""
        return values


class LanguageModelPolicy(abc.ABC):
    """A `gvpo_core.training.policy.Policy`. A subclass adds the abstract members."""

    backend: ClassVar[str]  # its name in run.backend
    by_group: ClassVar[bool] = False  # supports complete batches: computes coefficients by group, and settles errors

    folder: Path  # of the model
    tokenizer: Any
    _end: list[int]  # ids that end a response
    packed: bool  # set by `_load`: a row holds a prompt once, then its responses
    layout_reason: str
    defers: bool = False  # set by `_load`: `_update` goes through `StepPlan.deferred`
    lockstep: bool = False  # set by `_load`: ranks synchronise at every pass, and layers are recomputed anyway
    _splitting: Splitting
    _prefixes: Prefixes | None = None  # for `_generate`, inside `reusing_prefixes`
    _in_rollout: bool = False  # inside `reusing_prefixes`, where weights may be prepared for sampling
    _keeps_nothing: str | None = None  # result of `_why_no_prefixes`; None: not called yet

    def __init__(
        self,
        config: ModelConfig,
        optimizer: OptimizerConfig,
        ranks: Callable[[ModelConfig], RanksOfBackend],
        *,
        updates: int,
        reference: bool,
        seed: int,
    ) -> None:
        """Joins the ranks and reads the tokenizer; the subclass then calls `_load`.

        Raises: ConfigError: the settings, the device or the folder cannot be used.
        """
        refuse_settings(config, self.backend, optimizer)
        self.settings = PolicySettings(optimizer, updates, reference, seed, config)
        self._ranks = ranks(config)
        dtype: Any = getattr(self._ranks, "auto_dtype", "float32") if config.dtype == "auto" else config.dtype
        self.config, self.optimizer_config = replace(config, dtype=dtype), optimizer
        self.rank, self.world_size = self._ranks.rank, self._ranks.world_size
        self._read_tokenizer()
        self.config = replace(self.config, path=anchored(config.path))
        self.frozen = updates == 0 and not config.lora_rank  # only scores and samples: no moments, all in model.dtype
        self.steps_taken = 0
        self.renewed = False  # the reference is no longer the initial model

    # -- what a backend implements

    @property
    @abc.abstractmethod
    def architecture(self) -> str:
        """Name of the model's class, for checkpoints and the log."""

    @abc.abstractmethod
    def _load(self) -> None:
        """Loads model, reference and optimizer, and sets `packed`, `layout_reason` and `_splitting`."""

    @abc.abstractmethod
    def _unload(self) -> None:
        """Frees what `_load` created."""

    @abc.abstractmethod
    def _generate(
        self, prompts: Sequence[Tokens], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[Response]]:
        """See `Policy.generate`."""

    def _cache_tokens(self) -> int:
        """Number of tokens whose keys and values sampling may hold. A backend that can keep prefixes overrides it."""
        return 0

    def _why_no_prefixes(self) -> str:
        """Says why `_generate` cannot keep keys and values in `_prefixes`; empty if a check has shown that it can."""
        return f"gvpo_{self.backend} keeps no keys and values"

    def _weights_for_sampling(self) -> contextlib.AbstractContextManager[None]:
        """Prepares the weights for `_generate`, once for all turns of a rollout."""
        return contextlib.nullcontext()

    @abc.abstractmethod
    def _logprobs(self, batch: Batch, reference: bool = False) -> tuple[np.ndarray, int]:
        """Scores a batch without later segments.

        Returns: (N,) float64 log-probabilities, nats; the tokens computed, including padding.
        """

    @abc.abstractmethod
    def _renew_reference(self) -> None:
        """Keeps a copy of the trained parameters as the reference, for `_logprobs`, `_save` and `_restore`."""

    @abc.abstractmethod
    def _update(self, batch: Batch, plan: StepPlan, coefficients: Coefficients, rate: float) -> Update:
        """Computes and clips the gradient of a planned step, and takes AdamW's step at learning rate `rate`."""

    @abc.abstractmethod
    def export(self, directory: Path, *, own_head: bool = False) -> None:
        """See `Policy.export`. Creates the folder."""

    def export_adapters(self, directory: Path) -> None:
        """See `Policy.export_adapters`. A backend that supports model.lora_rank overrides it."""
        raise ConfigError(f"gvpo_{self.backend} has no adapters to export")

    @abc.abstractmethod
    def describe(self) -> PolicyFacts:
        """See `Policy.describe`. `_describe` adds the facts that all backends share."""

    @abc.abstractmethod
    def _save(self, directory: Path, header: dict[str, Any]) -> None:
        """Writes parameters and moments, the reference if `self.renewed`, then `header`."""

    @abc.abstractmethod
    def _restore(self, directory: Path, header: dict[str, Any]) -> None:
        """Reads what `_save` wrote. Checks all of it before it changes anything.

        If header["renewed"] is True, the checkpoint holds a reference. Otherwise the reference is the initial model.
        """

    def _read_tokenizer(self) -> None:
        """Sets `folder`, `tokenizer`, `_end` from a Hugging Face folder or hub name. Override it for other formats."""
        self.folder = hugging_face.local_folder(self.config).absolute()
        self.tokenizer = hugging_face.load_tokenizer(self.config)
        self._end = text.end_tokens(hugging_face.generation_eos(self.folder), self.tokenizer)

    # -- the protocol

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Ids that end a response."""
        return tuple(self._end)

    def reset(self) -> None:
        """Loads the initial model again, without optimizer state. Every rank calls this."""
        self._need_own_weights("reset")
        self._unload()
        self._load()
        self.steps_taken, self.renewed = 0, False

    def encode(self, prompt: Prompt) -> Tokens:
        """Token ids of a text, or of chat messages through the chat template; see `policy.text`."""
        return text.encode(self.tokenizer, prompt, self.config)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of a response, without its end token; see `policy.text`."""
        return text.decode(self.tokenizer, tokens, self._end)

    def prompt_text(self, tokens: Sequence[int]) -> str:
        """See `Policy.prompt_text`."""
        return text.prompt_text(self.tokenizer, tokens, self.config.path)

    def encode_responses(
        self,
        prompt: Prompt,
        responses: Sequence[str | Sequence[int]],
        finished: Sequence[bool | None],
        masks: Sequence[Mask | None] | None = None,
    ) -> list[Response]:
        """Recorded responses, each as text or token ids; see `policy.text`."""
        return text.encode_responses(self.tokenizer, prompt, responses, finished, self._end, masks)

    def generate(
        self, prompts: Sequence[Tokens], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[Response]]:
        """Draws len(seeds[i]) responses to prompts[i]; see `Policy.generate`."""
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts and {len(seeds)} rows of seeds; expected equal numbers")
        return self._generate(prompts, seeds, sampling)

    @contextlib.contextmanager
    def reusing_prefixes(self) -> Iterator[Prefixes | None]:
        """See `Policy.generate`. Kept conversations may take half of the cache's memory.

        Inside it, methods that change, save or renew parameters raise RuntimeError.
        """
        if self._keeps_nothing is None:
            self._keeps_nothing = why = self._why_no_prefixes()
            how = f"are computed from the start ({why})" if why else "compute only their new tokens"
            logging.getLogger(f"gvpo.{self.backend}").info("%s: later turns of an episode %s", self.architecture, how)
        with self._weights_for_sampling():
            prefixes = None if self._keeps_nothing else Prefixes(self._cache_tokens() // 2)
            try:
                self._prefixes, self._in_rollout = prefixes, True
                yield prefixes
            finally:
                self._prefixes, self._in_rollout = None, False
                if prefixes is not None:  # frees memory for scoring; the caller may still read the counts
                    prefixes.clear()

    def logprobs(self, batch: Batch, *, reference: bool = False) -> np.ndarray:
        """(N,) float64 sums of float32 log-probs of own tokens, nats, at temperature 1.

        Raises: RuntimeError: `reference` is True, and the policy was loaded with reference=False.
        """
        if reference:
            self._need_reference()
        rows, owners = self._rows_of(batch)
        return summed(self._logprobs(rows, reference)[0], owners, len(batch))

    def _rows_of(self, batch: Batch) -> tuple[Batch, np.ndarray]:
        """Returns `Batch.by_segment`: one row for each segment. If rows are packed, they share beginnings."""
        rows, owners = batch.by_segment()
        return (sharing_beginnings(rows, len(batch)) if self.packed else rows), owners

    def renew_reference(self) -> None:
        """Makes the current policy the reference; see `Policy.renew_reference`.

        Raises: RuntimeError: the policy was loaded with reference=False.
        """
        self._need_reference()
        self._need_own_weights("renew_reference")
        self._renew_reference()
        self.renewed = True

    def _need_reference(self) -> None:
        if not self.settings.reference and not self.config.lora_rank:
            raise RuntimeError("the reference was not loaded: load(..., reference=True)")

    def update(self, batch: Batch, coefficients: Coefficients, *, scored: np.ndarray | None = None) -> Update:
        """Takes one AdamW step along -sum_i c_i grad log pi_i; see `Policy.update`.

        Raises: FloatingPointError: log-probs, coefficients or gradients are not finite. Nothing was changed.
        """
        self._need_training()
        self._need_own_weights("update")
        c, alone = self.optimizer_config, self.world_size == 1
        count = len(batch)
        batch, owners = self._rows_of(batch)
        if len(owners) > count:
            coefficients = spread(coefficients, owners)
            scored = None if scored is None else firsts(scored, owners)
        by_group = ByGroup(coefficients, lambda error: agree(self, error, FloatingPointError))
        complete = batch.complete and self.by_group and not alone
        plan = plan_step(
            batch,
            self._splitting,
            by_group if complete else coefficients,
            together=c.strategy == "group" and (alone or complete),
            scored=scored,
            score=self._logprobs,
            held=HELD_MICRO_BATCHES * c.micro_batch_tokens * self._splitting.shards if self.defers else 0,
            meets=not alone,
            lockstep=complete and self.lockstep,
        )
        if complete:
            by_group.known = {i: float(plan.factors[i]) for i in plan.known}
            coefficients, plan = by_group, plan._replace(settle=by_group.settle)
        rate = learning_rate(c, self.steps_taken, self.settings.updates)
        update = self._update(batch, plan, plan.partly or coefficients, rate)
        self.steps_taken += 1
        return replace(update, logprobs=summed(update.logprobs, owners, count))

    def save(self, directory: Path) -> None:
        """Writes parameters or adapters, AdamW's moments, the step and a renewed reference. Every rank calls this."""
        self._save(Path(directory), self._header())

    def _need_training(self) -> None:
        if self.frozen:
            raise RuntimeError("the policy was loaded with updates = 0: it scores and samples, and is not trained")

    def _need_own_weights(self, call: str) -> None:
        if self._in_rollout:
            raise RuntimeError(
                f"{call} within reusing_prefixes, while the weights are prepared for sampling: call it later"
            )

    def _header(self) -> dict[str, Any]:
        """Facts of a checkpoint of the current state, for `checkpoint.write_header`."""
        self._need_training()
        self._need_own_weights("save")
        facts = {**checkpoint.identity(self.config, self.architecture), "step": self.steps_taken}
        return facts | ({"renewed": True} if self.renewed else {})

    def _header_in(self, directory: Path) -> dict[str, Any]:
        return checkpoint.read_header(Path(directory), checkpoint.identity(self.config, self.architecture))

    def restore(self, directory: Path) -> None:
        """Reads what `save` wrote, with any number of ranks.

        Raises: ConfigError: the checkpoint does not fit; the message says where.
        """
        self._need_training()
        self._need_own_weights("restore")
        header = self._header_in(directory)
        self._restore(Path(directory), header)
        self.steps_taken, self.renewed = int(header["step"]), bool(header.get("renewed"))

    def gather(self, values: np.ndarray) -> np.ndarray:
        """Concatenates the ranks' arrays in rank order along axis 0. Lengths may differ."""
        return self._ranks.gather(values)

    # -- helpers for backends

    def _describe(
        self,
        *,
        device: str,
        device_name: str,
        model: Mapping[str, Any],
        vocabulary: int | None,
        parameters: int,
        trainable_parameters: int,
        packages: Sequence[str],
        memory: MemoryFacts | None,
        sharding: str = "",
        **details: Any,
    ) -> PolicyFacts:
        """Returns the facts for `describe`, with those that all backends share.

        Args:
          model: config.json of the language model.
          packages: distributions to log the versions of.
          details: further facts of the backend.
        """
        return PolicyFacts(
            backend=self.backend,
            architecture=self.architecture,
            device=device,
            device_name=device_name,
            details=details,
            ranks=self.world_size,
            sharding=sharding,
            dtype=self.config.dtype,
            end_tokens=text.describe_end_tokens(self.tokenizer, self._end),
            context=hugging_face.context(model),
            parameters=parameters,
            trainable_parameters=trainable_parameters,
            layout="packed" if self.packed else "plain",
            layout_reason=self.layout_reason,
            vocabulary=vocabulary,
            versions={package: version(package) for package in packages},
            memory=memory,
        )

    def _split(self, hidden: int, rope: Any = None) -> Splitting:
        c = self.optimizer_config
        return Splitting(self.packed, c.micro_batch_tokens, c.micro_batch_responses, hidden, rope)
