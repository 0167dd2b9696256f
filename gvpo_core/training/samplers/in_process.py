"""vLLM's `LLM` in this process as the sampler, without a server."""

import contextlib
import importlib.util
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gvpo_core.training.config import ConfigError
from gvpo_core.training.config.engine import wrong_options
from gvpo_core.training.policy import Policy
from gvpo_core.training.policy.protocol import Tokens
from gvpo_core.training.samplers.protocol import Drawn, SamplerError
from gvpo_core.training.sampling import Sampling

_MISSING = 'engine.kind = "vllm" needs vLLM in this environment: pip install vllm'


def check_installed() -> None:
    """Raises ConfigError if vLLM is missing. Does not import it, since that takes seconds."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(_MISSING)


class VLLM:
    """Draws with vLLM's `LLM` on the device of this process. Each response is a request with its own seed.

    `refresh` loads the policy's weights, with adapters merged: from its tensors if it has `tensors`, else from an
    exported folder. On a GPU the engine sleeps (`LLM.sleep`) from the end of `generate` to the next `refresh` or
    `generate`. Then its weights are in the host's memory, and its cache of keys and values is freed.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "float32",
        folder: str | Path = "",
        gap_tolerance: float | None = None,
        gap_every: int = 0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
          model: the folder that the policy was loaded from.
          dtype: dtype of the engine's weights and computations.
          folder: folder for weights of a policy without `tensors`. Empty: a temporary folder.
          gap_tolerance: largest difference to the policy's log-probabilities, nats per token. None: see `GapCheck`.
          gap_every: steps between two comparisons. 0: every step.
          options: further arguments of `LLM`, such as gpu_memory_utilization.
        Raises: ConfigError: vLLM is missing, or does not start with this model and these options.
        """
        if wrong := [message for _, message in wrong_options(options or {})]:
            raise ConfigError("\n".join(wrong))
        try:
            import vllm
            from vllm.platforms import current_platform
        except ImportError as error:
            raise ConfigError(_MISSING) from error
        self.gap_tolerance, self.gap_every, self.failures = gap_tolerance, gap_every, list[str]()
        engine_dtype = str((options or {}).get("dtype", dtype))
        self.dtype = "" if engine_dtype == "auto" else engine_dtype  # auto: vLLM's choice, not the policy's dtype
        self.version: int | None = None  # of the engine's weights: steps taken
        self._platform, self._parameters, self._version = (
            current_platform,
            vllm.SamplingParams,
            f"vLLM {vllm.__version__}",
        )
        self._sleeps, self._asleep = bool(current_platform.is_sleep_mode_available()), False
        self._folder, self._end = Path(os.path.expanduser(folder)).absolute() if folder else None, tuple[int, ...]()
        defaults: dict[str, Any] = {"dtype": dtype, "skip_tokenizer_init": True, "enable_sleep_mode": self._sleeps}
        if current_platform.is_cpu():  # there vLLM 0.32 with chunked prefill fails if a request has a seed
            defaults["enable_chunked_prefill"] = False
        fixed = {"generation_config": "vllm", "logprobs_mode": "raw_logprobs"}
        try:
            with _engine_in_this_process():
                self._llm: Any = vllm.LLM(str(model), **(defaults | dict(options or {}) | fixed))
        except Exception as error:  # errors of vLLM, torch or transformers
            raise ConfigError(f"vLLM does not start with {model}: {type(error).__name__}: {_line(error)}") from error

    def describe(self) -> str:
        """Describes the sampler for the header."""
        return f"{self._version} in this process, the policy's weights before each step"

    def refresh(self, policy: Policy, version: int) -> None:
        """Loads the policy's weights if the engine lacks this version, and empties the prefix cache.

        Raises: SamplerError: vLLM did not load them. ConfigError: there are several ranks, or the policy has no end
          tokens.
        """
        if policy.world_size > 1:
            raise ConfigError(
                f'engine.kind = "vllm" draws in a run of one process, and this one has {policy.world_size} ranks: start'
                ' a server, and set engine.kind = "server"'
            )
        self._end = tuple(getattr(policy, "end_tokens", ()))
        if not self._end:
            raise ConfigError(f"{type(policy).__name__} has no end_tokens, at which vLLM ends a response")
        if version == self.version:
            return
        self.version = None  # until all weights are loaded
        self._wake()
        try:
            with self._source(policy, version) as source:
                self._llm.collective_rpc("reload_weights", kwargs=source)
            self._llm.apply_model(pack_heads)
            emptied = self._llm.reset_prefix_cache()
        except (ConfigError, SamplerError):
            raise
        except Exception as error:  # of vLLM or torch
            raise SamplerError(f"vLLM did not load the weights: {type(error).__name__}: {_line(error)}") from error
        if not emptied:
            raise SamplerError("vLLM did not empty its prefix cache: it still holds keys and values of older weights")
        self.version = version

    @contextlib.contextmanager
    def _source(self, policy: Policy, version: int) -> Iterator[dict[str, Any]]:
        """Yields arguments of vLLM's reload_weights: the tensors, or a folder that is removed after loading."""
        if hasattr(policy, "tensors"):
            yield {"weights_iterator": policy.tensors()}
            return
        parent = self._folder or Path(tempfile.gettempdir())
        folder = parent / f"gvpo-weights-{time.time_ns()}-{version}"  # a new folder: files may stay mapped
        try:
            policy.export(folder)
            yield {"weights_path": str(folder.resolve())}
        except OSError as error:
            raise SamplerError(f"the weights cannot be written to {parent}: {error.strerror or error}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def generate(
        self, prompts: Sequence[Tokens], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[Drawn]]:
        """Draws a response for each seed of each prompt. Responses that vLLM aborts are lost.

        Raises: SamplerError: vLLM fails; for example, a prompt is longer than options.max_model_len.
        """
        if self.version is None:
            raise SamplerError("vLLM has no weights of the policy yet: refresh(policy, version) comes before generate")
        self._wake()
        asked = [(place, seed) for place, row in enumerate(seeds) for seed in row]
        inputs = [{"prompt_token_ids": list(prompts[place])} for place, _ in asked]
        try:
            outputs = self._llm.generate(inputs, [self._request(seed, sampling) for _, seed in asked], use_tqdm=False)
        except Exception as error:  # of vLLM or torch
            raise SamplerError(f"vLLM drew nothing: {type(error).__name__}: {_line(error)}") from error
        self.failures = []
        drawn: list[list[Drawn]] = [[] for _ in prompts]
        for (place, _), output in zip(asked, outputs, strict=True):
            (completion,) = output.outputs
            ids, reason = tuple(completion.token_ids), completion.finish_reason
            if reason not in ("stop", "length") or not ids:
                self.failures.append(f"vLLM ended a response of {len(ids)} tokens with {reason!r}")
                continue
            drawn[place].append(Drawn(ids, reason == "stop", float(completion.cumulative_logprob), self.version))
        if self._sleeps:
            self._llm.sleep(level=1)
            self._asleep = True
        return drawn

    def _request(self, seed: int, sampling: Sampling) -> Any:
        """Sets every field, so that no default applies. Only the policy's end tokens end a response."""
        return self._parameters(
            n=1,
            seed=seed % 2**63,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or -1,
            min_p=sampling.min_p,
            repetition_penalty=1.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            stop_token_ids=list(self._end),
            ignore_eos=True,  # ignores the model's setting; only `stop_token_ids` counts
            logprobs=0,
            detokenize=False,
        )

    def _wake(self) -> None:
        if self._asleep:
            self._platform.empty_cache()  # torch caches memory that the update has freed
            self._llm.wake_up()
            self._asleep = False

    def close(self) -> None:
        """Ends the engine and frees its memory."""
        if self._llm is None:
            return
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        self._llm = self.version = None
        cleanup_dist_env_and_memory()


@contextlib.contextmanager
def _engine_in_this_process() -> Iterator[None]:
    """Makes vLLM start its engine in this process. By default it uses a separate process.

    Also hides a log record: at start vLLM renders a chat, which fails without a tokenizer and is logged with traceback.
    """
    name, logger = "VLLM_ENABLE_V1_MULTIPROCESSING", logging.getLogger("vllm.renderers.base")
    before = os.environ.get(name)
    os.environ[name] = "0"
    logger.addFilter(_tells_something)
    try:
        yield
    finally:
        logger.removeFilter(_tells_something)
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _tells_something(record: logging.LogRecord) -> bool:
    return record.msg != "Chat template warmup failed"


def pack_heads(model: Any) -> None:
    """Packs heads again. On CPU vLLM uses a packed copy of the head, and does not update that of a tied head."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for layer in model.modules():
        if isinstance(layer, VocabParallelEmbedding) and hasattr(layer, "cpu_linear"):
            dispatch_cpu_unquantized_gemm(layer, remove_weight=False)


def _line(error: Exception) -> str:
    """Returns the error message in one line."""
    return " ".join(str(error).split())[:300]
