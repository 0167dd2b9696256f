"""`gvpo collect`: sampling and scoring as a job of its own, and training on what it wrote."""

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


def test_it_says_how_it_is_called(capsys):
    assert cli.main(["collect"]) == 2 and cli.main(["collect", "--help"]) == 0
    assert "usage: gvpo collect CONFIG OUT.jsonl" in capsys.readouterr().out
