"""Which backend a run takes, and what a missing one says."""

import pytest

from gvpo_core.training.config import Config, ConfigError, ModelConfig, RunConfig
from gvpo_core.training.policy import load as backend

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
    monkeypatch.setitem(backend._MODULES, "mlx", "gvpo_of_no_such_name")
    with pytest.raises(ConfigError, match=r'gvpo_mlx cannot be imported.*pip install "gvpo\[mlx\]"'):
        backend.load_policy(Config(run=RunConfig(backend="mlx")))


def test_dora_is_refused_where_it_would_be_lora() -> None:
    with pytest.raises(ConfigError, match="dora, which gvpo_jax does not have"):
        backend.load_policy(Config(run=RunConfig(backend="jax"), model=ModelConfig(lora_rank=2, lora_kind="dora")))
