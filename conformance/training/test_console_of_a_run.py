"""A real run of the loop: console, metrics.jsonl, dictionary and report tell the same numbers."""

import io
import json
import logging
import re
import sys
from collections import Counter

import pytest
import table_run
from console_rows import check_number, check_row

from gvpo_core.training.cli import main
from gvpo_core.training.config.file import read_config
from gvpo_core.training.data import load_rows
from gvpo_core.training.loop import train
from gvpo_core.training.policy.table import TablePolicy
from gvpo_core.training.report.read import read_run
from gvpo_core.training.run.journal import Journal
from gvpo_core.training.watch.alerts import LEVELS
from gvpo_core.training.watch.columns import COLUMNS
from gvpo_core.training.watch.console import Console
from gvpo_core.training.watch.metric_names import undocumented

pytestmark = pytest.mark.core

pytest.importorskip("tomli_w")  # the run folder's config.toml is written with it


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    config = read_config(table_run.make(folder))
    policy = TablePolicy(json.loads((folder / "table.json").read_text()), config.optimizer, updates=config.updates)
    out = io.StringIO()
    rows = load_rows(str(folder / "train.jsonl"), "data.train")
    result = train(config, policy, train_rows=rows, evaluation_rows=rows, console=Console(config.run.steps, stream=out))
    records = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    return result.folder, records, out.getvalue()


def test_every_key_of_a_run_is_documented(run):
    _, records, _ = run
    assert {r["kind"] for r in records} >= {"train", "eval"}
    assert [key for r in records for key in undocumented(r)] == []


def test_every_number_on_the_console_is_one_of_metrics_jsonl(run):
    _, records, text = run
    trained = {r["step"]: r for r in records if r["kind"] == "train"}
    titles = [c.title for c in COLUMNS] + ["left", "state"]
    rows = [line.split() for line in text.splitlines() if len(line.split()) == len(titles)]
    rows = [row for row in rows if row[0].isdigit()]
    assert [int(row[0]) for row in rows] == sorted(trained) == list(range(1, 13))
    for cells in rows:
        check_row(cells, trained[int(cells[0])])
    phases = re.findall(r"^    seconds: (.*?), memory", re.sub("\n {6}", " ", text), re.MULTILINE)
    for step, line in zip((1, 11), phases, strict=True):
        for phase, shown in re.findall(r"(\w+) ([^\s,]+)", line):
            check_number(shown, trained[step][f"seconds/{phase}"], phase)


def test_the_report_is_there_with_every_step(run):
    folder, _, text = run
    assert str(folder / "report.html") in text and (folder / "report.html").exists()
    data = read_run(folder)
    assert len(data.train) == 12 and sorted(data.held_out) == [0, 12] and data.problems == []


def test_the_end_prints_the_result_and_how_to_continue(run):
    folder, records, text = run
    end = text[text.index("\nheld-out reward") :]
    evaluations = [r for r in records if r["kind"] == "eval"]
    first, last = re.findall(r"(\S+) \+- \S+", end)[:2]
    check_number(first, evaluations[0]["eval/reward"])
    check_number(last, evaluations[-1]["eval/reward"])
    verdicts = Counter(max((r["verdict"], r["machine/verdict"]), key=LEVELS.index) for r in records if "verdict" in r)
    assert {level: int(n) for n, level in re.findall(r"(\d+) (OK|WATCH|BAD)", end)} == dict(verdicts)
    assert f"gvpo eval {folder}" in end and f"gvpo export {folder}" in end
    assert f"report       gvpo report {folder}\n" in re.sub(" {7,}", " " * 7, end)


def test_every_line_of_a_run_is_within_80_columns(tmp_path, monkeypatch, capfd):
    config = table_run.make(tmp_path, extra='[rewards.exactly_the_answer]\nfunction = "exact_match"\nweight = 0.5')
    config.write_text(config.read_text().replace(f"{tmp_path}/", "").replace(str(tmp_path), "."))
    monkeypatch.chdir(tmp_path)

    def spoken(*options):
        assert main(["train", "config.toml", *options]) == 0
        said = capfd.readouterr()
        return said.out.splitlines(), said.err.splitlines()

    def loud(self, *given, **named):
        logging.getLogger("gvpo.torch").warning("%s", "words of many letters " * 9 + "\n" + "a second line " * 9)
        return step(self, *given, **named)

    step = Journal.step
    monkeypatch.setattr(Journal, "step", loud)
    monkeypatch.setattr(logging.root, "handlers", [])  # not those of the test runner
    in_file = spoken("--run.folder", "other")[1]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    first, log = spoken()
    again, _ = spoken("--run.steps", "13", "--run.allow-changes", "True")
    back, _ = spoken("--from-step", "9", "--run.steps", "13", "--run.allow-changes", "True")
    # The run shows what could be too long: phases, an event, several rewards and a warning.
    assert any(line.startswith("    seconds: ") for line in first) and "* resumed after step 12 of 13" in again
    assert any(line.startswith("* went back") for line in back)
    # In a file a record is as long as it is, to be searched.
    assert f"WARNING gvpo.torch: {'words of many letters ' * 9}" in in_file
    assert "WARNING gvpo.torch: words of many" in log[1] and log[2].startswith("    letters")
    assert [line for line in [*first, *log, *again, *back] if len(line) > 80] == []
