"""The best checkpoint is kept, a run stops early, goes back to a step, and is read by `gvpo eval` while it goes on."""

import json
import shutil
from dataclasses import replace

import killing
import numpy as np
import pytest
import run_folders
import table_run
from table_problem import PROMPTS, reward

from gvpo_core.training import cli
from gvpo_core.training.config import ConfigError
from gvpo_core.training.run.best import Best
from gvpo_core.training.run.checkpoint import CheckpointError, steps_saved
from gvpo_core.training.run.chosen import chosen
from gvpo_core.training.run.resume import in_its_folder, without_from_step

pytestmark = pytest.mark.core
pytest.importorskip("tyro", reason="the command line's extra is not installed")


def scripted(scores):
    """Rewards whose held-out mean takes these values, one an evaluation; None: not a number."""
    left = iter(scores)

    def score(prompts, completions, **columns):
        if "held_out" in columns:
            return [next(left)] * len(completions)
        return reward(prompts, completions)

    return {"value": score}


HELD_OUT = [{"prompt": PROMPTS[0], "held_out": True}]


def evaluated(folder, scores, steps=6, **evaluation):
    config = run_folders.config(
        folder, steps=steps, checkpoint_every=0, keep_checkpoints=1, evaluation={"every": 1} | evaluation
    )
    return run_folders.go(config, evaluation_rows=HELD_OUT, rewards=scripted(scores))[0]


def test_the_best_checkpoint_is_saved_and_kept(tmp_path):
    evaluated(tmp_path, [0.1, 0.2, 0.6, 0.3, 0.5, 0.6, 0.4])
    assert steps_saved(tmp_path / "checkpoints") == [6, 2]  # 1 was the best until 2; of equal ones the first
    with chosen(tmp_path, "best") as best, chosen(tmp_path, "newest") as newest:
        assert (best.step, newest.step) == (2, 6)


def test_the_best_of_a_resumed_run_is_that_of_an_unbroken_one(tmp_path):
    scores = [0.1, 0.2, 0.6, 0.3, 0.5, 0.55, 0.4]
    evaluated(tmp_path, scores, steps=3)
    evaluated(tmp_path, scores[4:])
    assert steps_saved(tmp_path / "checkpoints") == [6, 2]


def test_without_keep_best_only_the_newest_stay(tmp_path):
    config = run_folders.config(
        tmp_path, steps=4, checkpoint_every=2, keep_checkpoints=1, keep_best=False, evaluation={"every": 1}
    )
    run_folders.go(config, evaluation_rows=HELD_OUT, rewards=scripted([0.1, 0.9, 0.8, 0.2, 0.3]))
    assert steps_saved(tmp_path / "checkpoints") == [4]


def test_a_run_stops_early_and_stays_stopped_until_it_has_more_patience(tmp_path):
    result = evaluated(tmp_path, [0.1, 0.5, 0.4, 0.5, 0.9], patience=2)
    assert (result.step, result.exit_status) == (3, 0)
    assert steps_saved(tmp_path / "checkpoints") == [3, 1] and "early" in killing.events(tmp_path)
    assert evaluated(tmp_path, [], patience=2).step == 3
    assert evaluated(tmp_path, [0.1, 0.6, 0.7], patience=4).step == 6


def test_an_evaluation_without_a_number_is_not_an_improvement():
    best = Best()
    assert not best.see(0, {"eval/reward": float("nan")}) and best.step == -1
    assert best.see(1, {"eval/reward": -3.0}) and not best.see(2, {"eval/reward": None}) and best.since == 1


def test_a_run_goes_back_to_a_step_and_repeats_what_came_after(tmp_path):
    config = run_folders.config(tmp_path / "a", steps=6, keep_checkpoints=6)
    whole = run_folders.go(config)[1].logits
    records = killing.lasting(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    config = replace(config, run=replace(config.run, folder=str(tmp_path / "b")))
    with pytest.raises(CheckpointError, match="no checkpoint of step 9; saved steps: 1, 2, 3, 4, 5, 6"):
        run_folders.go(config, from_step=9)
    assert run_folders.content(tmp_path / "a").keys() == run_folders.content(tmp_path / "b").keys()
    short = replace(config, run=replace(config.run, steps=4))
    assert run_folders.go(short, from_step=3)[0].step == 4
    assert steps_saved(tmp_path / "b" / "checkpoints") == [4, 3, 2, 1]
    assert killing.lasting(tmp_path / "b") == records[:4] and "back" in killing.events(tmp_path / "b")
    np.testing.assert_array_equal(run_folders.go(config)[1].logits, whole)
    np.testing.assert_array_equal(run_folders.go(config, from_step=0)[1].logits, whole)
    assert killing.lasting(tmp_path / "b") == records


def test_going_back_to_a_damaged_step_changes_nothing(tmp_path):
    config = run_folders.config(tmp_path, keep_checkpoints=3)
    run_folders.go(config)
    weights = tmp_path / "checkpoints" / "step-00000002" / "policy" / "table.npz"
    weights.write_bytes(weights.read_bytes()[:-1])
    before = run_folders.content(tmp_path)
    with pytest.raises(CheckpointError, match="the checkpoint of step 2 is damaged"):
        run_folders.go(config, from_step=2)
    assert run_folders.content(tmp_path) == before


def test_the_command_line_goes_back_and_reads_the_best(tmp_path, capfd):
    config = table_run.make(tmp_path, steps=6)
    config.write_text(config.read_text().replace("checkpoint_every = 2", "checkpoint_every = 1\nkeep_checkpoints = 9"))
    assert cli.main(["train", str(config)]) == 0
    assert cli.main(["train", str(config), "--from-step", "x"]) == 2
    assert "--from-step x: expected the step of a saved checkpoint" in capfd.readouterr().err
    assert cli.main(["train", str(config), "--from-step=4"]) == 0
    assert "went back from step 6 to step 4" in capfd.readouterr().out
    run = tmp_path / "run"
    held_out = {r["step"]: r["eval/reward"] for r in killing.lasting(run) if r["kind"] == "eval"}
    best = max((s for s in held_out if s), key=held_out.__getitem__)
    for name, step in (("best", best), ("3", 3), ("newest", 6)):
        assert cli.main(["eval", str(run), "--checkpoint", name, "--json"]) == 0
        assert json.loads(capfd.readouterr().out)["eval/reward"] == held_out[step]
    assert cli.main(["export", str(run), str(tmp_path / "out"), "--checkpoint", "best"]) == 0
    assert cli.main(["eval", str(run), "--checkpoint", "44"]) == 2
    assert "has no checkpoint '44'; saved steps: 1, 2, 3, 4, 5, 6" in capfd.readouterr().err


def test_the_command_that_resumes_does_not_go_back_again():
    words = ["gvpo", "train", "c.toml", "--from-step", "4", "--run.steps", "9"]
    assert without_from_step(words) == (["gvpo", "train", "c.toml", "--run.steps", "9"], "4")
    assert without_from_step(["train", "--from_step=7"]) == (["train"], "7")
    assert without_from_step(["train"]) == (["train"], None)


def test_the_best_of_a_run_without_an_evaluation_is_refused(tmp_path):
    run_folders.go(run_folders.config(tmp_path))
    with (
        pytest.raises(ConfigError, match="no checkpoint 'best' with an evaluation; saved steps: 2, 3"),
        chosen(tmp_path, "best"),
    ):
        pass


def test_a_checkpoint_that_is_read_outlives_the_run_that_continues(tmp_path):
    """`gvpo eval` chose the newest, and the run removed it while the model was loading."""
    run_folders.go(run_folders.config(tmp_path, steps=1, keep_checkpoints=1))
    with chosen(tmp_path, "newest") as found:
        before = run_folders.content(found.policy)
        run_folders.go(run_folders.config(tmp_path, steps=3, keep_checkpoints=1))
        assert run_folders.content(found.policy) == before
        assert steps_saved(tmp_path / "checkpoints") == [3, 1]
    run_folders.go(run_folders.config(tmp_path, steps=4, keep_checkpoints=1))
    assert steps_saved(tmp_path / "checkpoints") == [4]


def test_a_checkpoint_removed_during_choice_is_chosen_again(tmp_path, monkeypatch):
    from gvpo_core.training.run import chosen as module

    run_folders.go(run_folders.config(tmp_path, steps=3, keep_checkpoints=2))
    listed = iter([[9, 3], [3, 2]])  # the first list is older than the removal of step 9
    monkeypatch.setattr(module, "steps_saved", lambda folder: next(listed))
    with chosen(tmp_path, "newest") as found:
        assert found.step == 3


def test_a_moved_folders_own_config_continues_there(tmp_path, caplog):
    config = table_run.make(tmp_path, steps=4)
    config.write_text(config.read_text().replace('"cosine"', '"constant"'))
    assert cli.main(["train", str(config)]) == 0
    (tmp_path / "run").rename(tmp_path / "moved")
    assert cli.main(["train", str(tmp_path / "moved" / "config.toml"), "--run.steps", "6"]) == 0
    assert not (tmp_path / "run").exists()
    assert killing.lasting(tmp_path / "moved")[-1]["step"] == 6
    assert "it continues here" in caplog.text
    settings = run_folders.config(tmp_path / "elsewhere")
    arguments = [str(tmp_path / "moved" / "config.toml"), "--run.folder", "x"]
    assert in_its_folder(arguments, settings) is settings  # named on the command line: that is meant
    assert in_its_folder([str(config)], settings) is settings  # no run folder's config
