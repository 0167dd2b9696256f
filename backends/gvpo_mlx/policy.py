"""The MLX policy: the model that `gvpo_core.training` trains, on Apple silicon or CPU, in one or several processes."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from gvpo_core.training.config import ModelConfig, OptimizerConfig
from gvpo_core.training.policy import Batch, Coefficients, PolicyFacts, Response, Tokens, Update
from gvpo_core.training.policy.base import LanguageModelPolicy
from gvpo_core.training.policy.step import StepPlan
from gvpo_core.training.policy.tensor_file import Digest
from gvpo_core.training.sampling import Sampling
from gvpo_mlx import adapters, check, checkpoint, export, generate, memory, model
from gvpo_mlx.ranks import Ranks
from gvpo_mlx.update import AdamW, Gradients, Passes

log = logging.getLogger("gvpo.mlx")


def load(model: ModelConfig, optimizer: OptimizerConfig, *, updates: int, reference: bool, seed: int) -> "MLXPolicy":
    """Loads a language model of mlx-lm as a policy.

    Args:
      updates: optimizer steps of the whole run, for the schedule.
      reference: whether `logprobs(reference=True)` will be called. Without LoRA this keeps a copy of the initial model.
      seed: seed of new adapters.
    Raises: ConfigError: the folder, model, device or layout cannot be used; the message says why.
    """
    return MLXPolicy(model, optimizer, updates=updates, reference=reference, seed=seed)


class MLXPolicy(LanguageModelPolicy):
    """See `gvpo_core.training.policy.Policy`."""

    backend = "mlx"
    _ranks: Ranks

    def __init__(
        self,
        config: ModelConfig,
        optimizer: OptimizerConfig,
        *,
        updates: int,
        reference: bool,
        seed: int,
        compiled: bool | None = None,
    ) -> None:
        """`compiled`: whether passes are compiled. Default: only on a GPU; on CPU, g++ takes seconds per program."""
        super().__init__(config, optimizer, Ranks, updates=updates, reference=reference, seed=seed)
        self.device = self._ranks.device
        self.compiled = self.device.type == mx.gpu if compiled is None else compiled
        self._load()
        log.info("MLX runs on %s", self.device)

    @property
    def architecture(self) -> str:
        """See `LanguageModelPolicy.architecture`."""
        return self.scorer.name

    def _load(self) -> None:
        config = self.config
        with mx.stream(self.device):
            memory.allow_wired(self.device)
            self.scorer = model.load_scorer(config, self.settings.seed, frozen=self.frozen)
            self.packed, self.layout_reason = check.check(self.scorer, config)
            with self.scorer.using(self.scorer.parameters):
                self._same_length = not generate.check(self.scorer)
            self._splitting = self._split(self.scorer.config.get("hidden_size") or 0)
        self._optimizer = AdamW(self.optimizer_config, self.compiled)
        self._passes = self._passes_of(self.scorer)
        self._load_reference()

    def _load_reference(self) -> None:
        self._reference_parameters: list[mx.array] | None = None  # of a renewed reference, like `scorer.parameters`
        self._reference_passes = self._passes
        if self.settings.reference and not self.config.lora_rank:
            with mx.stream(self.device):
                self._reference_passes = self._passes_of(model.load_reference(self.config))

    def _unload(self) -> None:
        del self.scorer, self._optimizer, self._passes, self._reference_passes, self._reference_parameters

    def _passes_of(self, scorer: model.Scorer) -> Passes:
        return Passes(scorer, self.packed, self.optimizer_config.micro_batch_tokens, self.compiled)

    # -- sampling and scoring

    def _generate(
        self, prompts: Sequence[Tokens], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[Response]]:
        with mx.stream(self.device), self.scorer.using(self.scorer.parameters):
            return generate.generate(
                self.scorer,
                prompts,
                seeds,
                sampling,
                end=self._end,
                cache_tokens=self._cache_tokens(),
                same_length=self._same_length,
                prefixes=self._prefixes,
            )

    def _why_no_prefixes(self) -> str:
        with mx.stream(self.device), self.scorer.using(self.scorer.parameters):
            return generate.continues(self.scorer)

    def _logprobs(self, batch: Batch, reference: bool = False) -> tuple[np.ndarray, int]:
        passes = self._passes
        switched: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if reference and self.scorer.adapted and self._reference_parameters is None:
            switched = self._without_adapters()
        if reference:
            passes = self._reference_passes
        logprobs, tokens = np.zeros(len(batch)), 0
        with mx.stream(self.device), switched:
            for rows in self._splitting.rows(batch):
                arrays, values, computed = passes.score(batch, rows, self._reference_parameters if reference else None)
                logprobs[arrays.responses] = arrays.sums(values)
                tokens += computed
        return logprobs, tokens

    def _renew_reference(self) -> None:
        with mx.stream(self.device):
            self._take_reference(self.scorer.in_compute_dtype(self.scorer.parameters))

    def _take_reference(self, values: list[mx.array]) -> None:
        mx.eval(values)
        self._reference_parameters, self._reference_passes = values, self._passes  # frees the initial model

    @contextlib.contextmanager
    def _without_adapters(self) -> Iterator[None]:
        names = self.scorer.names
        with adapters.switched_off(self.scorer.lm):
            self.scorer.names = []
            try:
                yield
            finally:
                self.scorer.names = names

    def _cache_tokens(self) -> int:
        return memory.cache_tokens(self.scorer, self.device)

    # -- training

    def _update(self, batch: Batch, plan: StepPlan, coefficients: Coefficients, rate: float) -> Update:
        logprobs, tokens = plan.logprobs, plan.tokens
        with mx.stream(self.device):
            gradients = Gradients(self.scorer.names, [p.shape for p in self.scorer.parameters])
            for rows in plan.grouped:
                arrays, values, gradient, computed = self._passes.grouped(batch, rows, coefficients)
                logprobs[arrays.responses] = arrays.sums(values)
                gradients.add(gradient)
                tokens += computed
            for rows in self._splitting.rows(batch, plan.rest):
                *_, gradient, computed = self._passes.known(batch, rows, -plan.factors)
                gradients.add(gradient)
                tokens += computed
            gradients.sums = self._ranks.sum(gradients.sums)
            clipped, norm = gradients.clipped(self.optimizer_config.max_gradient_norm)
            self.scorer.parameters = self._optimizer.step(self.scorer.parameters, clipped, rate)
            mx.eval(self.scorer.parameters, self._optimizer.moments)
        return Update(logprobs, norm, rate, tokens, memory.peak())

    # -- on disk

    def saving(self, directory: Path) -> Callable[[], dict[str, Digest]]:
        """See `Policy.saving`. The ranks hold copies; the main rank writes."""
        return self._saving(Path(directory), self._header())

    def _saving(self, directory: Path, header: dict[str, Any]) -> Callable[[], dict[str, Digest]]:
        if self.rank:
            return dict
        return checkpoint.saving(directory, self.scorer, self._optimizer, header, self._reference_parameters or [])

    def _save(self, directory: Path, header: dict[str, Any]) -> None:
        self._saving(directory, header)()

    def _restore(self, directory: Path, header: dict[str, Any]) -> None:
        reference = checkpoint.restore(directory, self.scorer, self._optimizer, header)
        if reference:
            self._take_reference(reference)
        elif self._reference_parameters is not None:
            self._load_reference()

    def save_parameters(self, directory: Path) -> None:
        """See `Policy.save`."""
        if self.rank == 0:
            dtype = None if self.scorer.adapted else self.scorer.dtype
            with mx.stream(self.device):
                checkpoint.saving(Path(directory), self.scorer, None, self._header(), [], dtype)()

    def load_parameters(self, directory: Path) -> None:
        """See `Policy.save`."""
        with mx.stream(self.device):
            checkpoint.restore_parameters(Path(directory), self.scorer, self._header_in(directory))

    def export(self, directory: Path, *, own_head: bool = False) -> None:
        """Writes a Hugging Face folder in the compute dtype, adapters merged. Every rank must call it. See `Policy`."""
        if self.rank == 0:
            with mx.stream(self.device):
                export.export(Path(directory), self.scorer, self.config, self.tokenizer, self._end, own_head)

    def export_adapters(self, directory: Path) -> None:
        """Writes only the adapters, in mlx-lm's format. Every rank must call it."""
        if self.rank == 0:
            with mx.stream(self.device):
                export.export_adapters(Path(directory), self.scorer, self.config)

    # -- facts

    def describe(self) -> PolicyFacts:
        """Returns facts for the log and the run folder."""
        return self._describe(
            device="gpu" if self.device.type == mx.gpu else "cpu",
            device_name=str(mx.device_info(self.device).get("device_name", "unknown")),
            model=self.scorer.config,
            vocabulary=self.scorer.config.get("vocab_size"),
            parameters=memory.count(self.scorer.lm),
            trainable_parameters=sum(p.size for p in self.scorer.parameters),
            packages=("mlx", "mlx-lm", "transformers"),
            memory=memory.facts(self.scorer, self.config, self.optimizer_config.micro_batch_tokens, self.device),
            compiled=self.compiled,
        )
