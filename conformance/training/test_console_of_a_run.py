"""A real run of the loop: console, metrics.jsonl, dictionary and report tell the same numbers."""

import io
import json
import re
from collections import Counter

import pytest
import table_run
from console_rows import check_number, check_row

from gvpo_core.training.config.file import read_config
from gvpo_core.training.data import load_rows
from gvpo_core.training.loop import train
from gvpo_core.training.policy.table import TablePolicy
from gvpo_core.training.report.read import read_run
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
    phases = re.findall(r"^    seconds: (.*), memory", text, re.MULTILINE)
    for step, line in zip((1, 11), phases, strict=True):
        for phase, shown in re.findall(r"(\w+) ([^\s,]+)", line):
            check_number(shown, trained[step][f"seconds/{phase}"], phase)


def test_the_report_is_there_with_every_step(run):
    folder, _, text = run
    assert str(folder / "report.html") in text and (folder / "report.html").exists()
    data = read_run(folder)
    assert len(data.train) == 12 and sorted(data.held_out) == [0, 12] and data.problems == []


def test_the_end_tells_what_was_achieved_and_how_to_continue(run):
    folder, records, text = run
    end = text[text.index("\nheld-out reward") :]
    evaluations = [r for r in records if r["kind"] == "eval"]
    first, last = re.findall(r"(\S+) \+- \S+", end)[:2]
    check_number(first, evaluations[0]["eval/reward"])
    check_number(last, evaluations[-1]["eval/reward"])
    verdicts = Counter(max((r["verdict"], r["machine/verdict"]), key=LEVELS.index) for r in records if "verdict" in r)
    assert {level: int(n) for n, level in re.findall(r"(\d+) (OK|WATCH|BAD)", end)} == dict(verdicts)
    assert f"gvpo eval {folder}" in end and f"gvpo export {folder}" in end
