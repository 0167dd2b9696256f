"""The PyTorch policy: the model that `gvpo_core.training` trains, on one or several devices."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gvpo_core.training.config import ConfigError, ModelConfig, OptimizerConfig
from gvpo_core.training.config.backends import in_few_bits
from gvpo_core.training.policy import Batch, Coefficients, PolicyFacts, Response, Tokens, Update, layout
from gvpo_core.training.policy.base import LanguageModelPolicy
from gvpo_core.training.policy.step import StepPlan
from gvpo_core.training.policy.tensor_file import Digest
from gvpo_core.training.samplers.channels import Channel
from gvpo_core.training.sampling import Sampling
from gvpo_torch import adapters, check, checkpoint, export, generate, memory, model, transfer
from gvpo_torch.precision import deterministic, tensor_float
from gvpo_torch.quantized import moment_bytes
from gvpo_torch.ranks import Ranks
from gvpo_torch.reference import Reference, named_parameters
from gvpo_torch.sharding import copies, gathered, gathered_no_more, no_gradients, shard
from gvpo_torch.update import Backward, clip, in_step, make_optimizer, most_passes, step


def load(model: ModelConfig, optimizer: OptimizerConfig, *, updates: int, reference: bool, seed: int) -> "TorchPolicy":
    """Loads a transformers causal language model as a policy.

    Args:
      updates: optimizer steps of the whole run, for the schedule.
      reference: whether `logprobs(reference=True)` will be called. Without LoRA this keeps a copy of the initial model.
      seed: seed of new adapters.
    Raises: ConfigError: the folder, model, device or layout cannot be used; the message says why.
    """
    return TorchPolicy(model, optimizer, updates=updates, reference=reference, seed=seed)


class TorchPolicy(LanguageModelPolicy):
    """See `gvpo_core.training.policy.Policy`."""

    backend = "torch"
    by_group = True
    _ranks: Ranks

    def __init__(
        self, config: ModelConfig, optimizer: OptimizerConfig, *, updates: int, reference: bool, seed: int
    ) -> None:
        if config.deterministic:  # read when cuBLAS starts
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        super().__init__(config, optimizer, Ranks, updates=updates, reference=reference, seed=seed)
        self.device = self._ranks.device
        self._load()

    @property
    def architecture(self) -> str:
        """See `LanguageModelPolicy.architecture`."""
        return type(self.scorer.base).__name__

    def _load(self) -> None:
        config = self.config
        if config.compile and self.world_size > 1:
            raise ConfigError(f"model.compile = true needs a single process; this run has {self.world_size}: remove it")
        sharded = self.world_size > 1 and config.sharding == "fsdp"
        self.scorer = model.load_scorer(config, self.device, self.settings.seed, deferred=sharded, frozen=self.frozen)
        if sharded:
            shard(self.scorer, self.device)
        self.packed, self.layout_reason = check.check(self.scorer, config, self.device, self._ranks.agree)
        # Sharded ranks wait for each other at every pass, and longer if backward passes are deferred by group. This is
        # worth it only if layers are recomputed anyway.
        deferring = not self.frozen and (config.gradient_checkpointing or not sharded)
        self.defers = deferring and self._ranks.agree(check.defers(self.scorer, self.device))
        self.lockstep = sharded and config.gradient_checkpointing
        # With attention by blocks a longer row costs no more attention, so rows of any length share their prompt.
        hidden = 0 if self.scorer.in_blocks else getattr(self.scorer.config, "hidden_size", 0) or 0
        self._splitting = self._split(hidden, self.scorer.rope)
        self.parameters, self.trainable = memory.count(self.scorer)
        self._trained: torch.nn.Module = self.scorer
        if self.world_size > 1 and not sharded and not self.frozen:
            self._trained = copies(self.scorer, self.device)
        self._sharded = sharded
        self.sampled_bytes = memory.merged(self.scorer, self.device) if config.lora_rank else 0
        self._samples = False  # whether the weights are prepared for sampling
        self._optimizer: Any = None
        self._moments: int | None = 0
        if not self.frozen:
            self._optimizer = make_optimizer(self.scorer, self.optimizer_config)
            self._moments = moment_bytes(self.scorer.parameters(), self._optimizer)
        self._named = {name: p for name, p in named_parameters(self.scorer).items() if p.requires_grad}
        own_model = self.settings.reference and not config.lora_rank
        self._reference = Reference(self.scorer, self._named, self._initial if own_model else None)
        export.name_end_tokens(self.scorer.base, self.folder, self._end)

    def _initial(self) -> model.Scorer:
        """Loads the initial model, which is the reference."""
        sharded = self.world_size > 1 and self.config.sharding == "fsdp"
        initial = model.load_reference(self.config, self.device, deferred=sharded)
        if sharded:
            shard(initial, self.device)
        initial.score_as(self.scorer)
        return initial

    def _unload(self) -> None:
        del self.scorer, self._trained, self._optimizer, self._named, self._reference

    # -- sampling and scoring

    def _generate(
        self, prompts: Sequence[Tokens], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[Response]]:
        with self._weights_for_sampling(), no_gradients(self.scorer), self.scorer.autocast(), self._tensor_float():
            return generate.generate(
                self.scorer,
                self.scorer,
                prompts,
                seeds,
                sampling,
                end=self._end,
                device=self.device,
                cache_tokens=self._cache_tokens(),
                in_fixed_buffers=self.scorer.decodes_fixed,
                prefixes=self._prefixes,
            )

    @contextlib.contextmanager
    def _weights_for_sampling(self) -> Iterator[None]:
        """Prepares the weights for sampling, once for all turns of a rollout.

        Merges adapters, casts layers to the dtype of their products, and gathers shards.
        """
        if self._samples:
            yield
            return
        narrowed = contextlib.nullcontext() if self._sharded else model.products_in_compute_dtype(self.scorer)
        merged_adapters = adapters.merged(self.scorer.lm) if self.sampled_bytes else contextlib.nullcontext()
        self._trained.eval()
        try:
            self._samples = True
            with merged_adapters, narrowed, gathered(self._trained):
                yield
        finally:
            self._samples = False

    def _why_no_prefixes(self) -> str:
        self._trained.eval()
        with no_gradients(self.scorer), gathered(self._trained):
            return check.continues(self.scorer, self.device)

    def _logprobs(self, batch: Batch, reference: bool = False) -> tuple[np.ndarray, int]:
        logprobs, tokens = np.zeros(len(batch)), 0
        scoring = self._reference.scoring() if reference else contextlib.nullcontext(self.scorer)
        self._trained.eval()
        with (
            self._kernels(),
            no_gradients(self.scorer),
            scoring as scorer,
            scorer.autocast(),
            self._in_step(scorer) as forward,
        ):
            for rows in self._splitting.rows(batch):
                arrays = layout.arrays(batch, rows)
                values = model.score(forward, arrays, self.device)
                logprobs[arrays.responses] = arrays.sums(values.cpu().numpy())
                tokens += arrays.ids.size
        return logprobs, tokens

    def _renew_reference(self) -> None:
        self._reference.renew()

    def _in_step(self, scorer: model.Scorer) -> contextlib.AbstractContextManager[Any]:
        return in_step(self._ranks, scorer, self.device) if self._sharded else contextlib.nullcontext(scorer)

    def _tensor_float(self) -> contextlib.AbstractContextManager[None]:
        return tensor_float(self.config, self.device)

    @contextlib.contextmanager
    def _kernels(self) -> Iterator[None]:
        """Kernel settings for scores and updates."""
        with deterministic(self.config.deterministic), self._tensor_float():
            yield

    def _cache_tokens(self) -> int:
        return memory.cache_tokens(self.scorer, self.device)

    # -- training

    def _update(self, batch: Batch, plan: StepPlan, coefficients: Coefficients, rate: float) -> Update:
        logprobs, optimizer = plan.logprobs, self._optimizer
        optimizer.zero_grad(set_to_none=True)
        backward = Backward(self._score_autocast, self._trained, self.world_size)
        always, nothing = self.config.gradient_checkpointing, contextlib.nullcontext

        def recomputing() -> contextlib.AbstractContextManager[Any]:
            return nothing() if always else model.checkpointing(self.scorer)

        with self._kernels(), model.checkpointing(self.scorer) if always else nothing():
            rounds = [*plan.deferred, *([rows] for rows in plan.grouped)]
            own_passes = [len(micro) for micro in rounds]
            for number, passes in enumerate(most_passes(self._ranks, own_passes) if self._sharded else own_passes):
                micro = rounds[number] if number < len(rounds) else []
                fresh = backward.deferred(batch, micro, coefficients, passes, recomputing)
                logprobs = np.where(np.isnan(fresh), logprobs, fresh)
            rest = self._splitting.rows(batch, plan.rest)
            at_least = 1 if self.world_size > 1 and not self._sharded else 0  # DDP sums gradients in its last pass
            backward.known(batch, rest, plan.factors, self._ranks.most(max(at_least, len(rest))))
        plan.settle()
        norm = clip(self._named.items(), self.optimizer_config.max_gradient_norm)
        step(optimizer, rate)
        return Update(logprobs, norm, rate, plan.tokens + backward.tokens, memory.peak(self.device))

    def _score_autocast(self, arrays: layout.Arrays, reduces: bool = True) -> Tensor:
        """Returns (n,) log-probabilities; `reduces`: through DDP, which sums all gradients so far over ranks."""
        with self.scorer.autocast():
            return model.score(self._trained if reduces or self._sharded else self.scorer, arrays, self.device)

    # -- on disk

    def saving(self, directory: Path) -> Callable[[], dict[str, Digest]]:
        """See `Policy.saving`. Each rank writes its shard. If the ranks hold copies, the main rank writes."""
        return self._saving(Path(directory), self._header())

    def _saving(self, directory: Path, header: dict[str, Any]) -> Callable[[], dict[str, Digest]]:
        writers = self.world_size if self._sharded else 1
        reference_tensors = self._reference.tensors()
        return checkpoint.saving(directory, self._named, self._optimizer, header, self.rank, writers, reference_tensors)

    def _save(self, directory: Path, header: dict[str, Any]) -> None:
        self._saving(directory, header)()

    def _restore(self, directory: Path, header: dict[str, Any]) -> None:
        reference_tensors = self._reference.room() if header.get("renewed") else None
        checkpoint.restore(directory, self._named, self._optimizer, header, reference_tensors)
        self._reference.restored(reference_tensors)
        gathered_no_more(self._trained)

    def save_parameters(self, directory: Path) -> None:
        """See `Policy.save`."""
        writers = self.world_size if self._sharded else 1
        dtype = None if self.config.lora_rank else getattr(torch, self.config.dtype)
        checkpoint.saving(Path(directory), self._named, None, self._header(), self.rank, writers, dtype=dtype)()

    def load_parameters(self, directory: Path) -> None:
        """See `Policy.save`."""
        named = self._named or named_parameters(self.scorer)
        checkpoint.restore_parameters(Path(directory), named, self._header_in(directory))
        gathered_no_more(self._trained)

    def export(self, directory: Path, *, own_head: bool = False) -> None:
        """Writes a Hugging Face folder in the compute dtype, adapters merged. Every rank must call it. See `Policy`."""
        dtype = getattr(torch, self.config.dtype)
        export.export(Path(directory), self.scorer.lm, self.tokenizer, dtype, self.rank == 0, own_head)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the tensors that `export` writes, as (name, tensor) on the policy's device.

        Ranks gather one tensor, or one layer, at a time, so every rank must exhaust the iterator. Only the main rank
        gets tensors.
        """
        return export.stored_tensors(self.scorer.lm, getattr(torch, self.config.dtype), self.rank == 0)

    def weight_channel(self, kind: str) -> Channel:
        """Returns the channel that carries `tensors` to a server; see `transfer.channel`."""
        return transfer.channel(kind, self.device, self.world_size)

    def release_memory(self) -> None:
        """Frees GPU memory that torch caches, for use by other processes."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def export_adapters(self, directory: Path) -> None:
        """Writes only the adapters, in peft's format. Every rank must call it."""
        export.export_adapters(Path(directory), self.scorer.lm, self.config.path, self.rank == 0)

    # -- facts

    def describe(self) -> PolicyFacts:
        """Returns facts for the log and the run folder."""
        on_cuda, settings = self.device.type == "cuda", self.scorer.config
        sampled = self.sampled_bytes + (memory.gathered if self._sharded else memory.narrowed)(self.scorer)
        return self._describe(
            device=str(self.device),
            device_name=torch.cuda.get_device_name(self.device) if on_cuda else "CPU",
            sharding="none" if self.world_size == 1 else "fsdp" if self._sharded else "data_parallel",
            model=settings.to_dict(),
            vocabulary=getattr(settings, "vocab_size", None),
            parameters=self.parameters,
            trainable_parameters=self.trainable,
            packages=self._packages(),
            memory=memory.facts(self.scorer, self.device, self.defers, sampled, self._moments),
        )

    def _packages(self) -> tuple[str, ...]:
        """Names of the distributions whose versions are logged."""
        few = in_few_bits(self.config, self.optimizer_config)
        adapted = ("peft",) if self.config.lora_rank else ()
        return "torch", "transformers", *adapted, *(("bitsandbytes",) if few else ())
