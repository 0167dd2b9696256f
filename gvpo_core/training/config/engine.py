"""Finds settings of the sampler and its engine that cannot run."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any
from urllib.parse import urlsplit

from gvpo_core.training.config.servers import EngineConfig, TeacherConfig
from gvpo_core.training.config.settings import Config

SAMPLERS = ("policy", "engine", "teacher")
"""Values of rollout.sampler that are not import paths."""

REQUEST_FIELDS = ("model", "prompt", "messages", "n", "seed", "temperature", "stream", "logprobs", "return_token_ids")
"""Fields that every request sets."""
MOST_AHEAD = 1000
OPTIONAL_FIELDS = (
    "max_tokens",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
"""Fields that a request sets unless `omit` names them."""


SGLANG_FIELDS = ("n", "max_new_tokens", "temperature", "sampling_seed")
"""Fields of `sampling_params` that every request to SGLang sets."""
SGLANG_OPTIONAL_FIELDS = tuple(name for name in OPTIONAL_FIELDS if name != "max_tokens")


def wrong_server(url: str, api_key: str, ranges: Iterable[tuple[str, Any, bool, str]]) -> Iterator[tuple[str, str]]:
    """Yields (field, what is wrong with it) for the address, the key and the numbers of a server.

    Args:
      ranges: (field, its value, whether it is good, what was expected) of further fields.
    """
    if _is_address(url) and "@" in urlsplit(url).netloc:
        yield "url", "url holds a user name or password; expected http://HOST:PORT, and a key in api_key"
    elif not _is_address(url):
        yield "url", f"url = {url!r}; expected http://HOST:PORT or https://HOST, without /v1"
    for name, value, good, wanted in ranges:
        if not good:
            yield name, f"{name} = {value!r}; expected {wanted}"
    if api_key and not re.fullmatch(r"\$[A-Za-z_]\w*", api_key):
        yield "api_key", "api_key is not '$NAME'; expected the name of the environment variable that holds the key"


def server_ranges(server: EngineConfig | TeacherConfig) -> list[tuple[str, Any, bool, str]]:
    """Returns the ranges for `wrong_server` of the numbers that all servers have."""
    return [
        ("concurrency", server.concurrency, 1 <= server.concurrency <= 4096, "1 to 4,096"),
        ("tries", server.tries, 1 <= server.tries <= 1000, "1 to 1,000"),
        ("deadline", server.deadline, server.deadline > 0, "a number of seconds above 0"),
        ("pause", server.pause, server.pause >= 0, ">= 0"),
    ]


def wrong_engine(engine: EngineConfig) -> Iterator[tuple[str, str]]:
    """Yields (field, what is wrong with it) for an engine alone, in any run."""
    if engine.kind == "vllm":
        yield from wrong_in_process(engine)
        return
    if engine.options:
        name = f"options.{next(iter(engine.options))}"
        yield "options", f"{name} is set, and kind = {engine.kind!r} starts no vLLM: remove it"
    gap = engine.gap_tolerance
    ranges = [*server_ranges(engine), ("gap_tolerance", gap, gap is None or gap > 0, "a number above 0")]
    ranges += [("gap_every", engine.gap_every, engine.gap_every >= 0, "0 or more steps")]
    yield from wrong_server(engine.url, engine.api_key, ranges)
    if not engine.model.strip():
        yield "model", f"model = {engine.model!r}; expected the name of the model on the server"
    yield from _wrong_weights(engine)
    if engine.dtype not in ("auto", "float32", "bfloat16", "float16"):
        yield "dtype", f"dtype = {engine.dtype!r}; expected auto, float32, bfloat16 or float16"
    if engine.tokens not in ("ids", "text", "chat"):
        yield "tokens", f"tokens = {engine.tokens!r}; expected ids, text or chat"
    if engine.kind == "sglang" and engine.tokens != "ids":
        yield (
            "tokens",
            f"tokens = {engine.tokens!r} and kind = 'sglang': its own endpoint takes token ids; set kind = 'server' for"
            " its OpenAI-compatible one",
        )
    if engine.tokens != "ids" and engine.gap_tolerance is not None:
        yield (
            "gap_tolerance",
            f"gap_tolerance = {engine.gap_tolerance} and tokens = {engine.tokens!r}: text has no log-probabilities to"
            " compare",
        )
    is_sglang = engine.kind == "sglang"
    required, optional = (SGLANG_FIELDS, SGLANG_OPTIONAL_FIELDS) if is_sglang else (REQUEST_FIELDS, OPTIONAL_FIELDS)
    for name in engine.omit:
        if name not in optional:
            yield "omit", f"omit = {name!r}; expected names among {', '.join(optional)}"
    for name in engine.fields:
        if name in (*required, *optional):
            yield "fields", f"fields.{name} is set by the run itself; expected other fields"


def _wrong_weights(engine: EngineConfig) -> Iterator[tuple[str, str]]:
    """Yields (field, what is wrong with it) for the settings that send weights to a server."""
    if engine.transfer not in ("folder", "nccl", "ipc", "tcp"):
        yield "transfer", f"transfer = {engine.transfer!r}; expected folder, nccl, ipc or tcp"
    elif engine.transfer == "folder":
        if engine.weights not in ("kept", "adapters", "model") or (engine.weights != "kept") != bool(engine.folder):
            both = f"weights = {engine.weights!r} and folder = {str(engine.folder)!r}"
            yield "weights", f"{both}; expected adapters or model, and a folder"
    elif engine.kind == "sglang":
        yield "transfer", f"transfer = {engine.transfer!r} and kind = 'sglang': only vLLM takes it; set folder"
    elif engine.weights != "model":
        yield "transfer", f"transfer = {engine.transfer!r} sends the whole model: set weights = 'model'"
    elif engine.folder:
        yield "folder", f"folder is set, and transfer = {engine.transfer!r} writes no files: remove it"
    if engine.listen and engine.transfer not in ("nccl", "tcp"):
        yield "listen", f"listen is set, and transfer = {engine.transfer!r} waits for no worker: remove it"
    if engine.listen and not re.fullmatch(r"[^:/\s]+(:\d{1,5})?", engine.listen):
        yield "listen", f"listen = {engine.listen!r}; expected HOST or HOST:PORT"
    if engine.sleep and engine.kind == "sglang":
        yield "sleep", "sleep is set, and kind = 'sglang': only vLLM's server is put to sleep"


OWN_OPTIONS = (
    "model",
    "enable_sleep_mode",
    "skip_tokenizer_init",
    "generation_config",
    "logprobs_mode",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "distributed_executor_backend",
)
"""Arguments of vLLM's LLM that the run sets itself."""
IN_PROCESS = ("kind", "options", "folder", "gap_tolerance", "gap_every")
"""Fields of an engine in this process. The others are for servers."""


def wrong_options(options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields (field, what is wrong with it) for the arguments of vLLM's LLM."""
    for name in options:
        if name in OWN_OPTIONS:
            yield "options", f"options.{name} is set by the run itself; expected other arguments of LLM"


def wrong_in_process(engine: EngineConfig) -> Iterator[tuple[str, str]]:
    """Yields (field, what is wrong with it) for vLLM in this process."""
    default = EngineConfig()
    for name in (f.name for f in dataclasses.fields(engine) if f.name not in IN_PROCESS):
        if getattr(engine, name) != getattr(default, name):
            yield name, f"{name} is set, and kind = 'vllm' has no server: remove it, or set kind = 'server'"
            break
    if engine.gap_tolerance is not None and not engine.gap_tolerance > 0:
        yield "gap_tolerance", f"gap_tolerance = {engine.gap_tolerance!r}; expected a number above 0"
    if engine.gap_every < 0:
        yield "gap_every", f"gap_every = {engine.gap_every!r}; expected 0 or more steps"
    yield from wrong_options(engine.options)


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is not a number
        return False


def wrong_sampler(config: Config) -> Iterator[tuple[str, str]]:
    """Yields (field, message) for mistakes in rollout.sampler, [engine] and evaluation.sampler, alone or together."""
    name, engine, sampled = config.rollout.sampler, config.engine, config.rollout.source != "recorded"
    if name not in SAMPLERS and not (":" in name and all(name.rpartition(":")[::2])):
        close = get_close_matches(name, SAMPLERS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        yield (
            "rollout.sampler",
            f"rollout.sampler = {name!r}; expected 'policy', 'engine', 'teacher' or file.py:Sampler{hint}",
        )
        return
    if name != "policy" and not sampled:
        yield (
            "rollout.sampler",
            f"rollout.sampler = {name!r}, and rollout.source = 'recorded' draws nothing: leave one of them out",
        )
    if not 0 <= config.rollout.own_responses < max(config.rollout.responses, 1):
        yield (
            "rollout.own_responses",
            f"rollout.own_responses = {config.rollout.own_responses}; expected 0 to {config.rollout.responses - 1},"
            " fewer than rollout.responses",
        )
    if config.rollout.own_responses and not sampled:
        yield "rollout.own_responses", "rollout.own_responses is set, and rollout.source = 'recorded' draws nothing"
    if not 0 <= config.rollout.ahead <= MOST_AHEAD:
        yield "rollout.ahead", f"rollout.ahead = {config.rollout.ahead}; expected 0 to {MOST_AHEAD}"
    if config.rollout.ahead and config.rollout.equal == "redraw":
        both = f"rollout.ahead = {config.rollout.ahead} and rollout.equal = 'redraw'"
        yield (
            "rollout.ahead",
            f"{both}: which prompts come next is not known ahead; set rollout.equal = 'skip' or 'keep'",
        )
    if config.rollout.ahead and config.data.curriculum:
        both = f"rollout.ahead = {config.rollout.ahead} and data.curriculum = {config.data.curriculum}"
        yield "rollout.ahead", f"{both}: which prompts come next is not known ahead; leave one of them out"
    if config.rollout.ahead_device and (name != "policy" or not config.rollout.ahead):
        why = "rollout.ahead = 0" if not config.rollout.ahead else f"rollout.sampler = {name!r}"
        yield (
            "rollout.ahead_device",
            f"rollout.ahead_device is set, and {why} makes no copy of the policy: leave it out",
        )
    if config.rollout.ahead and not sampled:
        yield "rollout.ahead", f"rollout.ahead = {config.rollout.ahead}, and rollout.source = 'recorded' draws nothing"
    if name == "teacher":
        yield from _wrong_teaching(config)
    if name == "engine":
        for field, message in wrong_engine(engine):
            yield f"engine.{field}", f"engine.{message}"
        if engine.weights == "adapters" and config.model.lora_rank == 0:
            yield "engine.weights", "engine.weights = 'adapters' and model.lora_rank = 0: there are no adapters to send"
        elif engine.weights == "adapters" and config.model.lora_kind == "dora":
            yield "engine.weights", "engine.weights = 'adapters' and model.lora_kind = 'dora': the engine loads no DoRA"
        if engine.sleep and config.rollout.ahead:
            both = f"engine.sleep = true and rollout.ahead = {config.rollout.ahead}"
            yield "engine.sleep", f"{both}: the server draws while the policy is updated; leave one of them out"
        if engine.kind == "vllm" and config.rollout.ahead:
            yield (
                "rollout.ahead",
                f"rollout.ahead = {config.rollout.ahead} and engine.kind = 'vllm': it draws on the device that the"
                " update needs; start a server, and set engine.kind = 'server'",
            )
    else:
        default = EngineConfig()
        for key in (f.name for f in dataclasses.fields(engine)):
            if getattr(engine, key) != getattr(default, key):
                used = f"engine.{key} is set, and rollout.sampler = {name!r} uses no engine"
                yield f"engine.{key}", f"{used}: set rollout.sampler = 'engine', or remove [engine]"
                break
    if (
        config.evaluation.sampler == "rollout"
        and name == "engine"
        and engine.kind != "vllm"
        and engine.weights == "kept"
    ):
        yield (
            "evaluation.sampler",
            "evaluation.sampler = 'rollout' and engine.weights = 'kept': the engine's own weights would be evaluated"
            " instead of the policy's; set engine.weights, or leave evaluation.sampler out",
        )


def _wrong_teaching(config: Config) -> Iterator[tuple[str, str]]:
    """Yields (field, message) for mistakes in the settings of a teacher that draws the responses."""
    name = "rollout.sampler = 'teacher'"
    if not config.teacher.path:
        yield "teacher.path", f"{name}, and teacher.path is empty; expected a model folder"
    if config.teacher.url:
        yield (
            "rollout.sampler",
            f"{name} and teacher.url is set: its server scores. Let it draw as rollout.sampler = 'engine', with"
            " engine.tokens = 'text' if it has another tokenizer",
        )
    if config.rollout.ahead:
        yield (
            "rollout.ahead",
            f"rollout.ahead = {config.rollout.ahead} and {name}: it draws on the device that the update needs; leave"
            " one of them out",
        )
    if config.evaluation.sampler == "rollout":
        yield (
            "evaluation.sampler",
            f"evaluation.sampler = 'rollout' and {name}: the teacher would be evaluated, not the policy; leave"
            " evaluation.sampler out",
        )
    if config.environment.used:
        yield (
            "rollout.sampler",
            f"{name} and [environment]: the teacher draws no turns of episodes; leave one of them out",
        )


def needs_sampler(config: Config) -> list[str]:
    """Returns what is wrong with the settings if the policy draws its responses and no sampler comes from Python."""
    wrong = []
    if config.rollout.own_responses:
        wrong.append(
            f"rollout.own_responses = {config.rollout.own_responses}, and the policy draws all responses itself: name a"
            " sampler (rollout.sampler), or leave it out"
        )
    if config.evaluation.sampler == "rollout":
        wrong.append(
            "evaluation.sampler = 'rollout', and the policy draws its responses itself: leave evaluation.sampler out,"
            " or name a sampler (rollout.sampler)"
        )
    return wrong
