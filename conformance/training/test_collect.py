"""`gvpo collect`: sampling and scoring as a job of its own, and training on what it wrote."""

import datetime as dt
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import table_run
from killing import lasting

from gvpo_core.training import cli
from gvpo_core.training.policy.table import TablePolicy

pytestmark = pytest.mark.core


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def collect(config: Path, out: Path, *options: str) -> int:
    return cli.main(["collect", str(config), str(out), *options])


def test_the_groups_are_those_that_the_run_would_draw(tmp_path, capsys):
    """Its first step, to the bit; then training on the file takes that step too."""
    config = table_run.make(tmp_path)
    assert collect(config, tmp_path / "groups.jsonl") == 0
    assert not (tmp_path / "run").exists()
    rows = rows_of(tmp_path / "groups.jsonl")
    assert len(rows) == 12 * 2 and [r["step"] for r in rows] == sorted(r["step"] for r in rows)
    assert {len(r["responses"]) for r in rows} == {6} and rows[0]["answer"] in "abc"
    assert cli.main(["train", str(config)]) == 0
    drawn = [r for r in rows_of(tmp_path / "run" / "completions.jsonl") if r["kind"] == "train" and r["step"] == 1]
    assert [r["response"] for r in drawn] == [y for row in rows[:2] for y in row["responses"]]
    assert [r["reward"] for r in drawn] == [y for row in rows[:2] for y in row["rewards"]]
    fed = ["--data.train", str(tmp_path / "groups.jsonl"), "--run.folder", str(tmp_path / "fed")]
    assert cli.main(["train", str(config), *fed]) == 0
    first, again = (lasting(tmp_path / name)[1] for name in ("run", "fed"))
    for key in ("loss", "reward/mean", "reward/right", "gradient_norm", "length/mean"):
        assert again[key] == first[key], key
    assert again["tokens/sampled"] == 0
    assert "nothing is sampled" in capsys.readouterr().out


class Stopping(TablePolicy):
    """Raises after some calls, as a kill would end it."""

    left = 3

    def generate(self, prompts, seeds, sampling):
        type(self).left -= 1
        if type(self).left < 0:
            raise KeyboardInterrupt
        return super().generate(prompts, seeds, sampling)


def test_a_stopped_collection_continues_and_ends_the_same(tmp_path, monkeypatch, capsys):
    config, out = table_run.make(tmp_path), tmp_path / "cut.jsonl"
    assert collect(config, tmp_path / "whole.jsonl") == 0
    with monkeypatch.context() as patch:
        patch.setattr("gvpo_core.training.policy.table.TablePolicy", Stopping)
        patch.setattr(Stopping, "left", 3)
        assert collect(config, out) == 130
    partial = tmp_path / "cut.jsonl.partial"
    assert not out.exists() and len(rows_of(partial)) == 6
    with partial.open("a") as f:  # a step of which a kill left one group and half of the other
        f.write(json.dumps(rows_of(partial)[0] | {"step": 4}) + '\n{"kind": "train", "step": 4, "gr')
    assert collect(config, out) == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and not partial.exists()


def test_a_killed_collection_continues_and_ends_the_same(tmp_path, capsys):
    config, out = table_run.make(tmp_path, steps=60), tmp_path / "cut.jsonl"
    command = [sys.executable, "-m", "gvpo_core.training.cli", "collect", str(config), str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ)
    partial = tmp_path / "cut.jsonl.partial"
    while not (partial.exists() and partial.stat().st_size > 2_000) and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL and not out.exists()
    assert collect(config, out) == 0
    assert collect(config, tmp_path / "whole.jsonl") == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("how", ["moved", "removed", "replaced"])
def test_a_file_that_is_moved_meanwhile_gets_nothing_more(how, tmp_path, monkeypatch, capsys):
    """A new file began with the step at hand, and was given the name of the whole."""
    config, out = table_run.make(tmp_path), tmp_path / "out.jsonl"
    partial, moved = tmp_path / "out.jsonl.partial", tmp_path / "moved"

    class Moving(TablePolicy):
        calls = 0

        def generate(self, prompts, seeds, sampling):
            type(self).calls += 1
            if self.calls == 3:
                partial.rename(moved)
                if how == "removed":
                    moved.unlink()
                elif how == "replaced":
                    partial.write_text("")
            return super().generate(prompts, seeds, sampling)

    with monkeypatch.context() as patch:
        patch.setattr("gvpo_core.training.policy.table.TablePolicy", Moving)
        assert collect(config, out) == 1
    assert (
        "out.jsonl.partial was moved, removed or replaced meanwhile: nothing more was written"
        in capsys.readouterr().err
    )
    assert not out.exists() and (not partial.exists() or not partial.read_text())
    if how != "removed":
        moved.rename(partial)
        assert collect(config, out) == 0 and len(rows_of(out)) == 24


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(number, tmp_path, monkeypatch, capsys):
    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    config = table_run.make(tmp_path)
    monkeypatch.setattr(fcntl, "flock", flock)
    assert collect(config, tmp_path / "groups.jsonl") == 1
    assert f"without file locks (flock: {os.strerror(number)})" in capsys.readouterr().err


def test_a_result_that_somebody_else_made_is_not_replaced(tmp_path, monkeypatch, capsys):
    config, out = table_run.make(tmp_path, steps=2), tmp_path / "out.jsonl"

    class Making(TablePolicy):
        def generate(self, prompts, seeds, sampling):
            out.write_text("mine")
            return super().generate(prompts, seeds, sampling)

    monkeypatch.setattr("gvpo_core.training.policy.table.TablePolicy", Making)
    assert collect(config, out) == 1
    assert "out.jsonl was created meanwhile by another process" in capsys.readouterr().err
    assert out.read_text() == "mine" and len(rows_of(tmp_path / "out.jsonl.partial")) == 4


def test_a_column_that_json_would_change_is_left_out_and_named(tmp_path, caplog, capsys):
    """A date was left out and a tuple became a list, both in silence."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    config = table_run.make(tmp_path, steps=1)
    pairs = pyarrow.array([[("a", 1)]] * 3, pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    columns = {"prompt": ["p0", "p1", "p2"], "answer": ["a", "b", "c"], "day": [dt.date(2026, 1, 2)] * 3}
    columns |= {"pairs": pairs, "n": [1, 2, 3], "step": ["one", "two", "three"]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "train.parquet")
    assert collect(config, tmp_path / "out.jsonl", "--data.train", str(tmp_path / "train.parquet")) == 0
    row = rows_of(tmp_path / "out.jsonl")[0]
    assert row["n"] in (1, 2, 3) and row["step"] == 1 and not {"day", "pairs"} & row.keys()
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "column 'day' of row" in said and "JSON would change its date (datetime.date(2026, 1, 2))" in said
    assert "column 'pairs'" in said and "column 'step'" in said and "the file has a column of its own" in said
    assert said.count("column 'day'") == 1 and "'n'" not in said


def test_a_column_that_nests_too_deep_is_left_out_and_named(tmp_path, caplog, capsys):
    config = table_run.make(tmp_path, steps=1)
    deep = "[" * 900 + "]" * 900
    (tmp_path / "train.jsonl").write_text(f'{{"prompt": "p0", "answer": "a", "tests": {deep}}}\n' * 2)
    assert collect(config, tmp_path / "out.jsonl") == 0
    assert "answer" in rows_of(tmp_path / "out.jsonl")[0] and "tests" not in rows_of(tmp_path / "out.jsonl")[0]
    assert any(
        "column 'tests' of row" in r.getMessage() and "its list nests too deep" in r.getMessage()
        for r in caplog.records
    )


def test_other_settings_do_not_continue_with_a_file(tmp_path, monkeypatch, capsys):
    config, out = table_run.make(tmp_path), tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr("gvpo_core.training.policy.table.TablePolicy", Stopping)
        patch.setattr(Stopping, "left", 2)
        assert collect(config, out) == 130
    assert collect(config, out, "--run.seed", "5") == 2
    assert "out.jsonl.partial was started with other settings" in capsys.readouterr().err
    assert collect(config, out) == 0 and collect(config, out) == 2
    assert "out.jsonl already exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("out.csv", [], "expected a name that ends with .jsonl"),
        ("out.jsonl", ["--rollout.source", "recorded"], "data.train has no recorded responses"),
    ],
)
def test_what_cannot_be_collected_is_reported(name, options, said, tmp_path, capsys):
    assert collect(table_run.make(tmp_path), tmp_path / name, *options) == 2
    assert said in capsys.readouterr().err


def test_recorded_data_is_not_collected_again(tmp_path, capsys):
    config = table_run.make(tmp_path)
    rows = [{"prompt": p, "responses": ["a", "b"], "rewards": [1, 0]} for p in table_run.PROMPTS]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert collect(config, tmp_path / "out.jsonl") == 2
    assert "holds recorded responses" in capsys.readouterr().err


def test_collect_without_arguments_prints_its_usage(capsys):
    assert cli.main(["collect"]) == 2 and cli.main(["collect", "--help"]) == 0
    out = capsys.readouterr().out
    assert "usage: gvpo collect CONFIG OUT.jsonl" in out
    assert "OUT.jsonl.partial" in out and "--data.train OUT.jsonl" in out, "what it writes, and what reads it"
