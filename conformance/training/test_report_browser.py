"""The report in a real browser: no complaint, no foreign script, and its own script shows what the run did.

nox -s "outside(browser)" fails where there is no Chromium; elsewhere these tests are skipped without one, and
test_report.py reads the page by a strict parser.
"""

import base64
import hashlib
import html
import json
import os
import re
import shutil
import subprocess

import pytest
from simulated_run import HOSTILE, write_episodes, write_hostile_run, write_long_run, write_run

from gvpo_core.training.report import write_report
from gvpo_core.training.report.page import page
from gvpo_core.training.report.read import read_run

pytestmark = pytest.mark.core

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
if CHROMIUM is None:
    asked = "browser" in os.environ.get("GVPO_SUBJECTS", "").split(",")
    assert not asked, "no Chromium is on PATH: expected chromium, chromium-browser, google-chrome or chrome"
    pytest.skip("no Chromium is on PATH", allow_module_level=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "sums"
    write_run(folder, resumed_at=71)
    return folder


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "hostile"
    write_hostile_run(folder)
    return folder


def driven(text, driver):
    """The page with a script of the test's own, which its policy then allows."""
    digest = base64.b64encode(hashlib.sha256(driver.encode()).digest()).decode()
    return text.replace("script-src '", f"script-src 'sha256-{digest}' '").replace(
        "</body>", f"<script>{driver}</script></body>"
    )


def browse(path, profile):
    """The page's DOM after its script ran, and what the browser's console said."""
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=2000", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_a_browser_opens_it_without_a_complaint_and_runs_no_foreign_script(hostile, tmp_path):
    dom, console = browse(write_report(hostile), tmp_path)
    assert console == []
    assert "<title>hostile: GVPO run</title>" in dom and dom.count("<figure") >= 12


def test_the_pointer_shows_the_values_under_it(run, tmp_path):
    text = write_report(run).read_text(encoding="utf-8")
    driver = """
const svg = document.querySelector("svg[data-series]"), box = svg.getBoundingClientRect();
svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.right - 2, clientY: box.top + 9, bubbles: true}));
"""
    (tmp_path / "page.html").write_text(driven(text, driver), encoding="utf-8")
    dom, console = browse(tmp_path / "page.html", tmp_path / "profile")
    assert console == []
    tip = re.sub("<[^>]+>", "", re.search(r'<div id="tip".*?</div>', dom, re.DOTALL)[0])
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-2:]
    training, held_out = last[0]["reward/mean"], last[1]["eval/reward"]
    assert tip.startswith("step 160\n")
    shown = dict(re.findall(r"(training|held-out)  (\S+) ±", tip))
    assert {k: float(v) for k, v in shown.items()} == pytest.approx(
        {"training": training, "held-out": held_out}, rel=1e-3
    )


def test_responses_are_filtered_by_step_group_and_rank(hostile, tmp_path):
    text = write_report(hostile).read_text(encoding="utf-8")
    driver = """
const set = (id, value) => {
  const select = document.getElementById(id);
  select.value = value;
  select.dispatchEvent(new Event("change"));
};
set("at-step", "4"); set("at-group", "2"); set("which", "all");
const all = document.querySelectorAll("#responses .answers > div").length;
set("which", "best");
document.getElementById("later").click();
document.body.dataset.said = [all, document.getElementById("at-step").selectedIndex].join(" ");
"""
    (tmp_path / "page.html").write_text(driven(text, driver), encoding="utf-8")
    dom, console = browse(tmp_path / "page.html", tmp_path / "profile")
    assert console == [] and "<title>hostile: GVPO run</title>" in dom  # no foreign script ran
    assert 'data-said="8 5"' in dom
    written = [json.loads(line) for line in (hostile / "completions.jsonl").read_text().splitlines()]
    own = [r for r in written if (r["kind"], r["step"], r["group"]) == ("train", 6, 2)]
    best = max(own, key=lambda r: r["reward"] if r["reward"] is not None else -1)
    place = dom.split('<div id="responses">')[1].split('<div id="rows"')[0]
    assert place.count('<p class="score"><b>') == 1 and f"<b>{best['reward']:g}</b>" in place
    shown = html.unescape(re.search('<p class="text">(.*?)</p></div>', place, re.DOTALL)[1])
    assert HOSTILE[:-8].replace("\x1b", r"\x1b") in shown and r"\u202e\x00" in shown


def test_episodes_are_filtered_by_their_end(run, tmp_path):
    text = write_report(write_episodes(tmp_path / "played", run)).read_text(encoding="utf-8")
    driver = """
const which = document.getElementById("which");
which.value = "turns";
which.dispatchEvent(new Event("change"));
document.body.dataset.said = document.querySelectorAll("#responses .answers > div").length;
"""
    (tmp_path / "page.html").write_text(driven(text, driver), encoding="utf-8")
    dom, console = browse(tmp_path / "page.html", tmp_path / "profile")
    assert console == []
    place = dom.split('<div id="responses">')[1].split('<div id="rows"')[0]
    count = int(re.search('data-said="([0-9]+)"', dom)[1])
    assert count > 0 and place.count("cut at the turn limit after") == count
    assert "cut at the token limit" not in place and "ended after" not in place


@pytest.mark.slow
def test_ten_thousand_steps_open(run, tmp_path):
    (tmp_path / "page.html").write_text(page(read_run(write_long_run(tmp_path / "long", run))), encoding="utf-8")
    dom, console = browse(tmp_path / "page.html", tmp_path / "profile")
    assert console == [] and dom.count('<p class="score"><') == 4  # best and worst of the last step's two groups
