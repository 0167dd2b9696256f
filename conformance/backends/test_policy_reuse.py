"""A policy that was trained in one run and is given to another begins anew there, or is refused by name."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import trainer_backends
from places import DEVICE
from trainer_backends import Backend

from gvpo_core.training import load_policy, train
from gvpo_core.training.config import (
    Config,
    ConfigError,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
)

PRESENT = trainer_backends.present()
if not PRESENT:
    pytest.skip("no backend of a language model is among the subjects", allow_module_level=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_models.write_model("llama", tmp_path_factory.mktemp("model"))


def config(folder: Path, backend: Backend, model: Path, **settings) -> Config:
    return Config(
        run=RunConfig(folder=str(folder), backend=backend.name, steps=2, show_every=0),
        model=ModelConfig(path=str(model), **{"device": DEVICE, "dtype": "float32"} | settings),
        rollout=RolloutConfig(prompts=2, responses=3, max_tokens=4),
        optimizer=OptimizerConfig(learning_rate=0.01, schedule="linear", warmup=1),
        rewards={"length": RewardConfig(function="given")},
    )


def go(config: Config, policy) -> None:
    rows = [{"prompt": "say a"}, {"prompt": "say b"}]
    train(
        config,
        policy,
        train_rows=rows,
        rewards={"length": lambda completions, **_: [float(len(c)) for c in completions]},
    )


def arrays(backend: Backend, folder: Path) -> dict[str, np.ndarray]:
    found = backend.state(folder / "checkpoints" / "step-00000002" / "policy")
    assert found
    return found


@pytest.mark.slow_on("jax-lora")
@pytest.mark.parametrize("settings", [{}, {"lora_rank": 2}], ids=["full", "lora"])
def test_a_used_policy_is_reset(settings, backend, model, tmp_path, capsys):
    """It took 2 steps at its second run's learning rate 0, against the reference of its first."""
    first, second = (config(tmp_path / name, backend, model, **settings) for name in ("first", "second"))
    policy = load_policy(first)
    assert policy.steps_taken == 0 and policy.settings.model == first.model
    go(first, policy)
    assert policy.steps_taken == 2
    go(second, policy)
    assert "the policy had taken 2 optimizer steps before: reset to its initial state" in capsys.readouterr().out
    assert policy.steps_taken == 2
    one, two = (arrays(backend, tmp_path / name) for name in ("first", "second"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(two[name], value, err_msg=name)


def test_a_policy_loaded_with_other_settings_is_refused(backend, model, tmp_path):
    """A sweep over configs with one policy: every run had the first one's learning rate and rank."""
    first = config(tmp_path / "run", backend, model)
    policy = load_policy(first)
    changes = {
        "optimizer.learning_rate is 0.01, and the run has 0.1": {
            "optimizer": replace(first.optimizer, learning_rate=0.1)
        },
        "model.lora_rank is 0, and the run has 4": {"model": replace(first.model, lora_rank=4)},
        "the schedule ends after 2 updates, and the run has 7": {"run": replace(first.run, steps=7)},
    }
    for message, change in changes.items():
        with pytest.raises(ConfigError) as caught:
            go(replace(first, **change), policy)
        assert message in str(caught.value) and str(caught.value).count("\n") == 0
    assert not (tmp_path / "run").exists() and policy.steps_taken == 0
    without = replace(first, objective=replace(first.objective, reference="rollout"))
    with pytest.raises(ConfigError, match="it has no reference"):
        go(first, load_policy(without))
