"""Recorded runs by the command line: killed at any moment they end as unbroken ones; `gvpo eval` tells their loss."""

import json
from pathlib import Path

import killing
import pytest
import recorded_data
import table_run

from gvpo_core.training import cli

pytestmark = pytest.mark.core


def make(folder: Path, steps: int) -> Path:
    config = table_run.make(folder, steps=steps)
    rows = recorded_data.groups()
    for row in rows:
        row["responses"] = [y if y != "e" else "d" for y in row["responses"]]
    rows.append({"prompt": "p0", "responses": ["a", "b"], "rewards": [1, None]})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.write_text(config.read_text().partition("[rewards")[0])
    return config


def test_kills_change_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    assert cli.main(["train", str(make(tmp_path / "whole", 160))]) == 0
    config, run = make(tmp_path / "cut", 160), tmp_path / "cut" / "run"
    launch = killing.Forked.of()
    hit = killing.kill_and_resume(config, run, launch, kills=6, seed=3, longest=0.3)
    assert sum(hit.values()) >= 2, hit
    whole = tmp_path / "whole" / "run"
    assert killing.lasting(run) == killing.lasting(whole)
    assert (run / "completions.jsonl").read_bytes() == (whole / "completions.jsonl").read_bytes()
    assert killing.events(run).count("resume") >= 1
    entries = [json.loads(line)["key"] for line in (run / "reference_scores.jsonl").read_bytes().splitlines()]
    assert len(set(entries)) == len(recorded_data.groups()), "a singleton is never scored"


@pytest.mark.slow
def test_kills_of_a_mixture_change_nothing(tmp_path, monkeypatch, capsys):
    """With groups kept for replay, prompts drawn again, and prompts that come back."""
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")

    def made(name: str) -> Path:
        config = table_run.make(tmp_path / name, steps=160)
        text = (
            config.read_text().replace("[rollout]", '[rollout]\nequal = "redraw"').replace("prompts = 2", "prompts = 4")
        )
        text = text.replace("responses = 6", "responses = 2").replace("[data]", "[data]\ncurriculum = 0.3")
        config.write_text(text + "\n[replay]\ngroups = 20\nshare = 0.5\n")
        return config

    assert cli.main(["train", str(made("whole"))]) == 0
    config, run = made("cut"), tmp_path / "cut" / "run"
    launch = killing.Forked.of()
    hit = killing.kill_and_resume(config, run, launch, kills=6, seed=4, longest=0.3)
    assert sum(hit.values()) >= 2, hit
    whole = tmp_path / "whole" / "run"
    assert killing.lasting(run) == killing.lasting(whole)
    assert (run / "completions.jsonl").read_bytes() == (whole / "completions.jsonl").read_bytes()
    trained = [r for r in killing.lasting(run) if r["kind"] == "train"]
    assert trained[-1]["groups/replayed"] == 2 and trained[-1]["replay/kept"] == 20
    assert any(r["groups/redrawn"] for r in trained) and any(r["groups/revisited"] for r in trained)


def test_eval_reports_the_loss_of_a_checkpoint(tmp_path, capsys):
    assert cli.main(["train", str(make(tmp_path, 8))]) == 0
    run = tmp_path / "run"
    told = [r for r in killing.lasting(run) if r["kind"] == "eval"]
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Held-out loss on recorded groups: " in page and "2 recorded groups a step" in page
    assert "Held-out reward" not in page and "Training reward was" not in page
    capsys.readouterr()
    assert cli.main(["eval", str(run)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("newest: loss ") and "accuracy" in said and "on 6 recorded groups" in said
    assert cli.main(["eval", str(run), "--checkpoint", "initial", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["eval/loss"] == told[0]["eval/loss"]
    assert cli.main(["eval", str(run), "--compare", "initial"]) == 2
    assert "--compare needs rewards" in capsys.readouterr().err
