"""The settings of a run: a tree of typed dataclasses. `file.py` reads it from TOML and the command line."""

from dataclasses import dataclass, field
from typing import Any, Literal

from gvpo_core.training.config.servers import EngineConfig, TeacherConfig
from gvpo_core.training.sampling import Sampling


class ConfigError(ValueError):
    """Settings that cannot be used; the message names each of them and what was expected."""


@dataclass(frozen=True)
class RunConfig:
    """Where and how long the run trains, and what it keeps."""

    folder: str = "runs/gvpo"
    """Run folder: config, metrics, completions, checkpoints and report. An unfinished run in it is resumed."""
    backend: Literal["auto", "torch", "jax", "mlx", "table"] = "auto"
    """Backend. auto: the first one installed of torch, jax, mlx; table: the NumPy reference (model.path/table.json)."""
    steps: int = 100
    """Steps of the run. A step trains on one rollout: rollout.prompts groups."""
    seed: int = 0
    """Seed of the data order, the samples and new parameters."""
    checkpoint_every: int = 50
    """Steps between checkpoints. The last step always has one. 0: only the last step."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints kept. Older ones are removed after a newer one is verified."""
    keep_best: bool = True
    """Save after each evaluation that is the best so far, and keep that checkpoint as well."""
    trackers: tuple[str, ...] = ()
    """Trackers that also get the metrics: wandb, trackio, tensorboard."""
    allow_changes: bool = False
    """Resume even if settings, data or model differ from those of the run folder."""
    show_every: int = 10
    """Steps between samples printed on the console. 0: never."""


@dataclass(frozen=True)
class ModelConfig:
    """The model and how it is loaded."""

    path: str = ""
    """Local Hugging Face folder, or hub name if the framework downloads."""
    revision: str | None = None
    """Commit or tag of a hub model."""
    trust_remote_code: bool = False
    """Run model code shipped in the model's repository."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype. auto: bfloat16 on CUDA and TPU, float32 elsewhere. bfloat16 keeps float32 master parameters in
    full fine-tuning, and a bfloat16 base under LoRA."""
    device: str = "auto"
    """Device: cpu, cuda, cuda:1, mps or xpu (torch); cpu, gpu, gpu:1 or tpu (jax); cpu or gpu (mlx). auto: the
    accelerator if there is one, else CPU."""
    lora_rank: int = 0
    """Rank of LoRA adapters. 0: full fine-tuning."""
    lora_alpha: float = 0.0
    """LoRA scale numerator (scale = alpha / rank). 0: twice the rank."""
    lora_kind: Literal["lora", "dora"] = "lora"
    """Kind of adapter. dora: also trains a magnitude for each output (torch and mlx)."""
    lora_targets: tuple[str, ...] = ("all-linear",)
    """Module names that get adapters. all-linear: every linear layer except the head."""
    quantization: Literal["none", "nf4"] = "none"
    """How LoRA's frozen linear layers are stored. nf4: in 4 bits (torch, bitsandbytes). mlx: use a quantized folder."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass. Less memory, about a third more time."""
    compile: bool = False
    """Compile the decoder layers for scores and gradients (torch.compile). Takes minutes at the start. Only for one
    process."""
    deterministic: bool = False
    """Use only kernels that are bit-for-bit deterministic, in scores and updates (torch on CUDA). Slower."""
    tf32: bool = True
    """With bfloat16 on CUDA: use TensorFloat-32 for products that stay float32, such as those of adapters (torch)."""
    template: dict[str, Any] = field(default_factory=dict)
    """Arguments of the chat template, such as { enable_thinking = false }."""
    layout: Literal["auto", "packed", "plain"] = "auto"
    """Training rows. packed: a prompt and common beginnings once; plain: a row per response; auto: packed if exact."""
    sharding: Literal["data_parallel", "fsdp"] = "data_parallel"
    """How several torch processes share the model. data_parallel: one copy each; fsdp: sharded parameters (FSDP2)."""
    mesh_fsdp: int = 1
    """jax devices over which parameters, optimizer state and batch are sharded."""
    mesh_tensor: int = 1
    """jax devices over which each layer is split. The remaining devices form the data axis."""

    @property
    def compute_dtype(self) -> str:
        """`dtype`; float32 if it is auto and no policy has chosen yet."""
        return "float32" if self.dtype == "auto" else self.dtype


@dataclass(frozen=True)
class DataConfig:
    """Training and held-out data."""

    train: str = ""
    """Training rows: a .jsonl, .json or .parquet file, a `datasets` folder saved to disk, a dataset of the hub, or
    reasoning_gym:NAME. Prompts, or prompts with recorded responses (docs/data.md)."""
    evaluation: str = ""
    """Held-out rows in the same forms. Empty: no evaluation."""
    subset: str = ""
    """Configuration of a hub dataset, such as main of openai/gsm8k, for both splits."""
    split: str = ""
    """Split of the training rows, if the source has several."""
    evaluation_split: str = ""
    """Split of the held-out rows, if their source has several."""
    recorded: str = ""
    """Recorded groups (docs/recorded.md) that each step adds to those of `train`. Empty: none."""
    recorded_share: float = 0.25
    """Share of a step's groups that come from `recorded`."""
    prompt: str = "prompt"
    """Column of the prompt: text, or chat messages (role, content). Other columns go to the rewards."""
    system_prompt: str = ""
    """System message added to chats that have none. Empty: none."""
    max_prompt_tokens: int = 1024
    """Longest prompt, tokens."""
    too_long: Literal["error", "drop"] = "error"
    """Action for longer prompts, and for recorded responses longer than rollout.max_tokens."""
    shuffle: bool = True
    """Use a new order of the prompts in every epoch, from run.seed."""
    curriculum: float = 0.0
    """Share of a step's prompts drawn from earlier ones, in proportion to the spread of their rewards. 0: off."""
    buffer: int = 20_000
    """Rows of a stream (train_rows without a length) held at a time. Shuffling happens among them."""
    reference_cache: str = ""
    """Folder for the reference's scores of recorded responses, which runs can share. Empty: the run folder."""
    reference_cache_size: int = 256
    """Largest size of the file of reference scores, MiB; beyond it the oldest scores are removed. 0: no limit."""


@dataclass(frozen=True)
class RolloutConfig:
    """One step's groups."""

    source: Literal["auto", "sampled", "recorded", "mixed"] = "auto"
    """Source of the responses. sampled: drawn and scored each step; recorded: the data's own, with their rewards;
    mixed: both in one group; auto: recorded if the data's columns hold them."""
    sampler: str = "policy"
    """Sampler of the responses. policy: the trained policy; engine: the server of [engine]; teacher: the model of
    [teacher]; or your own class or function that returns a sampler, as file.py:Sampler or package.module:Sampler
    (docs/samplers.md)."""
    ahead: int = 0
    """Steps by which responses may be drawn ahead of their use, during updates. With sampler = policy, a copy in
    another process draws them. 0: none."""
    ahead_device: str = ""
    """Device of the copy that draws ahead, in the form of model.device. Empty: the policy's."""
    own_responses: int = 0
    """Number of the `responses` to a prompt that the policy draws itself. The sampler draws the others. 0: none."""
    prompts: int = 8
    """Prompts per step (G)."""
    responses: int = 8
    """Responses per prompt (k), at least 2 for objectives that compare within groups."""
    max_tokens: int = 256
    """Longest response, tokens, end token included."""
    temperature: float = 1.0
    """Sampling temperature; log-probabilities are always scored at temperature 1."""
    top_p: float = 1.0
    """Nucleus sampling. 1: off. Cuts the support that Cor. 3.2 needs."""
    top_k: int = 0
    """Top-k sampling. 0: off. Cuts the support that Cor. 3.2 needs."""
    min_p: float = 0.0
    """Min-p sampling. 0: off. Cuts the support that Cor. 3.2 needs."""
    stop: tuple[str, ...] = ()
    """Texts that end a response. It keeps the tokens up to the one that completes such a text."""
    truncated: Literal["keep", "drop"] = "keep"
    """Responses cut at max_tokens. drop: they leave their group, even if they have a reward."""
    equal: Literal["keep", "skip", "redraw"] = "keep"
    """Groups whose rewards are all equal. skip: not trained on; redraw: skipped, and further prompts drawn instead."""
    redraws: int = 3
    """Largest number of times that a step draws more prompts. Only for equal = redraw."""
    allow_truncated_support: bool = False
    """Accept top_p, top_k, min_p or temperature 0 in training, which Cor. 3.2 does not cover."""

    @property
    def sampling(self) -> Sampling:
        """The settings of sampling alone."""
        return Sampling(self.max_tokens, self.temperature, self.top_p, self.top_k, self.min_p, self.stop)


@dataclass(frozen=True)
class ReplayConfig:
    """Past groups, trained on again with new ones (Cor. 3.2)."""

    groups: int = 0
    """Number of newest groups kept for replay. 0: none."""
    share: float = 0.5
    """Share of a step's groups that are replayed, once enough are kept. The others are new."""
    age: int = 0
    """Largest age of a replayed group, steps. 0: no limit."""


@dataclass(frozen=True)
class EnvironmentConfig:
    """Tools and environments of episodes with several turns. Without path and tools a response is one turn."""

    path: str = ""
    """Class of the environment: package.module:Class or path/to/file.py:Class, with reset(row) and step(message)."""
    tools: tuple[str, ...] = ()
    """Tools: import paths of Python functions with types and a docstring."""
    max_turns: int = 8
    """Most turns of the policy in an episode. After them the episode is cut."""
    turn_tokens: int = 0
    """Longest turn, tokens. 0: what is left of rollout.max_tokens, which counts all tokens after the prompt."""
    cut_reward: float = 0.0
    """Reward added to episodes that are cut by the turn or token limit."""
    weight: float = 1.0
    """Factor of the environment's reward in the total."""
    history: Literal["segments", "keep", "error"] = "segments"
    """Action if the chat template rewrites earlier turns (drops thoughts). segments: the next turn has its own
    prompt, as the template renders it; keep: the policy sees its earlier turns as it drew them; error: stop."""
    timeout: float = 30.0
    """Seconds that reset, a step or a message's tools may take. After that the process is ended."""
    workers: int = 2
    """Processes that share the episodes."""
    memory: float = 8.0
    """GiB of address space for each process. 0: no limit."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the class, of any TOML type."""

    @property
    def used(self) -> bool:
        """Whether responses are episodes."""
        return bool(self.path or self.tools)


@dataclass(frozen=True)
class ObjectiveConfig:
    """The objective."""

    name: str = "gvpo"
    """gvpo, trajectory_balance, rebel, mirror_descent, a_star_po, grpo, dr_grpo, rloo, gspo, maxrl, reject_sampling,
    sft or dpo; or your function, as file.py:function or package.module:function."""
    beta: float = 0.1
    """KL coefficient, reward units per nat. In grpo, dr_grpo, rloo and gspo: that of the KL term in the reward."""
    reference: Literal["initial", "rollout", "teacher"] = "initial"
    """pi_ref: the initial model (Eq. 5), the policy that sampled the rollout (the authors' code), or the model of
    [teacher] (GVPO++)."""
    reference_every: int = 0
    """Interval, steps, at which the current policy becomes the reference (TBA). 0: never. Only for initial."""
    epochs: int = 1
    """Passes over each rollout."""
    minibatches: int = 1
    """Optimizer steps per pass. Each takes complete groups."""
    clip: float = 0.2
    """Clip range of the importance ratio (Eq. 19). Only for grpo, dr_grpo, rloo, maxrl and gspo. The ratio of
    gspo is a geometric mean over tokens and needs a range near 3e-4."""
    length_exponent: float = 0.0
    """GVPO++: a response of n tokens weighs n^-length_exponent in the implicit reward. 0: GVPO. Only for gvpo."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and how a batch is split. Splitting does not change the step."""

    learning_rate: float = 1e-6
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moment decays."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay. Applies to matrices only."""
    warmup: int = 0
    """Updates of linear warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after warm-up; linear and cosine end at 0."""
    max_gradient_norm: float = 1.0
    """Largest norm of the gradient; a larger gradient is scaled down to it. 0: off."""
    micro_batch_tokens: int = 8192
    """Tokens in a forward-backward pass, padding included; in jax per device. Determines peak memory."""
    micro_batch_responses: int = 0
    """Responses in a forward-backward pass. 0: as many as micro_batch_tokens allows."""
    strategy: Literal["group", "score"] = "group"
    """group: one pass gives weights and gradient if complete groups fit; score: a pass without gradient comes first."""
    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw: float32 moments; adamw_8bit: moments in 8 bits, in blocks of 256 (torch with bitsandbytes)."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation on the held-out rows of data.evaluation."""

    every: int = 0
    """Steps between evaluations. The start and the last step always have one. 0: only those."""
    prompts: int = 0
    """Number of held-out prompts used. 0: all."""
    responses: int = 1
    """Responses per prompt."""
    temperature: float = 0.0
    """Sampling temperature. 0: the most likely token."""
    sampler: Literal["policy", "rollout"] = "policy"
    """Sampler of the responses. policy: the policy; rollout: that of rollout.sampler, with the policy's weights."""
    patience: int = 0
    """Stop early after this many evaluations in a row without a better result: a higher held-out reward, or without
    rewards a lower loss or KL. 0: never."""


@dataclass(frozen=True)
class RewardConfig:
    """One reward function."""

    function: str = ""
    """exact_match, regex_match, math_verify, reasoning_gym, reward_model, judge, or an import path:
    package.module:function or path/to/file.py:function."""
    weight: float = 1.0
    """Factor in the total reward."""
    timeout: float = 30.0
    """Seconds a call may take."""
    isolation: Literal["process", "thread"] = "process"
    """process: calls beyond the time limit are killed; thread: they are abandoned and may block the run."""
    workers: int = 2
    """Processes of this reward."""
    memory: float = 8.0
    """GiB of address space for each process. 0: no limit, which CUDA needs."""
    max_failures: float = 0.5
    """Share of a step's responses that may raise or time out. Above it the run stops."""
    failure_value: float | None = None
    """Score for failed responses. Default: drop them from their group."""
    sandbox: str = ""
    """Name of the sandbox, such as a container, in which a reward with runs_code = True executes code."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of every call, of any TOML type."""


@dataclass(frozen=True)
class Config:
    """A training run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    rewards: dict[str, RewardConfig] = field(default_factory=dict)
    """Named rewards, summed with their weights; [rewards.NAME] in the file."""

    @property
    def scores_responses(self) -> bool:
        """Whether sampled responses get rewards, from functions or an environment."""
        return bool(self.rewards or self.environment.path)

    @property
    def updates(self) -> int:
        """Optimizer steps in the whole run."""
        return self.run.steps * self.objective.epochs * self.objective.minibatches
