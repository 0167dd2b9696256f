"""Settings of servers: the engine that samples, and the teacher for distillation."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class EngineConfig:
    """An inference engine that draws the responses, if rollout.sampler = "engine"."""

    url: str = ""
    """Address of the server, without /v1: http://HOST:PORT."""
    model: str = ""
    """Name of the model on the server."""
    tokens: Literal["ids", "text", "chat"] = "ids"
    """Format that the server takes and returns. ids: token ids, as vLLM does (return_token_ids); text: text, with any
    OpenAI-compatible server, one request per response, tokenized here; chat: the same by the chat endpoint."""
    weights: Literal["kept", "adapters", "model"] = "kept"
    """Weights that a vLLM or SGLang server gets before each step. kept: none; adapters: the LoRA adapters; model: the
    whole model."""
    transfer: Literal["folder", "nccl", "ipc", "tcp"] = "folder"
    """How weights = "model" reach vLLM's server. folder: through files; nccl: from GPU to other GPUs; ipc: to a server
    on the same GPU; tcp: over a connection, to a server with gvpo_vllm. All but folder need gvpo_torch."""
    folder: str = ""
    """Folder for the weights, which all ranks and the server see under the same path. Only for transfer = "folder"."""
    listen: str = ""
    """HOST or HOST:PORT at which the server's workers reach the main rank, for nccl and tcp. Default: the address from
    which this machine reaches url, and a free port."""
    sleep: bool = False
    """Let vLLM's server sleep while the policy is updated on the same GPU, in a run of one process. The server needs
    --enable-sleep-mode."""
    gap_tolerance: float | None = None
    """Largest difference between the log-probabilities of engine and policy, nats per token. Above it the run stops.
    Default: if the run sends the weights, a step's mean is compared with the first step's (docs/samplers.md)."""
    gap_every: int = 0
    """Steps between two comparisons of the log-probabilities. 0: 1, or 20 with rollout.ahead and no gap_tolerance."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute dtype of the server, for the comparison of log-probabilities. auto: the policy's."""
    concurrency: int = 16
    """Requests at a time."""
    deadline: float = 600.0
    """Seconds that the responses of one step may take. Later ones are lost. Also the seconds for which the server may
    be unreachable."""
    tries: int = 4
    """Requests for a prompt, the first one included, while the server is reachable."""
    pause: float = 0.5
    """Seconds before the second try; twice as long before each further one."""
    api_key: str = ""
    """"$NAME": the environment variable that holds the server's key. The key itself belongs in no file."""
    omit: tuple[str, ...] = ()
    """Fields that requests leave out because the server rejects them, such as top_k. The server's default applies."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Further fields of every request, of any TOML type. For SGLang: of its sampling_params."""
    kind: Literal["server", "sglang", "vllm"] = "server"
    """server: a server at url with OpenAI's endpoints, such as vLLM's; sglang: SGLang's server at url, by its own
    endpoint; vllm: vLLM's LLM in this process, which gets the policy's weights before each step."""
    options: dict[str, Any] = field(default_factory=dict)
    """For kind = "vllm": further arguments of LLM, such as gpu_memory_utilization, of any TOML type."""


@dataclass(frozen=True)
class TeacherConfig:
    """A model to distill from, if objective.reference = "teacher" or rollout.sampler = "teacher"
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
    """Address, without /v1, of a server that scores token ids by echoing them, as vLLM does. Empty: load the model
    here."""
    model: str = ""
    """Name of the model on the server. Empty: path."""
    concurrency: int = 16
    """Requests at a time."""
    deadline: float = 600.0
    """Seconds that the scores of one step may take. Responses without a score leave their group. Also the seconds for
    which the server may be unreachable."""
    tries: int = 4
    """Requests for a response, the first one included, while the server is reachable."""
    pause: float = 0.5
    """Seconds before the second try; twice as long before each further one."""
    api_key: str = ""
    """"$NAME": the environment variable that holds the server's key. The key itself belongs in no file."""
