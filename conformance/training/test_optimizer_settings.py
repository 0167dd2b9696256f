"""Settings of AdamW with which a step would change no weight, or make it NaN, are refused before a run."""

from dataclasses import replace

import pytest

from gvpo_core.training.config import Config, ConfigError, DataConfig, ModelConfig, RewardConfig, RunConfig
from gvpo_core.training.config.check import SMALLEST_EPS, SMALLEST_MOVE, check_config

pytestmark = pytest.mark.core


def settings(**optimizer):
    config = Config(
        run=RunConfig(folder="run", steps=10),
        model=ModelConfig(path="model"),
        data=DataConfig(train="rows.jsonl"),
        rewards={"right": RewardConfig("exact_match")},
    )
    return replace(config, optimizer=replace(config.optimizer, **optimizer))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"eps": 0.0}, "optimizer.eps = 0.0; expected at least 1e-16: a weight whose gradient is 0 would become NaN"),
        ({"eps": 1e-50}, "optimizer.eps = 1e-50; expected at least 1e-16"),
        ({"learning_rate": 1e-46}, "optimizer.learning_rate = 1e-46; expected at least 1e-12, or 0"),
        ({"learning_rate": 1e39}, "optimizer.learning_rate = 1e[+]39; expected at most 1,000"),
        ({"warmup": 10**9}, "optimizer.warmup = 1000000000; expected fewer"),
        ({"max_gradient_norm": 1e-30}, "optimizer.max_gradient_norm = 1e-30; expected 0 for no clipping"),
        ({"eps": 1e30}, "optimizer.max_gradient_norm = 1.0; .*with optimizer.eps = 1e[+]30 no step would change"),
        ({"learning_rate": 1.0, "weight_decay": 2.0}, "optimizer.weight_decay = 2.0; expected less than .* = 1:"),
    ],
)
def test_a_step_that_is_none_is_refused(given, message):
    with pytest.raises(ConfigError, match=message) as raised:
        check_config(settings(**given))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"eps": SMALLEST_EPS, "max_gradient_norm": 0.0},
        {"learning_rate": 0.0},
        {"learning_rate": SMALLEST_MOVE, "max_gradient_norm": 0.0},
        {"warmup": 100},
        {"max_gradient_norm": 1e-6},
        {"weight_decay": 0.1, "learning_rate": 5.0},
    ],
)
def test_settings_that_move_weights_are_taken(given):
    check_config(settings(**given))
