"""Which backend a run takes, and what a missing one says."""

import re
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest

from gvpo_core.training.config import Config, ConfigError, ModelConfig, OptimizerConfig, RunConfig
from gvpo_core.training.config.backends import BACKENDS, refuse_settings
from gvpo_core.training.config.check import wrong_values
from gvpo_core.training.policy import load as backend
from gvpo_core.training.policy import table

pytestmark = pytest.mark.core


def choose(monkeypatch: pytest.MonkeyPatch, *installed: str, name: str = "auto") -> str:
    monkeypatch.setattr(backend, "find_spec", lambda module: module if module in installed else None)
    return backend.backend_of(Config(run=RunConfig(backend=name)))


def test_auto_takes_the_first_backend_that_is_installed_whole(monkeypatch) -> None:
    assert choose(monkeypatch, "torch", "transformers", "jax", "optax", "orbax") == "torch"
    assert choose(monkeypatch, "torch", "jax", "optax", "orbax") == "jax"  # torch alone is not the extra
    assert choose(monkeypatch, "mlx", "mlx_lm", "transformers") == "mlx"
    assert choose(monkeypatch, "torch", "transformers", name="table") == "table"
    with pytest.raises(ConfigError, match=r'no backend is installed: pip install "gvpo\[torch\]"'):
        choose(monkeypatch, "transformers")


def test_a_backend_that_is_not_there_says_what_installs_it(monkeypatch) -> None:
    monkeypatch.setitem(BACKENDS, "mlx", replace(BACKENDS["mlx"], module="gvpo_of_no_such_name"))
    with pytest.raises(ConfigError, match=r'gvpo_mlx cannot be imported.*pip install "gvpo\[mlx\]"'):
        backend.load_policy(Config(run=RunConfig(backend="mlx")))


def test_the_settings_list_every_backend_of_the_table() -> None:
    assert get_args(get_type_hints(RunConfig)["backend"]) == ("auto", *BACKENDS)


FOREIGN = [
    ("sharding", "fsdp", ("torch",)),
    ("mesh_fsdp", 2, ("jax",)),
    ("mesh_tensor", 2, ("jax",)),
    ("lora_kind", "dora", ("torch", "mlx")),
    ("lora_rank", 4, ("torch", "jax", "mlx")),
    ("dtype", "bfloat16", ("torch", "jax", "mlx")),
    ("gradient_checkpointing", True, ("torch", "jax", "mlx")),
    ("layout", "packed", ("torch", "jax", "mlx")),
    ("quantization", "nf4", ("torch",)),
    ("compile", True, ("torch",)),
    ("deterministic", True, ("torch",)),
    ("tf32", False, ("torch",)),
]


def test_a_dtype_that_asks_for_nothing_is_taken_by_all() -> None:
    for name in BACKENDS:
        refuse_settings(ModelConfig(path="nowhere", dtype="float32"), name, OptimizerConfig())


@pytest.mark.parametrize("name", list(BACKENDS))
@pytest.mark.parametrize(("field", "value", "owners"), FOREIGN, ids=[case[0] for case in FOREIGN])
def test_a_setting_of_another_backend_is_refused_by_name(name: str, field: str, value: object, owners) -> None:
    model = replace(ModelConfig(path="nowhere"), **{field: value})
    if field == "quantization":  # refused without adapters, by every backend
        model = replace(model, lora_rank=4)
        owners = ("torch", "jax", "mlx") if name == "table" else owners
        field, value = ("lora_rank", 4) if name == "table" else (field, value)
    config = Config(run=RunConfig(backend=name), model=model)
    if name in owners:
        refuse_settings(config.model, name, OptimizerConfig())
        return
    message = f"model.{field} is {value!r}, a setting of {' and '.join(owners)} that {name} does not have"
    with pytest.raises(ConfigError, match=re.escape(message)):
        backend.load_policy(config)


@pytest.mark.parametrize("name", list(BACKENDS))
def test_an_optimizer_of_another_backend_is_refused_by_name(name: str) -> None:
    config = Config(run=RunConfig(backend=name), optimizer=OptimizerConfig(name="adamw_8bit"))
    if name == "torch":
        refuse_settings(config.model, name, config.optimizer)
        return
    message = f"optimizer.name is 'adamw_8bit', which torch has and {name} does not have: use adamw"
    with pytest.raises(ConfigError, match=message):
        backend.load_policy(config)


TOGETHER = [
    ({"quantization": "nf4"}, {}, "model.quantization = 'nf4' and model.lora_rank = 0: quantized weights cannot be"),
    ({"quantization": "nf4", "lora_rank": 4, "lora_kind": "dora"}, {}, "'nf4' and model.lora_kind = 'dora': use lora"),
    ({"quantization": "nf4", "lora_rank": 4, "sharding": "fsdp"}, {}, "'nf4' and model.sharding = 'fsdp': packed"),
    ({"compile": True, "sharding": "fsdp"}, {}, "model.compile = true and model.sharding = 'fsdp' do not go together"),
    ({"compile": True, "lora_rank": 4, "quantization": "nf4"}, {}, "model.compile = true and model.quantization ="),
    ({"sharding": "fsdp"}, {"name": "adamw_8bit"}, "'adamw_8bit' and model.sharding = 'fsdp': moments in 8 bits are"),
]


@pytest.mark.parametrize(("model", "optimizer", "message"), TOGETHER)
def test_settings_that_do_not_go_together_are_refused(model, optimizer, message) -> None:
    """By the command before anything is loaded, and by a policy that is loaded directly."""
    config = Config(model=ModelConfig(path="m", **model), optimizer=OptimizerConfig(**optimizer))
    assert [said for _, said in wrong_values(config) if message in said]
    with pytest.raises(ConfigError, match=re.escape(message)):
        refuse_settings(config.model, "torch", config.optimizer)


def test_bitsandbytes_is_asked_for_where_it_is_used(monkeypatch) -> None:
    monkeypatch.setattr(backend, "find_spec", lambda module: module if module != "bitsandbytes" else None)
    used = Config(run=RunConfig(backend="torch"), optimizer=OptimizerConfig(name="adamw_8bit"))
    said = backend.missing_of_backend(used)
    assert said == ['bitsandbytes is not installed: pip install "gvpo[bitsandbytes]"']
    assert backend.missing_of_backend(Config(run=RunConfig(backend="torch"))) == []


def test_the_table_refuses_them_too_when_it_is_loaded_directly(tmp_path) -> None:
    with pytest.raises(ConfigError, match="mesh_fsdp is 2, a setting of jax"):
        table.load(ModelConfig(str(tmp_path), mesh_fsdp=2), OptimizerConfig(), updates=1, reference=True, seed=0)


def test_only_settings_of_the_model_section_are_owned() -> None:
    known = set(ModelConfig.__dataclass_fields__)
    assert all(b.settings <= known for b in BACKENDS.values())
