"""The demo of a calculator: its environment, its problems and its settings."""

import importlib.util
import json
import re
from types import ModuleType

import pytest
from places import ROOT

from gvpo_core.training.config.file import read_config

pytestmark = pytest.mark.core
FOLDER = ROOT / "examples" / "smollm2_calculator"


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"calculator_example_{name}", FOLDER / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.mark.parametrize(
    ("said", "answered"),
    {
        "calc(12*34)": ([{"role": "tool", "content": "408"}], 0.0, False),
        " calc(7*8)\n": ([{"role": "tool", "content": "56"}], 0.0, False),
        "408": ([], 1.0, True),
        "408.": ([], 1.0, True),
        "The answer is 408": ([], 0.0, True),
        "calc(12*34) = 408": ([], 0.0, True),
        "calc(12*3": ([], 0.0, True),
        "calc(1234567*1)": ([], 0.0, True),
    }.items(),
)
def test_the_calculator_answers_calls_and_scores_answers(said: str, answered: tuple) -> None:
    game = module("calculator").Calculator()
    assert game.reset({"answer": "408"}) is None, "the row's own prompt"
    assert game.step({"role": "assistant", "content": said}) == answered


def test_problems_are_right_and_held_out(tmp_path, monkeypatch) -> None:
    prepare = module("prepare")
    for name in ("CACHE", "TRAIN", "HELD_OUT", "MODEL"):
        monkeypatch.setattr(prepare, name, tmp_path / getattr(prepare, name).name)
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / "config.json").write_text("{}")
    prepare.prepare()
    asked = {}
    for path in (prepare.TRAIN, prepare.HELD_OUT):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        pairs = [tuple(sorted(map(int, re.findall(r"\d+", row["prompt"][-1]["content"])))) for row in rows]
        assert all(a * b == int(row["answer"]) for (a, b), row in zip(pairs, rows, strict=True))
        asked[path] = {*pairs}
    assert [len(pairs) for pairs in asked.values()] == [prepare.PROBLEMS, prepare.HELD_OUT_PROBLEMS]
    assert not asked[prepare.TRAIN] & asked[prepare.HELD_OUT] and (12, 34) not in asked[prepare.TRAIN]


def test_the_settings_are_valid() -> None:
    config = read_config(FOLDER / "config.toml")
    assert config.environment.path == "examples/smollm2_calculator/calculator.py:Calculator"
    assert (ROOT / config.environment.path.partition(":")[0]).is_file() and config.rollout.max_tokens == 48
