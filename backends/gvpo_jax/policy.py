"""The JAX policy: the model that `gvpo_core.training` trains, on one device or over a mesh of devices."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gvpo_core.training.config import ConfigError, ModelConfig, OptimizerConfig
from gvpo_core.training.policy import Batch, Coefficients, PolicyFacts, Response, Tokens, Update
from gvpo_core.training.policy.base import LanguageModelPolicy
from gvpo_core.training.policy.step import StepPlan
from gvpo_core.training.sampling import Sampling
from gvpo_jax import checkpoint, export, memory, placement, weights
from gvpo_jax import mesh as meshes
from gvpo_jax import rows as planning
from gvpo_jax.adapters import make_adapters
from gvpo_jax.check import check_decoding, check_layout, continues, in_blocks
from gvpo_jax.learner import Learner
from gvpo_jax.mesh import is_tpu
from gvpo_jax.model import Parameters
from gvpo_jax.programs import out_of_memory
from gvpo_jax.ranks import Ranks
from gvpo_jax.scorer import open_scorer


def load(model: ModelConfig, optimizer: OptimizerConfig, *, updates: int, reference: bool, seed: int) -> "JaxPolicy":
    """Loads a Hugging Face folder of a supported decoder as a policy.

    Args:
      updates: optimizer steps of the whole run, for the schedule.
      reference: whether `logprobs(reference=True)` will be called. Without LoRA this keeps a copy of the initial model.
      seed: seed of new adapters.
    Raises: ConfigError: the folder, model, device or layout cannot be used; the message says why.
    """
    return JaxPolicy(model, optimizer, updates=updates, reference=reference, seed=seed)


class JaxPolicy(LanguageModelPolicy):
    """See `gvpo_core.training.policy.Policy`."""

    backend = "jax"
    _ranks: Ranks
    _splitting: planning.ShardSplitting

    def __init__(
        self, config: ModelConfig, optimizer: OptimizerConfig, *, updates: int, reference: bool, seed: int
    ) -> None:
        super().__init__(config, optimizer, Ranks, updates=updates, reference=reference, seed=seed)
        self.mesh, config = self._ranks.mesh, self.config
        self.scorer, self._files = open_scorer(config, self.folder, self.mesh)
        self.setup, self.programs = self.scorer.setup, self.scorer.programs
        self._load()
        model_arguments = (self.scorer, self.learner.parameters, self.learner.adapters)
        if is_tpu(self.mesh) and in_blocks(*model_arguments):
            self.attend_in_blocks()
        self.packed, self.layout_reason = check_layout(*model_arguments, config)
        self._splitting = self._split(0 if self.setup.in_blocks else self.setup.spec.hidden)
        check_decoding(*model_arguments, packed=self.packed, dtype=config.dtype, end=self._end)

    @property
    def architecture(self) -> str:
        """See `LanguageModelPolicy.architecture`."""
        return self.setup.spec.family.architecture

    def attend_in_blocks(self) -> None:
        """Makes attention use the kernels of `blocks`."""
        self.setup = self.scorer.setup = self.learner.setup = replace(self.setup, in_blocks=True)
        self.scorer.sampling = placement.sampling_setup(self.setup)

    def _load(self) -> None:
        config, settings, spec, files = self.config, self.settings, self.setup.spec, self._files
        # Full fine-tuning steps float32 parameters: a step of 1e-6 of a bfloat16 number is lost to rounding.
        stored_dtype = self.setup.compute if config.lora_rank or self.frozen else np.float32
        self._width = np.dtype(stored_dtype).itemsize
        with out_of_memory("the model's parameters"):
            parameters = weights.load(spec, files, self.mesh, stored_dtype)
        adapters = make_adapters(config, spec, self.mesh, settings.seed) if config.lora_rank else {}
        optimizer = None if self.frozen else settings.optimizer
        self.defers = config.gradient_checkpointing and not self.frozen  # else activations would be stored
        self.learner = Learner(self.setup, self.programs, optimizer, parameters, adapters)
        self._load_reference()

    def _load_reference(self) -> None:
        self._reference: Parameters = {}  # all parameters; under LoRA the adapters
        if self.settings.reference and not self.config.lora_rank:
            with out_of_memory("the reference model"):
                self._reference = weights.load(self.setup.spec, self._files, self.mesh, self.setup.compute)

    def _split(self, hidden: int, rope: Any = None) -> planning.ShardSplitting:
        c, shards = self.optimizer_config, meshes.batch_shards(self.mesh)
        limits, head = (c.micro_batch_tokens, c.micro_batch_responses), self.setup.spec.head_share
        return planning.ShardSplitting(self.packed, *limits, hidden, rope, shards, head)

    def _unload(self) -> None:
        self._splitting.shapes.clear()
        del self.learner, self._reference

    # -- sampling and scoring

    def _generate(
        self, prompts: Sequence[Tokens], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[Response]]:
        return self.sample(prompts, seeds, sampling)[0]

    def sample(
        self, prompts: Sequence[Tokens], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> tuple[list[list[Response]], list[list[float]]]:
        """Like `generate`, and also returns the sampler's log-prob of each response at temperature 1."""
        return self.scorer.sample(
            self.learner.parameters,
            self.learner.adapters,
            prompts,
            seeds,
            sampling,
            end=self._end,
            cache_tokens=self._cache_tokens,
            prefixes=self._prefixes,
        )

    def _why_no_prefixes(self) -> str:
        if meshes.processes(self.mesh) > 1:
            return "their rows are on several processes"
        given = (self.scorer, self.learner.parameters, self.learner.adapters)
        return continues(*given, packed=self.packed, dtype=self.config.dtype)

    def _logprobs(self, batch: Batch, reference: bool = False) -> tuple[np.ndarray, int]:
        parameters: Any = self.learner.parameters
        adapters = self.learner.adapters
        if reference and self.config.lora_rank:
            adapters = self._reference
        elif reference:
            parameters = self._reference
        return self.scorer.logprobs(batch, self._splitting, parameters, adapters)

    def _renew_reference(self) -> None:
        with out_of_memory("the reference's adapters" if self.config.lora_rank else "the reference model"):
            self._reference = self.learner.copied(np.float32 if self.config.lora_rank else self.setup.compute)

    def _cache_tokens(self) -> int:
        return memory.cache_tokens(self.scorer.sampling)

    # -- training

    def _update(self, batch: Batch, plan: StepPlan, coefficients: Coefficients, rate: float) -> Update:
        """Runs one forward and one backward pass for groups that are complete on one process.

        Their activations stay on the device while the host computes the coefficients; for groups in several
        micro-batches only the layers' inputs stay. All other passes are queued without waiting.
        """
        self.scorer.check_lengths(batch)
        logprobs, tokens = plan.logprobs, plan.tokens
        total = self.learner.no_gradient()
        grouped = [[rows] for rows in planning.plan(batch, plan.grouped, self._splitting, self.mesh)]
        deferred = ([[row] for rows in micro for row in rows] for micro in plan.deferred)
        for micro in (*grouped, *(planning.plan(batch, of_round, self._splitting, self.mesh) for of_round in deferred)):
            total, sums, responses = self.learner.grouped(total, micro, coefficients)
            logprobs[responses] = sums
            tokens += sum(rows.arrays["ids"].size for rows in micro)
        for rows in planning.plan(batch, self._splitting.rows(batch, plan.rest), self._splitting, self.mesh):
            total = self.learner.known(total, rows, plan.factors)
            tokens += rows.arrays["ids"].size if rows.source is not None else 0
        norm = self.learner.step(total, rate, self.steps_taken)
        details = {"compiled_programs": float(len(self.programs))}
        return Update(logprobs, norm, rate, tokens, memory.peak(self.mesh), details)

    # -- on disk

    def _save(self, directory: Path, header: dict[str, Any]) -> None:
        header = {**header, "shapes": self._splitting.shapes}
        checkpoint.save(directory, self._arrays(self.renewed), header, self.rank == 0)

    def _restore(self, directory: Path, header: dict[str, Any]) -> None:
        renewed = bool(header.get("renewed"))
        arrays = checkpoint.restore(directory, self._arrays(renewed))
        self.learner.take(arrays)
        self._splitting.shapes[:] = [tuple(shape) for shape in header.get("shapes", [])]
        if renewed:
            self._reference = arrays["reference"]
        elif self.renewed:
            self._load_reference()

    def _arrays(self, renewed: bool) -> dict[str, Any]:
        return self.learner.arrays() | (
            {"reference": dict(self._reference or self.learner.adapters)} if renewed else {}
        )

    def save_parameters(self, directory: Path) -> None:
        """See `Policy.save`."""
        arrays, compute = self.learner.parameters_alone(), self.setup.compute
        if not self.config.lora_rank and compute != np.float32:
            arrays = {"parameter": self.learner.copied(compute)}
        checkpoint.save(Path(directory), arrays, self._header(), self.rank == 0)

    def load_parameters(self, directory: Path) -> None:
        """See `Policy.save`."""
        self._header_in(directory)
        self.learner.take_parameters(checkpoint.restore(Path(directory), self.learner.parameters_alone()))

    def export(self, directory: Path, *, own_head: bool = False) -> None:
        """Writes a Hugging Face folder in the compute dtype, adapters merged. Every rank must call it. See `Policy`."""
        given = (self.config.dtype, self.scorer.config, self.folder, self._end, self.tokenizer)
        export.export(Path(directory), self.setup, self.learner, *given, self.rank == 0, own_head)

    def export_adapters(self, directory: Path) -> None:
        """Writes only the adapters, in peft's format. Every rank must call it."""
        if self._files.text_of_more:
            raise ConfigError(
                f"gvpo_jax trains the language model of {self.config.path!r}, whose layers have other names in the "
                "whole model: export the merged model instead (without --adapters)"
            )
        export.export_adapters(Path(directory), self.setup, self.learner, self.config, self.rank == 0)

    # -- facts

    def describe(self) -> PolicyFacts:
        """Returns facts for the log and the run folder."""
        spec, first = self.setup.spec, self.mesh.devices.flat[0]
        trainable = 0 if self.frozen else weights.count(self.learner.shapes)
        return self._describe(
            device=str(first.platform),
            device_name=first.device_kind,
            model=self.scorer.config,
            vocabulary=spec.vocabulary,
            parameters=weights.count(spec.shapes()) + (trainable if self.learner.adapters else 0),
            trainable_parameters=trainable,
            packages=("jax", "jaxlib", "optax", "orbax-checkpoint", "transformers"),
            memory=memory.facts(spec, self.mesh, self.scorer.sampling, self._width, self.setup.in_blocks, self.defers),
            devices=self.mesh.size,
            mesh=", ".join(f"{name} {size}" for name, size in self.mesh.shape.items()),
        )
