"""Scores and samples with given parameters, over the mesh."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from gvpo_core.training.config import ConfigError, ModelConfig
from gvpo_core.training.policy import Batch, Response, Tokens, hugging_face
from gvpo_core.training.policy.prefixes import Prefixes
from gvpo_core.training.sampling import Sampling
from gvpo_jax import generate, mesh, placement, update, weights
from gvpo_jax.families import SETTINGS, TEXT_OF, read_spec, text_config
from gvpo_jax.model import Parameters, Setup
from gvpo_jax.programs import Programs
from gvpo_jax.rows import Rows, ShardSplitting, plan


def open_scorer(config: ModelConfig, folder: Path, over: Mesh) -> tuple["Scorer", weights.Files]:
    """Opens the model of a Hugging Face folder. Returns its scorer, and its files, not read yet.

    Raises: ConfigError: gvpo_jax does not support the model, or its files cannot be read.
    """
    everything = hugging_face.read_config(folder, lambda _: SETTINGS)
    scale = (config.lora_alpha or 2 * config.lora_rank) / config.lora_rank if config.lora_rank else 0.0
    text = text_config(everything)
    setup = Setup(read_spec(text), over, config.dtype, config.gradient_checkpointing, scale)
    files = weights.Files(folder, text_of_more=everything.get("model_type") in TEXT_OF)
    return Scorer(setup, Programs(), text), files


class Scorer:
    """The model's programs. Parameters and adapters are arguments, because they change at every step."""

    def __init__(self, setup: Setup, programs: Programs, config: Mapping[str, Any]) -> None:
        """`config`: config.json of the language model."""
        self.setup, self.programs, self.config, self.mesh = setup, programs, config, setup.mesh
        self.sampling = placement.sampling_setup(setup)

    def check_lengths(self, batch: Batch) -> None:
        """Raises ConfigError if a row is longer than `Spec.longest`."""
        self._check_length(
            max((len(p) + len(r) for p, r in zip(batch.prompts, batch.responses, strict=True)), default=0)
        )

    def _check_length(self, tokens: int) -> None:
        longest = self.setup.spec.longest
        if longest and tokens > longest:
            raise ConfigError(
                f"a row has {tokens} tokens; the rotary embedding of {self.setup.spec.family.architecture} changes in "
                f"rows longer than {longest} tokens, which gvpo_jax does not support: use shorter prompts or responses "
                "(rollout.max_tokens)"
            )

    def values(self, rows: Rows, parameters: Parameters, adapters: Parameters) -> np.ndarray:
        """(B, P) token log-probs of this process's rows."""
        given = mesh.put_all(rows.arrays, self.mesh)
        out = mesh.batch_sharding(self.mesh)
        return mesh.local(self.programs.call(update.score_rows, (self.setup,), parameters, adapters, given, out=out))

    def logprobs(
        self, batch: Batch, splitting: ShardSplitting, parameters: Parameters, adapters: Parameters
    ) -> tuple[np.ndarray, int]:
        """(N,) float64 sums of token log-probs, and the number of tokens computed.

        Raises: ConfigError: see `check_lengths`.
        """
        self.check_lengths(batch)
        logprobs, tokens = np.zeros(len(batch)), 0
        for rows in plan(batch, splitting.rows(batch), splitting, self.mesh):
            values = self.values(rows, parameters, adapters)
            if rows.source is not None:
                logprobs[rows.source.responses] = rows.sums(values)
                tokens += rows.arrays["ids"].size
        return logprobs, tokens

    def sample(
        self,
        parameters: Parameters,
        adapters: Parameters,
        prompts: Sequence[Tokens],
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        end: Sequence[int],
        cache_tokens: Callable[[], int],
        prefixes: Prefixes | None = None,
    ) -> tuple[list[list[Response]], list[list[float]]]:
        """Returns len(seeds[i]) responses to prompts[i], and the sampler's log-prob of each at temperature 1.

        Args:
          cache_tokens: returns how many tokens of cache fit beside the parameters; called when those are placed.
          prefixes: kept states from which turns of episodes start, see `generate.generate`.
        """
        self._check_length(max(map(len, prompts), default=0) + sampling.max_tokens)
        placed = placement.place(self.sampling, self.programs, parameters, adapters)
        given = (*placed, prompts, seeds, sampling)
        options = {"end": end, "cache_tokens": cache_tokens(), "prefixes": prefixes}
        return generate.generate(self.sampling, self.programs, *given, **options)  # type: ignore[arg-type]
