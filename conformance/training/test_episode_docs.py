"""The tools, the environment, the reward and the settings of docs/episodes.md play episodes together."""

import re
import tomllib
from dataclasses import replace

import pytest
import toy_run
from places import ROOT
from scripted_policy import ScriptedPolicy
from toy_run import records

from gvpo_core.training.config import EnvironmentConfig, RewardConfig

pytestmark = pytest.mark.core

PAGE = (ROOT / "docs" / "episodes.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
TOML = [tomllib.loads(block) for block in re.findall(r"^```toml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)]


def played(folder, settings: dict, script, rows, rewards=None) -> list[dict]:
    config = toy_run.config_of(folder / "run", "scripted", 1, rollout={"max_tokens": 400})
    given = settings["environment"] | {"turn_tokens": 0, "memory": 0.0, "workers": 1}
    config = replace(config, environment=EnvironmentConfig(**given), rewards=rewards or {})
    toy_run.run(config, rows, ScriptedPolicy(script, updates=1))
    return records(folder / "run", "completions")


def test_the_tool_and_the_reward_of_the_page(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tools.py").write_text(PYTHON[0])
    (tmp_path / "reward.py").write_text(PYTHON[1])
    assert TOML[0]["environment"]["tools"] == ["tools.py:add"] and "def add" in PYTHON[0] and "def reward" in PYTHON[1]

    def script(text: str, u: float) -> str:
        call = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>'
        return f"It is {text.rpartition('<tool>')[2][0]}." if "<tool>" in text else call if u < 0.5 else "It is 6."

    rows = [{"prompt": "What is 2 + 3?", "answer": "5"}, {"prompt": "3 + 2?", "answer": "5"}]
    rewards = {"right": RewardConfig(function=TOML[0]["rewards"]["right"]["function"])}
    written = played(
        tmp_path, {"environment": TOML[0]["environment"] | {"tools": ("tools.py:add",)}}, script, rows, rewards
    )
    assert {(c["turns"], c["reward"]) for c in written} == {(1, 0.0), (2, 1.0)}


def test_the_environment_of_the_page(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "game.py").write_text(PYTHON[2])
    assert TOML[1]["environment"]["path"] == "game.py:Guess"

    def script(text: str, u: float) -> str:
        return str(5 + text.count("higher<end>") if u < 0.8 else 1)

    written = played(tmp_path, TOML[1], script, [{"secret": 7}, {"secret": 9}])
    for c in written:
        said = [m["content"] for m in c["episode"] if m["role"] == "assistant"]
        done = said[-1] == str([7, 9][c["row"]])
        assert c["end"] == ("done" if done else "turns")
        assert c["reward"] == pytest.approx((1.0 if done else -1.0) - 0.1 * (len(said) - done))
    assert {c["end"] for c in written} == {"done", "turns"}
