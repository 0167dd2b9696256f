"""The MLX policy: what `gvpo_core.training` trains, on Apple silicon or a CPU, in one process or several."""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from gvpo_core.training.config import ModelConfig, OptimizerConfig
from gvpo_core.training.policy import (
    Batch,
    Coefficients,
    PolicySettings,
    Prompt,
    Response,
    Tokens,
    Update,
    hugging_face,
    text,
)
from gvpo_core.training.policy.layout import Splitting
from gvpo_core.training.policy.step import learning_rate, plan_step
from gvpo_core.training.sampling import Sampling
from gvpo_mlx import checkpoint, generate, memory, model
from gvpo_mlx.ranks import Ranks
from gvpo_mlx.update import AdamW, Gradients, Passes

log = logging.getLogger("gvpo.mlx")


def load(model: ModelConfig, optimizer: OptimizerConfig, *, updates: int, reference: bool, seed: int) -> "MLXPolicy":
    """A language model of mlx-lm as a policy.

    Args:
      updates: optimizer steps of the whole run, for the schedule.
      reference: whether `logprobs(reference=True)` will be asked for; keeps a copy of the initial model without LoRA.
      seed: of newly made adapters.
    Raises: ConfigError: a folder, model, device or layout that cannot be used, and why.
    """
    return MLXPolicy(model, optimizer, updates=updates, reference=reference, seed=seed)


class MLXPolicy:
    """See `gvpo_core.training.policy.Policy`."""

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
        """`compiled`: whether passes are compiled. Default: on a GPU; on CPU each program costs seconds of g++."""
        self.settings = PolicySettings(optimizer, updates, reference, seed, config)
        self.config, self.optimizer_config, self.updates = config, optimizer, updates
        self._ranks = Ranks(config)
        self.rank, self.world_size, self.device = self._ranks.rank, self._ranks.world_size, self._ranks.device
        self.compiled = self.device.type == mx.gpu if compiled is None else compiled
        self._load()
        folder = hugging_face.local_folder(config)
        self._end = text.end_tokens(hugging_face.generation_eos(folder), self.tokenizer)
        log.info("MLX runs on %s", self.device)

    def _load(self) -> None:
        config, optimizer = self.config, self.optimizer_config
        with mx.stream(self.device):
            memory.allow_wired(self.device)
            self.scorer, self.tokenizer = model.load_scorer(config, self.settings.seed)
            self.packed, self.layout_reason = model.check(self.scorer, config)
            with self.scorer.using(self.scorer.parameters):
                self._same_length = not generate.check(self.scorer)
            self._reference = model.load_reference(config) if self.settings.reference and not config.lora_rank else None
        self._optimizer = AdamW(optimizer, self.compiled)
        self._splitting = Splitting(
            self.packed,
            optimizer.micro_batch_tokens,
            optimizer.micro_batch_responses,
            self.scorer.config.get("hidden_size") or 0,
        )
        self._passes = self._passes_of(self.scorer)
        self._reference_passes = self._passes_of(self._reference or self.scorer)
        self._step = 0

    @property
    def steps_taken(self) -> int:
        """Optimizer steps taken."""
        return self._step

    def reset(self) -> None:
        """Loads the initial model again, without optimizer state; every rank calls."""
        del self.scorer, self._reference, self._optimizer, self._passes, self._reference_passes
        self._load()

    def _passes_of(self, scorer: model.Scorer) -> Passes:
        return Passes(scorer, self.packed, self.optimizer_config.micro_batch_tokens, self.compiled)

    # -- text

    def encode(self, prompt: Prompt) -> Tokens:
        """Token ids of a text, or of chat messages through the chat template; see `policy.text`."""
        return text.encode(self.tokenizer, prompt, self.config)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of a response without its end token; see `policy.text`."""
        return text.decode(self.tokenizer, tokens, self._end)

    # -- sampling and scoring

    def generate(
        self, prompts: Sequence[Tokens], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[Response]]:
        """len(seeds[i]) responses to prompts[i]; see the protocol."""
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts and {len(seeds)} rows of seeds; expected as many")
        with mx.stream(self.device), self.scorer.using(self.scorer.parameters):
            return generate.generate(
                self.scorer,
                prompts,
                seeds,
                sampling,
                end=self._end,
                cache_tokens=self._cache_tokens(),
                same_length=self._same_length,
            )

    def logprobs(self, batch: Batch, *, reference: bool = False) -> np.ndarray:
        """(N,) float64 sums of float32 token log-probs, nats, at temperature 1.

        Raises: RuntimeError: the reference, where `load` was told that it is not needed.
        """
        return self._logprobs(batch, reference)[0]

    def _logprobs(self, batch: Batch, reference: bool = False) -> tuple[np.ndarray, int]:
        switched: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if reference and self.scorer.adapted:
            switched = self._without_adapters()
        elif reference and self._reference is None:
            raise RuntimeError("the reference was not loaded: load(..., reference=True)")
        passes = self._reference_passes if reference else self._passes
        found, tokens = np.zeros(len(batch)), 0
        with mx.stream(self.device), switched:
            for rows in self._splitting.rows(batch):
                arrays, values, computed = passes.score(batch, rows)
                found[arrays.responses] = arrays.sums(values)
                tokens += computed
        return found, tokens

    @contextlib.contextmanager
    def _without_adapters(self) -> Iterator[None]:
        names = self.scorer.names
        with model.switched_off(self.scorer.lm):
            self.scorer.names = []
            try:
                yield
            finally:
                self.scorer.names = names

    def _cache_tokens(self) -> int:
        """Tokens of key-value cache that a quarter of the free memory holds, at most a gibibyte on CPU."""
        c = self.scorer.config
        heads = c.get("num_key_value_heads") or c.get("num_attention_heads") or 1
        width = c.get("head_dim") or (c.get("hidden_size") or 1) // (c.get("num_attention_heads") or 1)
        token = 2 * len(self.scorer.lm.layers) * heads * width * self.scorer.dtype.size
        return max(1, memory.for_cache(self.device) // (2 * token))  # growing a cache holds a layer twice

    # -- training

    def update(self, batch: Batch, coefficients: Coefficients, *, scored: np.ndarray | None = None) -> Update:
        """One AdamW step along -sum_i c_i grad log pi_i; see the protocol.

        Raises: FloatingPointError: log-probs, coefficients or gradients that are not finite; nothing was changed.
        """
        with mx.stream(self.device):
            return self._update(batch, coefficients, scored)

    def _update(self, batch: Batch, coefficients: Coefficients, scored: np.ndarray | None) -> Update:
        together = self.world_size == 1 and self.optimizer_config.strategy == "group"
        whole, rest, logprobs, factors, tokens = plan_step(
            batch, self._splitting, coefficients, together=together, scored=scored, score=self._logprobs
        )
        gradients = Gradients(self.scorer.names, [p.shape for p in self.scorer.parameters])
        for rows in whole:
            arrays, values, found, computed = self._passes.whole(batch, rows, coefficients)
            logprobs[arrays.responses] = arrays.sums(values)
            gradients.add(found)
            tokens += computed
        for rows in self._splitting.rows(batch, rest):
            *_, found, computed = self._passes.known(batch, rows, -factors)
            gradients.add(found)
            tokens += computed
        gradients.sums = self._ranks.sum(gradients.sums)
        clipped, norm = gradients.clipped(self.optimizer_config.max_gradient_norm)
        rate = learning_rate(self.optimizer_config, self._step, self.updates)
        self.scorer.parameters = self._optimizer.step(self.scorer.parameters, clipped, rate)
        mx.eval(self.scorer.parameters, self._optimizer.moments)
        self._step += 1
        peak = mx.get_peak_memory()
        mx.reset_peak_memory()
        return Update(logprobs, norm, rate, tokens, peak)

    # -- on disk

    def save(self, directory: Path) -> None:
        """Writes parameters or adapters, AdamW's moments and the step into an empty folder; every rank calls."""
        if self.rank == 0:
            checkpoint.save(Path(directory), self.scorer, self._optimizer, {**self._facts(), "step": self._step})

    def restore(self, directory: Path) -> None:
        """Reads what `save` wrote, from any number of ranks.

        Raises: ConfigError: a checkpoint that does not fit, and where.
        """
        state = checkpoint.restore(Path(directory), self.scorer, self._optimizer, self._facts())
        self._step = state["step"]

    def _facts(self) -> dict[str, Any]:
        c = self.config
        facts: dict[str, Any] = {"architecture": self.scorer.name, "lora_rank": c.lora_rank}
        if c.lora_rank:
            facts |= {
                "lora_kind": c.lora_kind,
                "lora_alpha": c.lora_alpha or 2 * c.lora_rank,
                "lora_targets": list(c.lora_targets),
            }
        return facts

    def export(self, directory: Path) -> None:
        """Writes a Hugging Face folder, adapters merged, in the compute dtype; every rank calls."""
        if self.rank == 0:
            with mx.stream(self.device):
                checkpoint.export(Path(directory), self.scorer, self.config, self.tokenizer, self._end)

    # -- facts and ranks

    def describe(self) -> Mapping[str, Any]:
        """Plain facts for the log and the run folder."""
        return {
            "backend": "mlx",
            "architecture": self.scorer.name,
            "device": "gpu" if self.device.type == mx.gpu else "cpu",
            "device_name": str(mx.device_info(self.device).get("device_name", "unknown")),
            "ranks": self.world_size,
            "dtype": self.config.dtype,
            "end_tokens": text.told_end_tokens(self.tokenizer, self._end),
            "context": hugging_face.context(self.scorer.config),
            "parameters": memory.count(self.scorer.lm),
            "trainable_parameters": sum(p.size for p in self.scorer.parameters),
            "layout": "packed" if self.packed else "plain",
            "layout_reason": self.layout_reason,
            "compiled": self.compiled,
            "versions": {package: version(package) for package in ("mlx", "mlx-lm", "transformers")},
            **memory.facts(self.scorer, self.config, self.optimizer_config.micro_batch_tokens, self.device),
        }

    def gather(self, values: np.ndarray) -> np.ndarray:
        """Concatenates the ranks' arrays in rank order along axis 0; lengths may differ."""
        return self._ranks.gather(values)
