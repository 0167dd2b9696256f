"""The JAX policy: what `gvpo_core.training` trains, on one device or over a mesh of many."""

import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gvpo_core.training.config import ConfigError, ModelConfig, OptimizerConfig
from gvpo_core.training.policy import (
    Batch,
    Coefficients,
    PolicySettings,
    Prompt,
    Response,
    Tokens,
    Update,
    hugging_face,
    layout,
    text,
)
from gvpo_core.training.policy.layout import Splitting
from gvpo_core.training.policy.memory import peak_memory
from gvpo_core.training.policy.step import plan_step
from gvpo_core.training.sampling import Sampling
from gvpo_jax import checkpoint, generate, mesh, update, weights
from gvpo_jax.families import SETTINGS, TEXT_OF, read_spec, text_config
from gvpo_jax.learner import Learner
from gvpo_jax.logprobs import CHUNK_BYTES, DEVICE_CHUNK_BYTES
from gvpo_jax.model import Parameters, Setup
from gvpo_jax.programs import Programs, out_of_memory
from gvpo_jax.update import Rows

CPU_CACHE_BYTES = 2**30  # of keys and values
CHECKED_TOKENS = 8  # sampled at load, to compare the sampler with the forward pass
log = logging.getLogger("gvpo.jax")


def load(model: ModelConfig, optimizer: OptimizerConfig, *, updates: int, reference: bool, seed: int) -> "JaxPolicy":
    """A Hugging Face folder of a known decoder as a policy.

    Joins the other processes first where the environment names them; see `mesh.join_processes`.

    Args:
      updates: optimizer steps of the whole run, for the schedule.
      reference: whether `logprobs(reference=True)` will be asked for; keeps a copy of the initial model without LoRA.
      seed: of newly made adapters.
    Raises: ConfigError: a folder, model, device, mesh or layout that cannot be used, and why.
    """
    return JaxPolicy(model, optimizer, updates=updates, reference=reference, seed=seed)


def _refuse_settings_of_others(config: ModelConfig) -> None:
    if config.lora_rank and config.lora_kind != "lora":
        raise ConfigError(f"model.lora_kind is {config.lora_kind!r}; gvpo_jax has lora alone")
    if config.sharding != "data_parallel":
        raise ConfigError(f"model.sharding is {config.sharding!r}, a setting of torch; in jax it is model.mesh_fsdp")


class JaxPolicy:
    """See `gvpo_core.training.policy.Policy`."""

    def __init__(
        self, config: ModelConfig, optimizer: OptimizerConfig, *, updates: int, reference: bool, seed: int
    ) -> None:
        self.settings = PolicySettings(optimizer, updates, reference, seed, config)
        self.config, self.optimizer_config = config, optimizer
        _refuse_settings_of_others(config)
        mesh.join_processes()
        self.mesh = mesh.make_mesh(config)
        self.rank, self.world_size = jax.process_index(), mesh.processes(self.mesh)
        self.tokenizer = hugging_face.load_tokenizer(config)
        self.folder = hugging_face.local_folder(config)
        config_of_all = hugging_face.read_config(self.folder, lambda _: SETTINGS)
        self.model_config = text_config(config_of_all)
        spec = read_spec(self.model_config)
        scale = (config.lora_alpha or 2 * config.lora_rank) / config.lora_rank if config.lora_rank else 0.0
        self.setup = Setup(spec, self.mesh, config.dtype, config.gradient_checkpointing, scale)
        self.programs = Programs()
        self._files = weights.Files(self.folder, text_of_more=config_of_all.get("model_type") in TEXT_OF)
        self._end = text.end_tokens(hugging_face.generation_eos(self.folder), self.tokenizer)
        self._load()
        self.packed, self.layout_reason = self._check()
        self._splitting = Splitting(
            self.packed, optimizer.micro_batch_tokens, optimizer.micro_batch_responses, spec.hidden
        )
        self._check_decoding()

    def _load(self) -> None:
        config, settings, spec, files = self.config, self.settings, self.setup.spec, self._files
        # Full fine-tuning steps float32 parameters: a step of 1e-6 of a bfloat16 number is lost to rounding.
        held = self.setup.compute if config.lora_rank else np.float32
        with out_of_memory("the model's parameters"):
            parameters = weights.load(spec, files, self.mesh, held)
        adapters = weights.make_adapters(config, spec, self.mesh, settings.seed) if config.lora_rank else {}
        self.learner = Learner(self.setup, self.programs, settings.optimizer, settings.updates, parameters, adapters)
        self._reference: Parameters | None = None
        if settings.reference and not config.lora_rank:
            with out_of_memory("the reference model"):
                self._reference = weights.load(spec, files, self.mesh, self.setup.compute)

    @property
    def steps_taken(self) -> int:
        """Optimizer steps taken."""
        return self.learner.steps_taken

    def reset(self) -> None:
        """Loads the initial model again, without optimizer state; every process calls."""
        del self.learner, self._reference
        self._load()

    def _check(self) -> tuple[bool, str]:
        """Chooses the layout, and compares packed rows with plain ones before trusting them."""
        name = self.setup.spec.family.architecture
        exact, reason = layout.packing(self.model_config)
        if self.config.layout == "plain":
            exact, reason = False, "model.layout = plain"
        elif exact:
            batch = layout.check_batch(self.setup.spec.vocabulary)
            shards = mesh.batch_shards(self.mesh)
            both = [layout.arrays(batch, layout.plan_rows(batch, packed=p, tokens=1 << 30)) for p in (True, False)]
            widest = tuple(max(sizes) for sizes in zip(*(update.shape_of(a, shards) for a in both), strict=True))
            packed, plain = (self._by_response(update.pad_rows(a, widest)) for a in both)
            worst, typical = (2e-3, 5e-4) if self.config.dtype == "float32" else (float("inf"), 0.1)
            difference = np.abs(packed - plain)
            if not (difference.max() <= worst and difference.mean() <= typical):
                exact, reason = False, f"packed log-probs differ by up to {difference.max():.3g} nat at load"
        if self.config.layout == "packed" and not exact:
            raise ConfigError(f"model.layout is packed, which is not exact for {name}: {reason}. Use auto or plain")
        log.info("%s: %s rows (%s)", name, "packed" if exact else "plain", reason)
        return exact, reason

    def _check_decoding(self) -> None:
        """Compares what the sampler says of a few responses with their log-probs by the forward pass.

        Raises: ConfigError: they differ, so that the sampler is not the policy that is trained.
        """
        prompts = list(dict.fromkeys(layout.check_batch(self.setup.spec.vocabulary).prompts))[:2]
        programs, self.programs = self.programs, Programs()  # its shapes are not the run's
        seeds = [[2 * i, 2 * i + 1] for i in range(len(prompts))]
        responses, sums = self.sample(prompts, seeds, Sampling(CHECKED_TOKENS))
        drawn = [(p, r.tokens, i) for i, (p, row) in enumerate(zip(prompts, responses, strict=True)) for r in row]
        scored = self.logprobs(Batch(*(list(column) for column in zip(*drawn, strict=True))))
        self.programs = programs
        lengths = [len(tokens) for _, tokens, _ in drawn]
        apart = mesh.gather(np.abs(scored - np.concatenate(sums)) / lengths)
        worst, typical = (2e-3, 5e-4) if self.config.dtype == "float32" else (1.0, 0.1)
        if not (apart.max() <= worst and apart.mean() <= typical):
            raise ConfigError(
                f"the sampler of {self.setup.spec.family.architecture} differs from its forward pass by up to "
                f"{apart.max():.3g} nat a token: gvpo_jax cannot sample from this model exactly"
            )

    def _check_length(self, tokens: int) -> None:
        longest = self.setup.spec.longest
        if longest and tokens > longest:
            raise ConfigError(
                f"a row has {tokens} tokens; the rotary embedding of {self.setup.spec.family.architecture} changes in "
                f"rows past {longest} tokens, which gvpo_jax does not compute: take shorter prompts or responses "
                "(rollout.max_tokens)"
            )

    def _by_response(self, rows: Rows) -> np.ndarray:
        """Token log-probs in the order of responses."""
        assert rows.source is not None
        values = self._values(rows, self.learner.parameters, self.learner.adapters)[rows.places]
        parts = np.split(values, np.cumsum(rows.source.lengths)[:-1])
        return np.concatenate([parts[i] for i in np.argsort(rows.source.responses)])

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
        return self.sample(prompts, seeds, sampling)[0]

    def sample(
        self, prompts: Sequence[Tokens], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> tuple[list[list[Response]], list[list[float]]]:
        """As `generate`, with each response's log-prob at temperature 1 as the sampler saw it."""
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts and {len(seeds)} rows of seeds; expected as many")
        self._check_length(max(map(len, prompts), default=0) + sampling.max_tokens)
        return generate.generate(
            self.setup,
            self.programs,
            self.learner.parameters,
            self.learner.adapters,
            prompts,
            seeds,
            sampling,
            end=self._end,
            cache_tokens=self._cache_tokens(),
        )

    def logprobs(self, batch: Batch, *, reference: bool = False) -> np.ndarray:
        """(N,) float64 sums of float32 token log-probs, nats, at temperature 1.

        Raises: ConfigError: a row past the length at which the rotary embedding changes.
          RuntimeError: the reference, where `load` was told that it is not needed.
        """
        return self._logprobs(batch, reference)[0]

    def _logprobs(self, batch: Batch, reference: bool = False) -> tuple[np.ndarray, int]:
        self._check_lengths(batch)
        parameters, adapters = self.learner.parameters, self.learner.adapters
        if reference and self.config.lora_rank:
            adapters = {}
        elif reference:
            if self._reference is None:
                raise RuntimeError("the reference was not loaded: load(..., reference=True)")
            parameters = self._reference
        found, tokens = np.zeros(len(batch)), 0
        for alike in self._plan(batch, range(len(batch))):
            for rows in alike:
                values = self._values(rows, parameters, adapters)
                if rows.source is not None:
                    found[rows.source.responses] = rows.sums(values)
                    tokens += rows.arrays["ids"].size
        return found, tokens

    def _check_lengths(self, batch: Batch) -> None:
        self._check_length(
            max((len(p) + len(r) for p, r in zip(batch.prompts, batch.responses, strict=True)), default=0)
        )

    def _plan(self, batch: Batch, chosen: Sequence[int]) -> list[list[Rows]]:
        return update.plan(batch, self._splitting.rows(batch, chosen), self.mesh)

    def _values(self, rows: Rows, parameters: Parameters, adapters: Parameters) -> np.ndarray:
        """(B, P) token log-probs of this process's rows."""
        given = mesh.put_all(rows.arrays, self.mesh)
        out = mesh.batch_sharding(self.mesh)
        return mesh.local(self.programs.call(update.score_rows, (self.setup,), parameters, adapters, given, out=out))

    def _cache_tokens(self) -> int:
        """Tokens of key-value cache that half of this process's free device memory holds (a gibibyte on CPU)."""
        spec = self.setup.spec
        token = spec.cache_numbers * self.setup.compute.itemsize
        free = 0
        for device in self.mesh.local_devices:
            facts = device.memory_stats() or {}
            free += (facts.get("bytes_limit", 0) - facts.get("bytes_in_use", 0)) // 2
        tensor = self.mesh.shape["tensor"]
        tensor = tensor if any(layer.key_heads % tensor for layer in spec.each) else 1
        return max(1, (free or CPU_CACHE_BYTES) // (token * tensor))

    # -- training

    def update(self, batch: Batch, coefficients: Coefficients, *, scored: np.ndarray | None = None) -> Update:
        """One AdamW step along -sum_i c_i grad log pi_i; see the protocol.

        Whole groups on one process go through one forward and one backward pass, whose activations stay on the device
        while the coefficients are made on the host; all else is scored first and then stepped along in a loop on the
        device.

        Raises: FloatingPointError: log-probs, coefficients or gradients that are not finite; nothing was changed.
        """
        self._check_lengths(batch)
        together = self.world_size == 1 and self.optimizer_config.strategy == "group"
        whole, rest, logprobs, factors, tokens = plan_step(
            batch, self._splitting, coefficients, together=together, scored=scored, score=self._logprobs
        )
        total = self.learner.no_gradient()
        for rows in (r for alike in update.plan(batch, whole, self.mesh) for r in alike):
            total, sums = self.learner.whole(total, rows, coefficients)
            assert rows.source is not None
            logprobs[rows.source.responses] = sums
            tokens += rows.arrays["ids"].size
        for alike in self._plan(batch, rest):
            total = self.learner.known(total, alike, factors)
            tokens += sum(rows.arrays["ids"].size for rows in alike if rows.source is not None)
        norm, rate = self.learner.step(total)
        details = {"compiled_programs": float(len(self.programs))}
        return Update(logprobs, norm, rate, tokens, self._peak_memory(), details)

    def _peak_memory(self) -> int:
        peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in self.mesh.local_devices]
        if any(peaks):
            return int(max(peaks))
        return peak_memory()

    # -- on disk

    def save(self, directory: Path) -> None:
        """Writes parameters or adapters, AdamW's moments and the step into an empty folder; every process calls."""
        facts = {**self._facts(), "step": self.learner.steps_taken}
        checkpoint.save(Path(directory), self.learner.arrays(), facts, self.rank == 0)

    def restore(self, directory: Path) -> None:
        """Reads what `save` wrote, from any mesh and number of processes.

        Raises: ConfigError: a checkpoint that does not fit, and where.
        """
        found, facts = checkpoint.restore(Path(directory), self.learner.arrays(), self._facts())
        self.learner.take(found, facts["step"])

    def _facts(self) -> dict[str, Any]:
        c = self.config
        facts: dict[str, Any] = {"architecture": self.setup.spec.family.architecture, "lora_rank": c.lora_rank}
        if c.lora_rank:
            facts |= {"lora_alpha": c.lora_alpha or 2 * c.lora_rank, "lora_targets": list(c.lora_targets)}
        return facts

    def export(self, directory: Path) -> None:
        """Writes a Hugging Face folder, adapters merged, in the compute dtype; every process calls."""
        directory = Path(directory)
        everywhere = lambda a: np.asarray(jax.device_put(a, mesh.replicated(self.mesh)).addressable_data(0))
        weights.export(
            directory,
            self.setup.spec,
            self.learner.parameters,
            self.learner.adapters,
            self.setup.scale,
            self.config.dtype,
            self.model_config,
            self.tokenizer,
            everywhere,
            self.rank == 0,
        )
        if self.rank == 0:
            weights.copy_settings(self.folder, directory, self._end)

    # -- facts and ranks

    def describe(self) -> Mapping[str, Any]:
        """Plain facts for the log and the run folder."""
        spec, first = self.setup.spec, self.mesh.devices.flat[0]
        model = weights.count(spec.shapes())
        trainable = weights.count(self.learner.shapes)
        return {
            "backend": "jax",
            "architecture": spec.family.architecture,
            "device": str(first.platform),
            "device_name": first.device_kind,
            "devices": self.mesh.size,
            "mesh": ", ".join(f"{name} {size}" for name, size in self.mesh.shape.items()),
            "ranks": self.world_size,
            "dtype": self.config.dtype,
            "end_tokens": text.told_end_tokens(self.tokenizer, self._end),
            "context": hugging_face.context(self.model_config),
            "parameters": model + (trainable if self.learner.adapters else 0),
            "trainable_parameters": trainable,
            "layout": "packed" if self.packed else "plain",
            "layout_reason": self.layout_reason,
            "versions": {
                name: version(name) for name in ("jax", "jaxlib", "optax", "orbax-checkpoint", "transformers")
            },
            **self._memory_facts(),
        }

    def _memory_facts(self) -> dict[str, Any]:
        """What the estimate of memory needs; see the protocol."""
        spec, first = self.setup.spec, self.mesh.local_devices[0]
        shape = {
            "layers": spec.layers,
            "hidden": spec.hidden,
            "intermediate": max(layer.intermediate for layer in spec.each),
            "heads": spec.heads,
            "kv_heads": max(layer.key_heads for layer in spec.each),
            "head_dim": max(layer.width for layer in spec.each),
            "vocabulary": spec.vocabulary,
        }
        facts: dict[str, Any] = {"shape": shape, "head_memory": CHUNK_BYTES.get(first.platform, DEVICE_CHUNK_BYTES)}
        limit = (first.memory_stats() or {}).get("bytes_limit")
        return facts | ({"device_memory": limit} if limit else {"cache_memory": CPU_CACHE_BYTES})

    def gather(self, values: np.ndarray) -> np.ndarray:
        """Concatenates the processes' arrays in their order along axis 0; lengths may differ."""
        return mesh.gather(values)
