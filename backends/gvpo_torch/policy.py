"""The PyTorch policy: what `gvpo_core.training` trains, on one device or several."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
    layout,
    text,
)
from gvpo_core.training.policy.layout import Splitting
from gvpo_core.training.policy.memory import peak_memory
from gvpo_core.training.policy.step import learning_rate, plan_step
from gvpo_core.training.sampling import Sampling
from gvpo_torch import check, checkpoint, generate, model
from gvpo_torch.logprobs import CPU_TILE_BYTES, DEVICE_TILE_BYTES
from gvpo_torch.ranks import Ranks
from gvpo_torch.update import EMPTY, Backward, clip, make_optimizer

CPU_CACHE_BYTES = 2**30  # of keys and values, twice where a layer's grow


def load(model: ModelConfig, optimizer: OptimizerConfig, *, updates: int, reference: bool, seed: int) -> "TorchPolicy":
    """A transformers causal language model as a policy.

    Args:
      updates: optimizer steps of the whole run, for the schedule.
      reference: whether `logprobs(reference=True)` will be asked for; keeps a copy of the initial model without LoRA.
      seed: of newly made adapters.
    Raises: ConfigError: a folder, model, device or layout that cannot be used, and why.
    """
    return TorchPolicy(model, optimizer, updates=updates, reference=reference, seed=seed)


class TorchPolicy:
    """See `gvpo_core.training.policy.Policy`."""

    def __init__(
        self, config: ModelConfig, optimizer: OptimizerConfig, *, updates: int, reference: bool, seed: int
    ) -> None:
        self.settings = PolicySettings(optimizer, updates, reference, seed, config)
        self.config, self.optimizer_config, self.updates = config, optimizer, updates
        self._ranks = Ranks(config)
        self.rank, self.world_size, self.device = self._ranks.rank, self._ranks.world_size, self._ranks.device
        self._load()

    def _load(self) -> None:
        config, optimizer, reference, seed = (
            self.config,
            self.optimizer_config,
            self.settings.reference,
            self.settings.seed,
        )
        self.scorer, self.tokenizer = model.load_scorer(config, self.device, seed)
        self.packed, self.layout_reason = check.check(self.scorer, config, self.device)
        counts = {True: 0, False: 0}
        for p in self.scorer.parameters():
            counts[p.requires_grad] += p.numel()
        self.parameters, self.trainable = sum(counts.values()), counts[True]
        self._reference = model.load_reference(config, self.device) if reference and not config.lora_rank else None
        self._trained: torch.nn.Module = self.scorer
        self._optimizer = make_optimizer(self.scorer.parameters(), optimizer)
        if self._ranks.accelerator is not None:
            self._prepare()
        self._named = {name.removeprefix("lm."): p for name, p in self.scorer.named_parameters() if p.requires_grad}
        self._splitting = Splitting(
            self.packed,
            optimizer.micro_batch_tokens,
            optimizer.micro_batch_responses,
            getattr(self.scorer.config, "hidden_size", 0) or 0,
            self.scorer.rope,
        )
        self._step = 0
        generation = self.scorer.base.generation_config
        given = hugging_face.generation_eos(hugging_face.local_folder(config))
        self._end = text.end_tokens(given, self.tokenizer)
        if generation is not None:
            generation.eos_token_id = text.exported_eos(given, self._end)

    @property
    def steps_taken(self) -> int:
        """Optimizer steps taken."""
        return self._step

    def reset(self) -> None:
        """Loads the initial model again, without optimizer state; every rank calls."""
        del self.scorer, self._trained, self._optimizer, self._named, self._reference
        if self._ranks.accelerator is not None:
            self._ranks.accelerator.free_memory()
        self._load()

    def _prepare(self) -> None:
        accelerator = self._ranks.accelerator
        self._trained, prepared = accelerator.prepare(self.scorer, self._optimizer)
        self._optimizer = prepared.optimizer
        if self._ranks.sharded and self._reference is not None:
            from torch.distributed.fsdp import fully_shard

            kinds = set(self._reference._no_split_modules)
            for module in self._reference.modules():
                if type(module).__name__ in kinds:
                    fully_shard(module)
            fully_shard(self._reference)

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
        self._trained.eval()
        with torch.inference_mode(), self.scorer.autocast(), self._in_step(self.scorer) as forward:
            return generate.generate(
                self.scorer,
                forward,
                prompts,
                seeds,
                sampling,
                end=self._end,
                device=self.device,
                cache_tokens=self._cache_tokens(),
            )

    def logprobs(self, batch: Batch, *, reference: bool = False) -> np.ndarray:
        """(N,) float64 sums of float32 token log-probs, nats, at temperature 1.

        Raises: RuntimeError: the reference, where `load` was told that it is not needed.
        """
        return self._logprobs(batch, reference)[0]

    def _logprobs(self, batch: Batch, reference: bool = False) -> tuple[np.ndarray, int]:
        scorer, switched = self.scorer, contextlib.nullcontext()
        if reference and self.scorer.adapted:
            switched = self.scorer.lm.disable_adapter()
        elif reference:
            if self._reference is None:
                raise RuntimeError("the reference was not loaded: load(..., reference=True)")
            scorer = self._reference
        found, tokens = np.zeros(len(batch)), 0
        self._trained.eval()
        with torch.inference_mode(), switched, scorer.autocast(), self._in_step(scorer) as forward:
            for rows in self._splitting.rows(batch):
                arrays = layout.arrays(batch, rows)
                values = model.score(forward, arrays, self.device)
                found[arrays.responses] = arrays.sums(values.cpu().numpy())
                tokens += arrays.ids.size
        return found, tokens

    @contextlib.contextmanager
    def _in_step(self, scorer: model.Scorer) -> Iterator[Any]:
        """The scorer to call without gradients. Sharded, every rank must call it as often: some for nothing."""
        if not self._ranks.sharded:
            yield scorer
            return

        def forward(*args: Any, **options: Any) -> Tensor:
            self._ranks.most(1)
            return scorer(*args, **options)

        yield forward
        while self._ranks.most(0):
            model.score(scorer, EMPTY, self.device)

    def _cache_tokens(self) -> int:
        """Tokens of key-value cache that half of the free device memory holds (a gibibyte on CPU)."""
        sizes = model.shape(self.scorer) or {"layers": 32, "kv_heads": 1, "head_dim": 4096}
        token = 2 * sizes["layers"] * sizes["kv_heads"] * sizes["head_dim"] * self.scorer.dtype.itemsize
        free = torch.cuda.mem_get_info(self.device)[0] // 2 if self.device.type == "cuda" else CPU_CACHE_BYTES
        return max(1, free // (2 * token))  # growing a cache holds a layer twice, dropping rows as well

    # -- training

    def update(self, batch: Batch, coefficients: Coefficients, *, scored: np.ndarray | None = None) -> Update:
        """One AdamW step along -sum_i c_i grad log pi_i; see the protocol.

        Raises: FloatingPointError: log-probs, coefficients or gradients that are not finite; nothing was changed.
        """
        optimizer = self._optimizer
        optimizer.zero_grad(set_to_none=True)
        together = self.world_size == 1 and self.optimizer_config.strategy == "group"
        whole, rest, logprobs, factors, tokens = plan_step(
            batch, self._splitting, coefficients, together=together, scored=scored, score=self._logprobs
        )
        backward = Backward(self._score_autocast, self._trained, self.world_size)
        with model.checkpointing(self.scorer):
            if whole:
                fresh = backward.whole(batch, whole, coefficients)
                logprobs = np.where(np.isnan(fresh), logprobs, fresh)
            micro = self._splitting.rows(batch, rest)
            backward.known(batch, micro, factors, self._ranks.most(len(micro)))
        norm = clip(self._named.items(), self.optimizer_config.max_gradient_norm)
        rate = learning_rate(self.optimizer_config, self._step, self.updates)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self._step += 1
        return Update(logprobs, norm, rate, tokens + backward.tokens, self._peak_memory())

    def _score_autocast(self, arrays: layout.Arrays) -> Tensor:
        with self.scorer.autocast():
            return model.score(self._trained, arrays, self.device)

    def _peak_memory(self) -> int:
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return peak
        return peak_memory()

    # -- on disk

    def save(self, directory: Path) -> None:
        """Writes parameters or adapters, AdamW's moments and the step into an empty folder; every rank calls."""
        facts = {**self._facts(), "step": self._step}
        checkpoint.save(Path(directory), self._named, self._optimizer, facts, self.rank == 0)

    def restore(self, directory: Path) -> None:
        """Reads what `save` wrote, from any number of ranks.

        Raises: ConfigError: a checkpoint that does not fit, and where.
        """
        self._step = checkpoint.restore(Path(directory), self._named, self._optimizer, self._facts())["step"]

    def _facts(self) -> dict[str, Any]:
        c = self.config
        facts: dict[str, Any] = {"architecture": type(self.scorer.base).__name__, "lora_rank": c.lora_rank}
        if c.lora_rank:
            facts |= {"lora_kind": c.lora_kind, "lora_alpha": c.lora_alpha or 2 * c.lora_rank}
            facts |= {"lora_targets": list(c.lora_targets)}
        return facts

    def export(self, directory: Path) -> None:
        """Writes a Hugging Face folder, adapters merged, in the compute dtype; every rank calls."""
        dtype = getattr(torch, self.config.dtype)
        checkpoint.export(Path(directory), self.scorer.lm, self.tokenizer, dtype, self.rank == 0)

    # -- facts and ranks

    def describe(self) -> Mapping[str, Any]:
        """Plain facts for the log and the run folder."""
        names = ("torch", "transformers", "accelerate", *(("peft",) if self.config.lora_rank else ()))
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        return {
            "backend": "torch",
            "architecture": type(self.scorer.base).__name__,
            "device": str(self.device),
            "device_name": name,
            "ranks": self.world_size,
            "sharding": self.config.sharding if self.world_size > 1 else "none",
            "dtype": self.config.dtype,
            "end_tokens": text.told_end_tokens(self.tokenizer, self._end),
            "context": hugging_face.context(self.scorer.config.to_dict()),
            "parameters": self.parameters,
            "trainable_parameters": self.trainable,
            "layout": "packed" if self.packed else "plain",
            "layout_reason": self.layout_reason,
            "versions": {package: version(package) for package in names},
            **self._memory_facts(),
        }

    def _memory_facts(self) -> dict[str, Any]:
        """What the estimate of memory needs; see the protocol. Nothing for a model whose shape has other names."""
        shape = model.shape(self.scorer)
        if shape is None:
            return {}
        facts: dict[str, Any] = {"shape": shape}  # head_memory: a tile of logprobs.py
        if self.device.type == "cuda":
            facts["device_memory"] = torch.cuda.get_device_properties(self.device).total_memory
            return facts | {"head_memory": DEVICE_TILE_BYTES}
        # malloc gives little of what a step frees back to the system: measured on SmolLM2 and on a smaller model
        return facts | {"head_memory": CPU_TILE_BYTES, "cache_memory": CPU_CACHE_BYTES // 2, "allocator": 1.7}

    def gather(self, values: np.ndarray) -> np.ndarray:
        """Concatenates the ranks' arrays in rank order along axis 0; lengths may differ."""
        return self._ranks.gather(values)
