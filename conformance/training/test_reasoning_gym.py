"""reasoning-gym's datasets by name, and their verifiers, which need entries as they were made."""

import importlib
import sys
from dataclasses import replace

import pytest
from toy_run import config_of, records, run, write_model

from gvpo_core.training.builtin_rewards import reasoning_gym
from gvpo_core.training.config import RewardConfig
from gvpo_core.training.rows import DataError, load_rows

pytestmark = pytest.mark.core

FAKE = '''
"""Stands for reasoning-gym: the last letter of a word, with metadata that JSON does not keep."""


class Dataset:
    def __init__(self, size, seed, first="a"):
        self.size, self.seed, self.first = size, seed, first

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        if i >= self.size:
            raise IndexError
        word = self.first + "xyz"[(i + self.seed) % 3]
        return {"question": word, "answer": word[-1], "metadata": {"key": (1, {2})}}

    def score_answer(self, answer, entry):
        assert entry["metadata"] == {"key": (1, {2})}
        return 1.0 if answer == entry["answer"] else 0.25


def create_dataset(name, **settings):
    if name != "last":
        raise ValueError(f"Dataset '{name}' not registered")
    return Dataset(**settings)
'''


@pytest.fixture
def library(tmp_path, monkeypatch):
    from gvpo_core.training.rewards.worker.reasoning_gym import open_dataset

    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/reasoning_gym.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path / "lib")
    monkeypatch.delitem(sys.modules, "reasoning_gym", raising=False)
    open_dataset.cache_clear()
    yield
    open_dataset.cache_clear()
    sys.modules.pop("reasoning_gym", None)  # the real one, where it is installed, is imported anew


def test_rows_name_their_entry(library) -> None:
    spec = "reasoning_gym:last?size=2&seed=1&first=b"
    assert load_rows(spec, "data.train") == [
        {"prompt": "by", "answer": "y", "dataset": spec, "index": 0},
        {"prompt": "bz", "answer": "z", "dataset": spec, "index": 1},
    ]
    assert len(load_rows("reasoning_gym:last")) == 1000


def test_the_verifier_scores_what_is_tagged_or_all(library) -> None:
    said = ["y", " y\n", "I think <answer>x</answer> no <answer>y</answer>", "it is y", [{"content": "y"}]]
    spec = "reasoning_gym:last?size=2&seed=1"
    assert reasoning_gym(said, [spec] * 5, [0] * 5) == [1.0, 1.0, 1.0, 0.25, 1.0]


def test_a_run_trains_on_a_dataset_by_its_name(library, tmp_path) -> None:
    model = write_model(tmp_path / "model")
    config = config_of(tmp_path / "run", model, data={"train": "reasoning_gym:last?size=6"})
    run(replace(config, rewards={"right": RewardConfig(function="reasoning_gym", workers=1)}), None)
    record = records(tmp_path / "run")[0]
    assert record["reward/min"] == 0.25 and record["responses/unscored"] == 0


WRONG = {
    "reasoning-gym cannot make it: ValueError: Dataset 'first' not registered": "reasoning_gym:first",
    "reasoning-gym cannot make it: TypeError": "reasoning_gym:last?sizes=3",
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_made_is_named(message: str, library) -> None:
    with pytest.raises(DataError) as error:
        load_rows(WRONG[message], "data.train")
    assert message in str(error.value) and str(error.value).startswith("data.train: reasoning_gym:")


def test_a_missing_library_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(DataError, match=r"needs reasoning-gym .*pip install reasoning-gym"):
        load_rows("reasoning_gym:never-opened", "data.train")


def test_the_library_s_own_answers_are_right() -> None:
    try:
        importlib.import_module("reasoning_gym")
    except ImportError as e:
        pytest.skip(f"reasoning-gym is not installed whole: {e}")
    rows = load_rows("reasoning_gym:chain_sum?size=5&max_terms=4")
    columns = [row["dataset"] for row in rows], [row["index"] for row in rows]
    assert reasoning_gym([row["answer"] for row in rows], *columns) == [1.0] * 5
    assert max(reasoning_gym(["no number"] * 5, *columns)) < 0.5
