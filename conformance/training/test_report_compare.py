"""`gvpo report A B`: curves of several runs over each other, the settings that differ, held-out results."""

import html
import json
import re
import shutil

import pytest
from made_up_run import run_of
from simulated_run import write_hostile_run, write_run

from gvpo_core.training.cli import main
from gvpo_core.training.report.changes import prompt_rewards
from gvpo_core.training.report.compare import comparison, labels
from gvpo_core.training.report.read import read_run

pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "a", steps=40)
    write_run(folder / "b", steps=60, rate=2.0, beta=0.1)
    return folder / "a", folder / "b"


def cells(text, heading):
    """The rows of the first table after a heading, as lists of cells of plain text."""
    table = text.split(heading)[1].split("</table>")[0]
    rows = re.findall("<tr>(.*?)</tr>", table, re.DOTALL)
    return [
        [html.unescape(re.sub("<[^>]+>", "", c)).strip() for c in re.findall("<t[dh]>(.*?)</t[dh]>", r)] for r in rows
    ]


def test_curves_are_drawn_over_each_other(runs):
    text = comparison([read_run(run) for run in runs])
    drawings = [json.loads(html.unescape(d)) for d in re.findall('data-series="([^"]*)"', text)]
    assert len(drawings) >= 8
    for drawing in drawings:
        assert [series["name"] for series in drawing] == ["a", "b"]
        assert [series["colour"] for series in drawing] == [1, 2]
        assert max(drawing[0]["step"]) == 40 and max(drawing[1]["step"]) == 60


def test_only_the_settings_that_differ_are_listed(runs):
    rows = {row[0]: row[1:] for row in cells(comparison([read_run(run) for run in runs]), "Settings that differ")}
    assert rows == {"Setting": ["a", "b"], "run.steps": ["40", "60"], "objective.beta": ["0.05", "0.1"]}
    same = comparison([read_run(runs[0]), read_run(runs[0])])
    assert "the settings, data, versions and reward code are the same" in same


def test_data_and_versions_that_differ_are_listed_too(runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "c")
    facts = json.loads((runs[0] / "environment.json").read_text())
    facts |= {"gvpo": "9.9", "data": {"evaluation": {"rows": 5, "sha256": "0123456789abcdef" * 4}}}
    (tmp_path / "c" / "environment.json").write_text(json.dumps(facts))
    rows = {
        r[0]: r[1:] for r in cells(comparison([read_run(runs[0]), read_run(tmp_path / "c")]), "Settings that differ")
    }
    assert rows["environment.gvpo"] == ["0.1.0", "9.9"]
    assert rows["environment.data.evaluation.sha256"] == ["", "0123456789ab"]


def test_held_out_results_stand_side_by_side_and_paired_by_prompt(runs):
    data = [read_run(run) for run in runs]
    head, first, second = cells(comparison(data), "<h1>")
    assert head[-2:] == ["Compared with a", "Verdict"] and first[0] == "a" and second[0] == "b"
    assert first[1:2] + second[1:2] == ["40 of 40", "60 of 60"]
    last = [{p: r for (_, p), r in prompt_rewards(run.held_out[max(run.held_out)]).items()} for run in data]
    shared = [p for p in last[0] if p in last[1]]
    wanted = sum(last[1][p] - last[0][p] for p in shared) / len(shared)
    assert len(shared) == 32 and f"({len(shared)} prompts)" in second[5] and "paired by prompt" in second[5]
    assert float(second[5].split(" ")[0]) == pytest.approx(wanted, abs=0.006)


def test_the_command_writes_one_page_and_names_it(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["report", *map(str, runs)]) == 0
    assert capsys.readouterr().out.strip() == "comparison.html"
    assert (tmp_path / "comparison.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert main(["report", *map(str, runs), "--out", "other.html"]) == 0 and (tmp_path / "other.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "none", "empty"], "none is not a run folder: it has no metrics.jsonl; empty is not a run folder"),
        (["a", "./a"], "a run is given twice"),
        (["a", "b", "1", "2", "3", "4", "5"], "7 runs; a page compares at most 6"),
        (["a", "--out", "x.html"], "--out is for a comparison"),
        (["a", "b", "--out", "empty"], "cannot write empty"),
    ],
)
def test_what_is_not_a_run_is_refused_in_a_line(arguments, message, runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "1", "2", "3", "4", "5"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("")
    (tmp_path / "empty").mkdir()
    assert main(["report", *arguments]) in (1, 2)
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "comparison.html").exists()


def test_foreign_text_is_inert(tmp_path):
    write_hostile_run(tmp_path / "<img src=x>")
    write_run(tmp_path / "b", steps=20)
    text = comparison([read_run(tmp_path / "<img src=x>"), read_run(tmp_path / "b")])
    assert "<img" not in text and "&lt;img" in text


def test_runs_of_the_same_name_are_distinguished(tmp_path):
    assert labels([tmp_path / "x" / "run", tmp_path / "y" / "run"]) == ["x/run", "y/run"]


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ('[rewards.right]\nfunction = "a.py:f"', None),
        ('[rewards.right]\nfunction = "a.py:f"\ntimeout = 1.0\nweight = 1.0', None),
        ('[rewards.right]\nfunction = "moved/a.py:f"', None),  # the same code in another place
        ('[rewards.right]\nfunction = "a.py:f"\nweight = 2.0', "rewards.right.weight is 1.0 in a and 2.0 in b"),
        ('[rewards.right]\nfunction = "other.py:f"', "rewards.right.function is 'a.py:f' in a and 'other.py:f' in b"),
        ('[rewards.short]\nfunction = "a.py:f"', "a has the rewards right, b has short"),
        ("", None),  # a run on recorded groups
    ],
)
def test_runs_of_different_rewards_are_refused(theirs, message, tmp_path, capsys):
    for name, rewards in (("a", '[rewards.right]\nfunction = "a.py:f"'), ("b", theirs)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "reward/mean": 0.5}\n')
        (tmp_path / name / "config.toml").write_text(rewards)
        code = "2" if "other" in rewards else "1"
        (tmp_path / name / "environment.json").write_text(json.dumps({"rewards": {"right": {"sha256": code}}}))
    out = tmp_path / "comparison.html"
    status = main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out)])
    said = capsys.readouterr().err
    assert (status, out.exists()) == ((2, False) if message else (0, True))
    assert said == "" if message is None else message in said and said.count("\n") == 1


def test_a_run_on_recorded_groups_is_compared_by_its_held_out_loss(tmp_path):
    runs = [run_of(loss=[0.5, 0.4], evaluations=[{"step": s, "eval/loss": 0.3} for s in (0, 2)]) for _ in range(2)]
    for run, name in zip(runs, "xy", strict=True):
        run.folder = tmp_path / name
    text = comparison(runs)
    assert [row[2:5] for row in cells(text, "<h1>")[1:]] == [["no held-out reward", "", ""]] * 2
    assert "<h3>Held-out loss" in text and "<h3>Held-out reward" not in text
