"""Reference scores of recorded groups: computed once, kept on disk by content, never a reason for another step."""

import json
from dataclasses import replace
from pathlib import Path

import killing
import numpy as np
import pytest
from ranks import run_ranks
from recorded_data import Counting, config_of, groups, records
from table_problem import REFERENCE, table

from gvpo_core.training.config import Config, ModelConfig
from gvpo_core.training.loop import train
from gvpo_core.training.policy import Response
from gvpo_core.training.recorded import ReferenceScores

pytestmark = pytest.mark.core

FILE = "reference_scores.jsonl"


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "table.json").write_text(json.dumps(table(REFERENCE)))
    return folder


def settings_of(folder: Path, model: Path, **sections) -> Config:
    return replace(config_of(folder, **sections), model=ModelConfig(path=str(model)))


def policy_of(config: Config) -> Counting:
    told = json.loads((Path(config.model.path) / "table.json").read_text())
    return Counting(told, config.optimizer, updates=config.updates, model=config.model)


def run(config: Config, rows=None) -> Counting:
    policy = policy_of(config)
    train(config, policy, train_rows=groups() if rows is None else rows)
    return policy


def test_a_response_is_scored_once_over_epochs_and_runs(tmp_path, model):
    config = settings_of(tmp_path / "a", model, data={"reference_cache": str(tmp_path / "cache")})
    first = run(config)  # six steps of three groups: three passes
    assert first.reference_rows == sum(len(r["responses"]) for r in groups())
    told = records(tmp_path / "a")
    assert [r["machine/reference_cached"] > 0 for r in told] == [False, False, True, True, True, True]
    assert [r["machine/reference_scored"] > 0 for r in told] == [True, True, False, False, False, False]
    again = run(replace(config, run=replace(config.run, folder=str(tmp_path / "b"))))
    assert again.reference_calls == 0
    np.testing.assert_array_equal(again.logits, first.logits)
    assert killing.lasting(tmp_path / "a") == killing.lasting(tmp_path / "b")


@pytest.mark.parametrize("use", [{"quantization": "nf4", "lora_rank": 2}, {"lora_rank": 2}, {"compile": True}], ids=str)
def test_equal_weights_with_other_settings_are_scored_again(use, tmp_path, model):
    """A base packed in 4 bits has other log-probs. It took those of the base in full from the cache, where both runs
    have an optimizer in 8 bits and thus equal versions."""
    found = []
    for settings in ({}, {}, use):
        config = replace(settings_of(tmp_path / "a", model), model=ModelConfig(path=str(model), **settings))
        scores = ReferenceScores(config, policy_of(config), tmp_path / FILE)
        scores.of([((0,), (Response((1,), True), Response((2,), True)))])
        found.append((scores.hits, scores.misses))
    assert found == [(0, 2), (2, 0), (0, 2)]


def test_another_model_or_response_is_scored_again(tmp_path, model):
    config = settings_of(tmp_path / "a", model, data={"reference_cache": str(tmp_path / "cache")})
    run(config)
    other = groups()
    other[0]["responses"][0] = "e" if other[0]["responses"][0] != "e" else "a"
    assert run(replace(config, run=replace(config.run, folder=str(tmp_path / "b"))), other).reference_rows == 2
    (model / "table.json").write_text(json.dumps(table(REFERENCE[:, ::-1])))
    assert run(replace(config, run=replace(config.run, folder=str(tmp_path / "c")))).reference_calls == len(groups())


def damaged(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    digit = b"2" if b"1" in lines[0][90:] else b"3"
    path.write_bytes(lines[0][:90] + lines[0][90:].replace(b"1", digit) + b"\0\0\n" + lines[2] + lines[3][:40])


@pytest.mark.parametrize("spoil", [None, Path.unlink, damaged], ids=["kept", "gone", "damaged"])
def test_a_resumed_run_repeats_an_unbroken_one(spoil, tmp_path, model):
    want = run(settings_of(tmp_path / "whole", model, run={"steps": 7}))
    config = settings_of(tmp_path / "cut", model, run={"steps": 3, "checkpoint_every": 2})
    run(config)
    assert (tmp_path / "cut" / FILE).read_bytes().count(b"\n") == len(groups())
    if spoil:
        spoil(tmp_path / "cut" / FILE)
    got = run(replace(config, run=replace(config.run, steps=7)))
    assert got.reference_calls == {None: 0, Path.unlink: 6, damaged: 5}[spoil]
    np.testing.assert_array_equal(got.logits, want.logits)
    assert killing.lasting(tmp_path / "cut") == killing.lasting(tmp_path / "whole")
    lines = (tmp_path / "cut" / FILE).read_bytes().splitlines()
    assert sum(line.startswith(b'{"key": ') and line.endswith(b"}") for line in lines) >= len(groups())


def test_the_file_is_bounded_and_the_steps_do_not_notice(tmp_path, model, monkeypatch):
    from gvpo_core.training.recorded import reference

    want = run(settings_of(tmp_path / "whole", model))
    monkeypatch.setattr(reference, "_MEBIBYTE", 400)  # of two groups or so
    got = run(settings_of(tmp_path / "small", model, data={"reference_cache_size": 1}))
    assert (tmp_path / "small" / FILE).stat().st_size <= 400
    assert got.reference_calls > len(groups())
    np.testing.assert_array_equal(got.logits, want.logits)


def test_a_cache_that_cannot_be_written_costs_no_run(tmp_path, model, caplog):
    (tmp_path / "cache").write_text("a file in its place")
    config = settings_of(tmp_path / "a", model, data={"reference_cache": str(tmp_path / "cache")})
    assert run(config).reference_calls == len(groups())
    assert "cannot be used" in caplog.text and "kept in memory only" in caplog.text


def test_ranks_share_the_scores_and_score_a_group_each(tmp_path):
    tokens = [((0,), ((1, 0), (2, 0))), ((1,), ((3, 0),)), ((2,), ((4, 0), (5, 0), (1, 0)))]
    scored = [(prompt, tuple(Response(r, True) for r in responses)) for prompt, responses in tokens]
    config = config_of(tmp_path)

    def work(policy):
        scores = ReferenceScores(config, policy, None)
        first, second = scores.of(scored), scores.of(scored)
        assert (scores.hits, scores.misses) == (6, 6)
        for a, b, (prompt, responses) in zip(first, second, scored, strict=True):
            np.testing.assert_array_equal(a, b)
            np.testing.assert_allclose(
                a, [np.log(REFERENCE[prompt[0], r.tokens[0] - 1]) for r in responses], rtol=1e-14
            )

    run_ranks(2, work, table(REFERENCE), config.optimizer)
