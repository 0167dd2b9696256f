"""The table of backends: module, requirements and settings of each."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from gvpo_core.training.config.settings import ConfigError, ModelConfig, OptimizerConfig


@dataclass(frozen=True)
class Backend:
    """One backend; its module has `load`."""

    name: str  # in run.backend; its extra has the same name
    module: str
    needs: tuple[str, ...]  # modules that its extra installs; "auto" chooses it if all are found
    versions: Mapping[str, str]  # distribution -> versions, as pyproject.toml has them
    devices: str  # values of model.device, apart from auto
    settings: frozenset[str]  # those of `_SPECIAL` that it has
    optimizers: tuple[str, ...] = ("adamw",)  # values of optimizer.name


_SPECIAL = {
    "sharding": "fsdp is torch's; in jax it is model.mesh_fsdp",
    "mesh_fsdp": "in torch it is model.sharding = 'fsdp'",
    "mesh_tensor": "leave it at 1",
    "lora_rank": "leave it at 0",
    "lora_kind": "use lora",
    "quantization": "leave it at none; mlx trains adapters on a folder that is quantized",
    "dtype": "leave it at float32",
    "gradient_checkpointing": "leave it out",
    "compile": "leave it out; jax and mlx compile on their own",
    "deterministic": "leave it out; in jax XLA_FLAGS=--xla_gpu_deterministic_ops=true decides it",
    "tf32": "leave it out; in jax JAX_DEFAULT_MATMUL_PRECISION decides it",
    "layout": "leave it out",
}
"""Settings of [model] that not every backend has, and what to do about one in the wrong place."""
_ACCEPTED_BY_ALL = {"dtype": "float32"}
"""Values other than the default that every backend accepts."""

_LANGUAGE_MODEL = frozenset(("lora_rank", "dtype", "gradient_checkpointing", "layout"))

BACKENDS: dict[str, Backend] = {
    b.name: b
    for b in (
        Backend(
            "torch",
            "gvpo_torch.policy",
            ("torch", "transformers"),
            {
                "torch": ">=2.13",
                "transformers": ">=5.10.1,<6",
                "peft": ">=0.19,<1",
                "safetensors": ">=0.6.1",
            },
            "cpu, cuda, cuda:1, mps, xpu",
            _LANGUAGE_MODEL | {"sharding", "lora_kind", "quantization", "compile", "deterministic", "tf32"},
            ("adamw", "adamw_8bit"),
        ),
        Backend(
            "jax",
            "gvpo_jax.policy",
            ("jax", "optax", "orbax"),
            {
                "jax": ">=0.10",
                "optax": ">=0.2.8",
                "orbax-checkpoint": ">=0.12",
                "safetensors": ">=0.6.1",
                "transformers": ">=5.10.1,<6",
                "jinja2": ">=3.1",
            },
            "cpu, gpu, tpu, or one of them: gpu:1",
            _LANGUAGE_MODEL | {"mesh_fsdp", "mesh_tensor"},
        ),
        Backend(
            "mlx",
            "gvpo_mlx.policy",
            ("mlx", "mlx_lm"),
            {
                "mlx": ">=0.32.3",
                "mlx-lm": ">=0.32,<0.33",
                "safetensors": ">=0.6.1",
                "transformers": ">=5.10.1,<6",
                "jinja2": ">=3.1",
            },
            "cpu, gpu",
            _LANGUAGE_MODEL | {"lora_kind"},
        ),
        Backend("table", "gvpo_core.training.policy.table", (), {}, "cpu", frozenset()),
    )
}
"""Name -> backend, in the order in which "auto" tries them. One that needs nothing is chosen only by name."""


def installable() -> list[Backend]:
    """Returns the backends that have an extra."""
    return [backend for backend in BACKENDS.values() if backend.needs]


def install_line() -> str:
    """Returns the command that installs one of them."""
    *others, last = (f'"gvpo[{backend.name}]"' for backend in installable())
    return f"pip install {', '.join(others)} or {last}"


def in_few_bits(model: ModelConfig, optimizer: OptimizerConfig) -> bool:
    """Returns whether the package bitsandbytes holds weights or moments in 4 or 8 bits."""
    return model.quantization != "none" or optimizer.name == "adamw_8bit"


def wrong_together(model: ModelConfig, optimizer: OptimizerConfig) -> list[tuple[str, str]]:
    """Returns settings that do not go together: (field, message)."""
    wrong = []
    if model.quantization != "none":
        value = f"model.quantization = {model.quantization!r}"
        for bad, why in (
            (not model.lora_rank, "model.lora_rank = 0: quantized weights cannot be trained; set model.lora_rank"),
            (model.lora_kind == "dora", "model.lora_kind = 'dora': use lora"),
            (model.sharding == "fsdp", "model.sharding = 'fsdp': packed weights are not sharded; use data_parallel"),
        ):
            if bad:
                wrong.append(("model.quantization", f"{value} and {why}"))
    if model.compile:
        for bad, why in (
            (model.quantization != "none", f"model.quantization = {model.quantization!r}"),
            (model.sharding == "fsdp", "model.sharding = 'fsdp'"),
        ):
            if bad:
                wrong.append(("model.compile", f"model.compile = true and {why} do not go together: leave one out"))
    if optimizer.name == "adamw_8bit" and model.sharding == "fsdp":
        message = "optimizer.name = 'adamw_8bit' and model.sharding = 'fsdp': moments in 8 bits are not sharded"
        wrong.append(("optimizer.name", f"{message}; use adamw, or data_parallel"))
    return wrong


def without_settings_of_others(config: ModelConfig, name: str) -> ModelConfig:
    """Resets the settings that the backend `name` does not have, for a model that another backend loads."""
    backend, default = BACKENDS.get(name), ModelConfig()
    others = {setting: getattr(default, setting) for setting in _SPECIAL if backend and setting not in backend.settings}
    return replace(config, **others)


def refuse_settings(config: ModelConfig, name: str, optimizer: OptimizerConfig) -> None:
    """Rejects settings of another backend, which this one would ignore, and those that do not go together.

    A setting is rejected if its value is not the default. A backend that is not in the table has all settings.

    Raises: ConfigError: the message names the setting, its value and the backends that have it.
    """
    if wrong := wrong_together(config, optimizer):
        raise ConfigError("\n".join(message for _, message in wrong))
    backend = BACKENDS.get(name)
    if backend is None:
        return
    default = ModelConfig()
    for setting, advice in _SPECIAL.items():
        value = getattr(config, setting)
        if setting in backend.settings or value in (getattr(default, setting), _ACCEPTED_BY_ALL.get(setting)):
            continue
        others = [b.name for b in BACKENDS.values() if setting in b.settings]
        raise ConfigError(
            f"model.{setting} is {value!r}, a setting of {' and '.join(others)} that {name} does not have: {advice}"
        )
    if optimizer.name not in backend.optimizers:
        others = [b.name for b in BACKENDS.values() if optimizer.name in b.optimizers]
        raise ConfigError(
            f"optimizer.name is {optimizer.name!r}, which {' and '.join(others)} has and {name} does not have: use "
            f"{' or '.join(backend.optimizers)}"
        )
