"""Recorded groups of a stream: a bounded buffer, an order of its own each epoch, resumed bit for bit."""

import json
from dataclasses import replace

import numpy as np
import pytest
from killing import lasting
from ranks import run_ranks
from recorded_data import config_of, records, run
from table_problem import PROMPTS, REFERENCE, reward, table

from gvpo_core.training.config import RewardConfig
from gvpo_core.training.data import DataError
from gvpo_core.training.loop import train

pytestmark = pytest.mark.core


class Rows:
    """Iterable again and again, without a length; counts the rows that it gave."""

    def __init__(self, rows):
        self.rows, self.given = rows, 0

    def __iter__(self):
        for row in self.rows:
            self.given += 1
            yield row


def numbered(count):
    """Each group's best reward is its number, from 1; every fifth has one score alone."""
    return [
        {
            "prompt": PROMPTS[i % 3],
            "responses": ["a", "b"],
            "rewards": [i / 100, None if i % 5 == 0 else 0],
            "number": i,
        }
        for i in range(1, count + 1)
    ]


def seen(folder):
    rows = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    return [round(100 * row["reward"]) for row in rows if row["reward"]]


def streaming(folder, **sections):
    sections = {"data": {"buffer": 6, **sections.pop("data", {})}, "rollout": {"prompts": 2}, **sections}
    return config_of(folder, **sections)


def test_every_group_comes_once_an_epoch_in_an_order_of_its_own(tmp_path, capsys):
    rows = numbered(20)
    run(streaming(tmp_path, run={"steps": 16}), Rows(rows))
    usable = [i for i in range(1, 21) if i % 5]
    first, second = seen(tmp_path)[:16], seen(tmp_path)[16:]
    assert sorted(first) == sorted(second) == usable
    assert first != second and first != usable
    assert all(number - place <= 2 * 6 for place, number in enumerate(first)), "nothing comes far before its turn"
    written = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    shown = {row["row"] + 1: row["columns"]["number"] for row in written if "columns" in row}
    assert sorted(shown) == usable and all(row == number for row, number in shown.items())
    assert "a stream, at most 6 rows held" in " ".join(capsys.readouterr().out.split())


def test_no_more_than_the_buffer_is_read_ahead(tmp_path):
    rows = Rows(numbered(10_000))
    run(streaming(tmp_path, run={"steps": 2}), rows)
    assert rows.given < 40


def test_without_shuffling_the_order_is_the_streams(tmp_path):
    run(streaming(tmp_path, run={"steps": 4}, data={"shuffle": False}), Rows(numbered(20)))
    assert seen(tmp_path) == [1, 2, 3, 4, 6, 7, 8, 9]


def test_a_resumed_stream_repeats_an_unbroken_one(tmp_path):
    want = run(streaming(tmp_path / "whole", run={"steps": 15}), Rows(numbered(20)))
    config = streaming(tmp_path / "cut", run={"steps": 9, "checkpoint_every": 4})
    run(config, Rows(numbered(20)))
    got = run(replace(config, run=replace(config.run, steps=15)), Rows(numbered(20)))
    np.testing.assert_array_equal(got.logits, want.logits)
    assert lasting(tmp_path / "cut") == lasting(tmp_path / "whole")


def test_ranks_read_the_same_stream(tmp_path):
    want = run(streaming(tmp_path / "one"), Rows(numbered(20)))
    config = streaming(tmp_path / "two")
    work = lambda policy: train(config, policy, train_rows=Rows(numbered(20)))
    for policy in run_ranks(2, work, table(REFERENCE), config.optimizer):
        np.testing.assert_allclose(policy.logits, want.logits, rtol=1e-12, atol=1e-12)


def test_a_stream_that_fits_is_held_whole(tmp_path):
    streamed = run(streaming(tmp_path / "a", data={"buffer": 20}), Rows(numbered(20)))
    held = run(streaming(tmp_path / "b"), numbered(20))
    np.testing.assert_array_equal(streamed.logits, held.logits)


def test_a_bad_row_of_a_stream_is_named_and_streams_of_prompts_are_refused(tmp_path):
    rows = numbered(20)
    rows[9]["rewards"] = ["x", 1]
    with pytest.raises(DataError, match="train_rows row 9, column 'rewards', entry 0 is a str"):
        run(streaming(tmp_path, run={"steps": 12}), Rows(rows))
    config = replace(streaming(tmp_path / "b"), rewards={"value": RewardConfig(function="given")})
    with pytest.raises(DataError, match="train_rows is a stream, perhaps endless, and not of whole recorded groups"):
        run(config, Rows([{"prompt": "p0"}] * 30), rewards={"value": reward})


def test_an_iterable_dataset_is_a_stream(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    stream = datasets.Dataset.from_list(numbered(20)).to_iterable_dataset()
    run(streaming(tmp_path / "a"), stream)
    run(streaming(tmp_path / "b"), Rows(numbered(20)))
    assert seen(tmp_path / "a") == seen(tmp_path / "b") and len(records(tmp_path / "a")) == 6
