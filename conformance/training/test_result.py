"""What `train` returns: the run's numbers as columns, the held-out change, and HTML for a notebook."""

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from run_folders import ROWS, config, go

from gvpo_core.training.report.page import page
from gvpo_core.training.report.read import read_run

pytestmark = pytest.mark.core


def records(folder, kind):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [r for line in lines if (r := json.loads(line))["kind"] == kind]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 12 steps, of which the last 6 were resumed."""
    folder = tmp_path_factory.mktemp("result") / "a <run>"
    go(config(folder, steps=6), evaluation_rows=ROWS)
    result, _ = go(config(folder, steps=12, allow_changes=True), evaluation_rows=ROWS)
    return result


def test_metrics_are_the_columns_of_the_whole_run(run):
    written = records(run.folder, "train")
    assert run.step == 12 and run.exit_status == 0
    assert run.metrics["step"].tolist() == [r["step"] for r in written] == list(range(1, 13))
    for key in ("reward/mean", "kl", "loss", "seconds/step"):
        np.testing.assert_array_equal(run.metrics[key], [r[key] for r in written])
    assert {len(column) for column in run.metrics.values()} == {12}
    assert all(isinstance(r[key], int | float) or r[key] is None for r in written for key in run.metrics if key in r)


def test_a_key_that_a_step_lacks_is_nan_there(run):
    assert "reward/trend" not in records(run.folder, "train")[0]
    trend = run.metrics["reward/trend"]
    assert np.isnan(trend[0]) and np.isfinite(trend[1:]).all()


def test_held_out_is_the_change_from_the_first_to_the_last_evaluation(run):
    evaluated = records(run.folder, "eval")
    assert run.evaluations == evaluated and len(evaluated) >= 2
    assert run.held_out.start == pytest.approx(evaluated[0]["eval/reward"])
    assert run.held_out.end == pytest.approx(evaluated[-1]["eval/reward"])
    assert run.held_out.paired == len(ROWS)


def test_a_notebook_shows_the_curves_and_the_change(run):
    shown = run._repr_html_()
    start, style, rest = re.fullmatch(r"(.*)<style>(.*?)</style>(.*)", shown, re.DOTALL).groups()
    tree = ElementTree.fromstring(start + rest)  # every element is closed
    charts = [svg.get("aria-label") for svg in tree.iter("svg")]
    assert charts == ["Reward by step", "KL to the reference, nats a response by step"]
    assert "Held-out reward" in rest and "→" in rest
    assert "<run>" not in shown and "&lt;run&gt;" in shown
    assert "script" not in shown and "http" not in rest
    assert style.startswith(".gvpo-result {") and style.count("{") == style.count("}") and ":root" not in style


def test_the_notebook_says_what_the_report_says(run):
    whole, shown = page(read_run(run.folder)), run._repr_html_()
    (figures,) = re.findall(r'<div class="figures">(.*?)</div></div>', whole, re.DOTALL)
    assert figures in shown


def test_without_evaluations_there_is_no_change(tmp_path):
    result, _ = go(config(tmp_path / "run"))
    assert result.held_out is None and result.evaluations == []
    assert "<svg" in result._repr_html_()


def test_a_result_whose_folder_is_gone_shows_its_fields(tmp_path):
    result, _ = go(config(tmp_path / "run"))
    shutil.rmtree(tmp_path / "run")
    assert result._repr_html_().startswith("<pre>Result(step=3, ")
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        _ = result.metrics
