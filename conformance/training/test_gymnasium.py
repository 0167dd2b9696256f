"""The example's adapter plays episodes of real Gymnasium environments."""

from dataclasses import replace

import pytest
import toy_run
from places import ROOT
from required import require
from scripted_policy import ScriptedPolicy
from toy_run import records

from gvpo_core.training.config import ConfigError, EnvironmentConfig

require("gymnasium", "pygame", subject="gymnasium")
PATH = f"{ROOT}/examples/gymnasium/environment.py:Gymnasium"
LAKE = {
    "id": "FrozenLake-v1",
    "arguments": {"render_mode": "ansi", "is_slippery": False, "map_name": "4x4"},
    "actions": {"left": 0, "down": 1, "right": 2, "up": 3},
    "rules": "Walk from S to G.",
    "unknown_reward": -0.25,
}
WAY = ("down", "down", "right", "right", "down", "right")  # of the 4x4 map


def played(folder, options, script, rows, **changes):
    config = toy_run.config_of(folder, "scripted", 1, rollout={"max_tokens": 400})
    environment = EnvironmentConfig(path=PATH, options=options, memory=0.0, **changes)
    toy_run.run(replace(config, environment=environment), rows, ScriptedPolicy(script))
    return records(folder, "completions")


def test_the_lake_is_crossed_and_a_hole_ends_the_episode(tmp_path) -> None:
    def script(text: str, u: float) -> str:
        turn = text.count("<user>") - 1
        right_way = u < 0.5 if turn == 0 else "I go" in text
        return f"I go {WAY[turn]}." if right_way else ("right", "down")[turn]

    written = played(tmp_path, LAKE, script, [{"seed": 1}, {"seed": 2}], max_turns=7)
    first = "Walk from S to G.\n[S]FFF\nFHFH\nFFFH\nHFFG"
    assert first in written[0]["prompt"], "Gymnasium marks the place by a colour"
    assert {(c["reward"], c["end"]) for c in written} == {(1.0, "done"), (0.0, "done")}
    for c in written:
        said = [m["content"] for m in c["episode"] if m["role"] == "assistant"]
        assert said == ([f"I go {word}." for word in WAY] if c["reward"] else ["right", "down"])


def test_a_turn_without_an_action_moves_nothing(tmp_path) -> None:
    written = played(tmp_path, LAKE, lambda text, u: "hm" if u < 0.9 else "left", [{}], max_turns=2)
    lost = [c for c in written if c["reward"] == -0.5]
    assert lost and all(c["end"] == "turns" and not c["finished"] for c in lost)
    heard = [m["content"] for m in lost[0]["episode"] if m["role"] == "user"]
    assert heard[0] == "Say one of left, down, right, up."


def test_settings_that_do_not_fit_are_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"FrozenLake-v1 takes Discrete\(4\) and no texts: give actions"):
        played(tmp_path, {"id": "FrozenLake-v1"}, lambda text, u: "left", [{}])
    wrong = LAKE | {"actions": {"left": 9}}
    with pytest.raises(ConfigError, match=r"actions.left = 9; FrozenLake-v1 takes Discrete\(4\)"):
        played(tmp_path, wrong, lambda text, u: "left", [{}])
