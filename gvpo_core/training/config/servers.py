"""Settings of servers: the engine that samples, the teacher that is distilled from."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class EngineConfig:
    """An inference engine that draws the responses, where rollout.sampler = "engine"."""

    url: str = ""
    """Address of the server, without /v1: http://HOST:PORT."""
    model: str = ""
    """Name of the model on the server."""
    tokens: Literal["ids", "text", "chat"] = "ids"
    """What the server takes and gives. ids: token ids, as vLLM (return_token_ids); text: any OpenAI-compatible server,
    one request a response, whose text is tokenized here; chat: the same by its chat endpoint."""
    weights: Literal["kept", "adapters", "model"] = "kept"
    """What the server, vLLM's or SGLang's, gets before each step. kept: nothing; adapters: the LoRA adapters; model:
    the whole model."""
    transfer: Literal["folder", "nccl", "ipc", "tcp"] = "folder"
    """How weights = "model" reach vLLM's server. folder: through files; nccl: from GPU to other GPUs; ipc: to a server
    on the same GPU; tcp: over a connection, to a server with gvpo_vllm. All but folder need gvpo_torch."""
    folder: str = ""
    """Folder for the weights, which all ranks and the server see under the same path. Of transfer = "folder"."""
    listen: str = ""
    """HOST or HOST:PORT at which the server's workers reach the main rank, for nccl and tcp. Default: the address from
    which this machine reaches url, and a free port."""
    sleep: bool = False
    """Whether vLLM's server sleeps while the policy is updated, on the GPU of a run of one process. It needs
    --enable-sleep-mode."""
    gap_tolerance: float | None = None
    """Largest difference of the log-probabilities of engine and policy, nats a token. Beyond it the run stops.
    Default: where the run sends the weights, a step's mean is compared with the first step's (docs/samplers.md)."""
    gap_every: int = 0
    """Steps between two comparisons of the log-probabilities. 0: 1; with rollout.ahead and no gap_tolerance 20."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the server computes in, for that comparison. auto: as the policy."""
    concurrency: int = 16
    """Requests at a time."""
    deadline: float = 600.0
    """Seconds that the responses of one step may take. Later ones are lost. Also the seconds for which the server may
    be away."""
    tries: int = 4
    """Requests for a prompt, the first one included, while the server is there."""
    pause: float = 0.5
    """Seconds before the second try; twice as long before each further one."""
    api_key: str = ""
    """"$NAME": the environment variable that holds the server's key. The key itself belongs in no file."""
    omit: tuple[str, ...] = ()
    """Fields that the server rejects and requests leave out, as top_k. Its own default then applies."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Further fields of every request, of any TOML type; of SGLang, of its sampling_params."""
    kind: Literal["server", "sglang", "vllm"] = "server"
    """server: a server at url with OpenAI's endpoints, as vLLM's; sglang: SGLang's server at url, by its own endpoint;
    vllm: vLLM's LLM in this process, which gets the policy's weights before each step."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of vllm: further arguments of LLM, as gpu_memory_utilization, of any TOML type."""


@dataclass(frozen=True)
class TeacherConfig:
    """A model to distill from, where objective.reference = "teacher" or rollout.sampler = "teacher"
    (docs/distillation.md)."""

    path: str = ""
    """Local Hugging Face folder, or hub name, with any tokenizer. With url: only tokenizer and context are read."""
    revision: str | None = None
    """Commit or tag of a hub model."""
    backend: Literal["auto", "torch", "jax", "mlx", "table"] = "auto"
    """Backend that scores with it. auto: the policy's."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype. auto: bfloat16 on CUDA and TPU, float32 elsewhere."""
    device: str = ""
    """Device. Empty: model.device."""
    template: dict[str, Any] = field(default_factory=dict)
    """Arguments of its chat template."""
    url: str = ""
    """Address, without /v1, of a server that scores token ids by echoing them, as vLLM. Empty: load the model here."""
    model: str = ""
    """Name of the model on the server. Empty: path."""
    concurrency: int = 16
    """Requests at a time."""
    deadline: float = 600.0
    """Seconds that the scores of one step may take. Responses without a score leave their group. Also the seconds for
    which the server may be away."""
    tries: int = 4
    """Requests for a response, the first one included, while the server is there."""
    pause: float = 0.5
    """Seconds before the second try; twice as long before each further one."""
    api_key: str = ""
    """"$NAME": the environment variable that holds the server's key. The key itself belongs in no file."""
