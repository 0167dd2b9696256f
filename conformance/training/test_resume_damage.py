"""Resuming next to files that were edited, damaged, lost or put there by somebody: a clear line each, nothing lost."""

import errno
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import run_folders
from table_problem import reward

from gvpo_core.training.files.records import append_synced, cut, encoded, records
from gvpo_core.training.report import write_report
from gvpo_core.training.run.checkpoint import steps_saved

pytestmark = pytest.mark.core
pytest.importorskip("tomli_w", reason="the command line's extra is not installed")


def lines(folder, name="metrics.jsonl"):
    return (folder / name).read_bytes().splitlines(keepends=True)


def resumed(folder, caplog, steps=4):
    result, policy = run_folders.go(run_folders.config(folder, steps=steps))
    assert result.step == steps
    return [r.getMessage() for r in caplog.records if r.levelname == "WARNING"], policy


@pytest.fixture
def unbroken(tmp_path):
    return run_folders.go(run_folders.config(tmp_path / "unbroken", steps=4))[1].logits


@pytest.mark.parametrize("name", ["metrics.jsonl", "completions.jsonl"])
def test_a_missing_file_of_records_is_named(name, tmp_path, caplog, unbroken):
    run_folders.go(run_folders.config(tmp_path))
    (tmp_path / name).unlink()
    said, policy = resumed(tmp_path, caplog)
    assert [text for text in said if name in text] == [
        f"{tmp_path / name} is missing, and 3 steps are done: "
        + ("verdicts start over, and the report lacks them" if "metrics" in name else "the report shows none of them")
    ]
    np.testing.assert_array_equal(policy.logits, unbroken)


VALUES = {
    "a metric of text": {"entropy": "low"},
    "a metric that is a list": {"reward/mean": [1]},
    "an integer of 400 digits": {"loss": 10**400},
    "a number that overflows in a sum": {"entropy": -1e308},
    "an infinity": {"reward/mean": float("inf")},
    "an unknown verdict": {"verdict": "GREAT"},
    "an alert of text": {"alerts": ["look"]},
    "an alert without advice": {"machine/alerts": [{"key": "kl", "level": "BAD", "seen": "x"}]},
}


@pytest.mark.parametrize("edit", VALUES)
def test_a_metric_of_another_type_is_a_clear_line(edit, tmp_path, caplog, unbroken):
    """It ended the resume in a traceback; in an evaluation it ended the first step after it."""
    run_folders.go(run_folders.config(tmp_path))
    path, second = tmp_path / "metrics.jsonl", 1
    old = [json.loads(line) for line in lines(tmp_path)]
    assert old[second]["kind"] == "train" and VALUES[edit].keys() <= old[second].keys()
    old[second] |= VALUES[edit]
    path.write_text("".join(json.dumps(record) + "\n" for record in old))
    said, policy = resumed(tmp_path, caplog)
    assert said[0] == f"{path}: line 2 is not a record (edited or damaged); kept, but not used"
    assert f"1 of the 3 steps done have no record, the first is step {old[second]['step']}" in said[1]
    np.testing.assert_array_equal(policy.logits, unbroken)
    assert json.loads(lines(tmp_path)[second]) == old[second], "kept"


EDITS = {
    "not JSON": (b"rubbish\n", "line 2 is not a record (edited or damaged); kept, but not used"),
    "no kind": (b'{"step": 1}\n', "line 2 is not a record"),
    "no step": (b'{"kind": "train"}\n', "line 2 is not a record"),
    "a step of text": (b'{"kind": "train", "step": "1"}\n', "line 2 is not a record"),
    "a step of true": (b'{"kind": "train", "step": true}\n', "line 2 is not a record"),
    "a list": (b"[1, 2]\n", "line 2 is not a record"),
    "not UTF-8": (b'{"kind": "\xff", "step": 1, "x": 2}\n', "line 2 is not a record"),
    "a NUL block": (b"\0" * 4096 + b"\n", "line 2 is not a record"),
    "deep": (b'{"kind": ' + b"[" * 10**5 + b"\n", "line 2 is not a record"),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("name", ["metrics.jsonl", "completions.jsonl"])
def test_a_line_that_is_not_a_record_is_named_and_stays(edit, name, tmp_path, caplog, unbroken):
    run_folders.go(run_folders.config(tmp_path))
    before = lines(tmp_path, name)
    line, text = EDITS[edit]
    (tmp_path / name).write_bytes(before[0] + line + b"".join(before[1:]))
    said, policy = resumed(tmp_path, caplog)
    assert len([x for x in said if x.startswith(f"{tmp_path / name}: {text}")]) == 1, said
    assert lines(tmp_path, name)[: len(before) + 1] == [before[0], line, *before[1:]]
    np.testing.assert_array_equal(policy.logits, unbroken)


@pytest.mark.parametrize("tail", [b"\0" * 700, b'{"kind": "train", "step": 3, "re', b'{"kind": "train", "step": 9}'])
def test_a_tail_that_is_not_a_record_is_named_and_dropped(tail, tmp_path, caplog):
    run_folders.go(run_folders.config(tmp_path))
    before = lines(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(before) + tail)
    said, _ = resumed(tmp_path, caplog)
    assert any(
        f"line {len(before) + 1} is not a complete record (cut by a kill or a power loss); dropped" in x for x in said
    )
    assert lines(tmp_path)[: len(before)] == before and tail not in (tmp_path / "metrics.jsonl").read_bytes()


def test_steps_without_a_record_and_with_two_are_named(tmp_path, caplog):
    run_folders.go(run_folders.config(tmp_path))
    one, _, three = (line for line in lines(tmp_path) if json.loads(line)["kind"] == "train")
    (tmp_path / "metrics.jsonl").write_bytes(one + one + three)
    said, _ = resumed(tmp_path, caplog)
    assert any("1 of the 3 steps done have no record, the first is step 2" in text for text in said)
    assert any("1 steps have more than one record, the first is step 1" in text for text in said)


def test_records_out_of_order_lose_none_of_the_steps_done(tmp_path):
    """A file that somebody sorted: cut at a place, it would lose a step that is done."""
    path = tmp_path / "metrics.jsonl"
    rows = [{"kind": "train", "step": step} for step in (1, 5, 2, 6, 3)]
    append_synced(path, encoded(rows))
    kept = cut(path, 3, parse=True)
    assert [r["step"] for r in records(path)] == [1, 2, 3] and kept.last == 6
    assert "out of order" in kept.odd[0] and "2 records after step 3 dropped" in kept.odd[0]


FOREIGN = ["step-999", "step-000000003", "step-\u0663", "step-abc", ".partial-x", "step-00000007"]


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_foreign_name_among_the_checkpoints_is_named_and_left(name, kind, tmp_path, caplog, unbroken):
    if (name, kind) == ("step-00000007", "folder"):
        pytest.skip("an empty folder of that name is a checkpoint that lost its manifest: the test below")
    run_folders.go(run_folders.config(tmp_path))
    foreign = tmp_path / "checkpoints" / name
    if kind == "folder":
        foreign.mkdir()
    (foreign / "notes.txt" if kind == "folder" else foreign).write_text("mine")
    said, policy = resumed(tmp_path, caplog)
    assert len([text for text in said if f"{foreign} is not a checkpoint of this run" in text]) == 1
    assert (foreign / "notes.txt" if kind == "folder" else foreign).read_text() == "mine"
    np.testing.assert_array_equal(policy.logits, unbroken)


def test_a_renamed_checkpoint_is_not_taken_for_another_step(tmp_path, caplog, unbroken):
    run_folders.go(run_folders.config(tmp_path))
    folder = tmp_path / "checkpoints"
    (folder / "step-00000002").rename(folder / "step-00000009")
    (folder / "step-00000008").mkdir()
    said, policy = resumed(tmp_path, caplog)
    assert any("step-00000009/manifest.json belongs to step 2" in text for text in said)
    assert any("step-00000008/manifest.json is missing" in text for text in said)
    assert steps_saved(folder) == [4, 3]
    np.testing.assert_array_equal(policy.logits, unbroken)


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c"])
def test_line_separators_of_unicode_in_a_setting_and_a_reward(mark, tmp_path, caplog):
    """str.splitlines takes them for ends of lines: a record was cut in two, and the resume died."""
    config = run_folders.config(tmp_path)
    config = replace(config, rewards={"value": replace(config.rewards["value"], options={"header": f"a{mark}b"})})
    rows = [row | {"note": f"x{mark}y"} for row in run_folders.ROWS]

    def stopping(prompts, completions, **columns):
        if len(list(records(tmp_path / "metrics.jsonl"))) >= 2:
            raise ValueError(f"odd{mark}text")
        return reward(prompts, completions)

    with pytest.raises(Exception, match="odd"):
        run_folders.go(config, train_rows=rows, rewards={"value": stopping})
    text = (tmp_path / "metrics.jsonl").read_bytes().decode()
    assert [json.loads(line)["kind"] for line in text.splitlines()][-1] == "event"
    given = {"train_rows": rows, "rewards": {"value": lambda prompts, completions, **_: reward(prompts, completions)}}
    assert run_folders.go(replace(config, run=replace(config.run, steps=4)), **given)[0].step == 4


def test_a_character_that_utf8_does_not_have_is_recorded(tmp_path):
    append_synced(tmp_path / "m.jsonl", encoded([{"kind": "event", "step": 1, "command": "a\udc80"}]))
    assert next(records(tmp_path / "m.jsonl"))["command"] == "a\udc80"


@pytest.mark.slow
def test_a_long_run_is_cut_without_being_held(tmp_path):
    """200,000 completions of 40 MB are cut within 2 MB; test_resume_size.py has a whole run."""
    import tracemalloc

    path = tmp_path / "completions.jsonl"
    with path.open("wb") as f:
        for step in range(1, 10_001):
            f.write(encoded([{"kind": "train", "step": step, "response": "x" * 150}] * 20))
    tracemalloc.start()
    kept = cut(path, 9_000, parse=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not kept.odd and kept.last == 10_000 and peak < 2e6
    assert sum(1 for _ in records(path)) == 20 * 9_000


@pytest.mark.parametrize("name", ["metrics.jsonl", "completions.jsonl"])
def test_records_with_line_ends_of_windows_are_kept(name, tmp_path, caplog, unbroken):
    run_folders.go(run_folders.config(tmp_path))
    before = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(before.replace(b"\n", b"\r\n"))
    said, policy = resumed(tmp_path, caplog)
    assert not [text for text in said if name in text]
    assert (tmp_path / name).read_bytes().startswith(before.replace(b"\n", b"\r\n"))
    np.testing.assert_array_equal(policy.logits, unbroken)


def test_a_run_without_checkpoints_reports_that_it_starts_over(tmp_path, caplog, unbroken):
    run_folders.go(run_folders.config(tmp_path))
    shutil.rmtree(tmp_path / "checkpoints")
    said, policy = resumed(tmp_path, caplog)
    assert [text for text in said if "starts over; the records of its 3 steps are dropped" in text]
    np.testing.assert_array_equal(policy.logits, unbroken)


@pytest.mark.parametrize("what", ["a symbolic link", "a file that is held open"])
def test_an_old_checkpoint_that_cannot_be_removed_costs_no_step(what, tmp_path, caplog, unbroken, monkeypatch):
    """The new checkpoint was called unsaved, and every start ended so. NFS keeps the files that somebody reads."""
    run_folders.go(run_folders.config(tmp_path))
    (old, *_), elsewhere = sorted((tmp_path / "checkpoints").iterdir()), tmp_path / "elsewhere"
    if what == "a symbolic link":
        old.rename(elsewhere)
        old.symlink_to(elsewhere)
    else:
        real = shutil.rmtree

        def busy(path, *args, **options):
            if old.name in str(path):
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
            return real(path, *args, **options)

        monkeypatch.setattr(shutil, "rmtree", busy)
    said, policy = resumed(tmp_path, caplog)
    assert not old.exists() and steps_saved(tmp_path / "checkpoints")[0] == 4
    np.testing.assert_array_equal(policy.logits, unbroken)
    unremoved = [text for text in said if f"{old.name}, an old checkpoint, cannot be removed: " in text]
    assert len(unremoved) == (what != "a symbolic link")
    assert elsewhere.exists() == (what == "a symbolic link")


def test_an_evaluation_beyond_all_numbers_is_named_and_the_report_drawn(tmp_path, caplog):
    config = run_folders.config(tmp_path)
    run_folders.go(config)
    path = tmp_path / "metrics.jsonl"
    edited = [json.loads(line) for line in lines(tmp_path)]
    edited.append({"kind": "eval", "step": 3, "eval/reward": 10**400, "eval/half_width": -1e308})
    path.write_text("".join(json.dumps(record) + "\n" for record in edited))
    said, _ = resumed(tmp_path, caplog)
    assert any(f"line {len(edited)} is not a record (edited or damaged)" in text for text in said)
    path.write_text("".join(json.dumps(record) + "\n" for record in edited))
    write_report(tmp_path)
