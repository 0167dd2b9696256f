"""The report: what it says is what the run did, nothing in it is live, and it opens whatever state the run is in.

Here a strict parser reads the page; test_report_browser.py opens it in a browser.
"""

import html
import json
import re
import shutil
from datetime import UTC, datetime
from html.parser import HTMLParser

import numpy as np
import pytest
from made_up_run import run_of
from simulated_run import write_episodes, write_hostile_run, write_long_run, write_run

from gvpo_core.training.report import write_comparison, write_report
from gvpo_core.training.report.changes import held_out_change
from gvpo_core.training.report.charts import LIMIT
from gvpo_core.training.report.history import episodes, verdict
from gvpo_core.training.report.page import page
from gvpo_core.training.report.read import read_run
from gvpo_core.training.report.reading import read_out
from gvpo_core.training.report.sections import sections

pytestmark = pytest.mark.core

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Strict(HTMLParser):
    """Parses a page and keeps its tags; raises where one is not closed in turn."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.stack, self.tags, self.text = [], [], []
        self.feed(text)
        self.close()
        assert not self.stack, f"not closed: {self.stack}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack and self.stack[-1] == tag, f"</{tag}> closes {self.stack[-1:]}"
        self.stack.pop()

    def handle_data(self, data):
        if self.stack[-1:] not in (["script"], ["style"]):
            self.text.append(data)


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


def test_the_page_is_well_formed_and_fetches_nothing(run, hostile):
    for folder in (run, hostile):
        parsed = Strict(write_report(folder).read_text(encoding="utf-8"))
        assert not [t for t, a in parsed.tags if {"src", "href", "srcset", "action", "style"} & set(a)]
        assert not [a for _, a in parsed.tags if any(name.startswith("on") for name in a)]
        tags = {t for t, _ in parsed.tags}
        assert not tags & {"img", "link", "iframe", "object", "embed", "form", "a", "base", "use", "image"}
        assert [t for t, _ in parsed.tags].count("script") == 1
        assert "browse" in [a.get("id") for _, a in parsed.tags]
    style = re.search("<style>(.*?)</style>", page(read_run(run)), re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style


def test_foreign_text_is_inert_and_shown(hostile):
    text = write_report(hostile).read_text(encoding="utf-8")
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
    shown = "".join(Strict(text).text)
    assert "<script>document.title='owned'</script>" in shown and r"\x1b[31m" in shown and r"\u202e\x00" in shown


def test_the_reading_has_the_numbers_of_the_run(run):
    data = read_run(run)
    text = " ".join(read_out(data).sentences)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [r for r in records if r["kind"] == "eval"]
    means = [r["reward/mean"] for r in records if r["kind"] == "train"]
    held_out = re.search(r"Held-out reward rose from (\S+) ± (\S+) to (\S+) ± (\S+) \(over 32 prompts\)", text)
    wanted = [evaluations[i][key] for i in (0, -1) for key in ("eval/reward", "eval/half_width")]
    assert [float(x) for x in held_out.groups()] == pytest.approx(wanted, abs=0.0051)
    training = re.search(r"Training reward rose from (\S+) ± \S+ to (\S+) ±", text)
    assert [float(x) for x in training.groups()] == pytest.approx(
        [np.mean(means[:10]), np.mean(means[-10:])], abs=0.0051
    )
    assert text.count("beyond noise") == 2 and "It finished at step 160." in text
    change = held_out_change(data)
    before, after = ({r["prompt"]: r["reward"] for r in rows} for rows in (data.held_out[0], data.held_out[160]))
    differences = np.array([after[p] - before[p] for p in before])
    assert change.difference == pytest.approx(differences.mean())
    assert change.half == pytest.approx(2.0395 * differences.std(ddof=1) / np.sqrt(32), rel=1e-3)  # t of 31
    assert read_out(data).notes == ["Step 70: resumed after step 70 of 160"]


def test_crashed_and_partial_folders(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        write_report(tmp_path)
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    shutil.copy(run / "config.toml", crashed)
    text = write_report(crashed).read_text(encoding="utf-8")
    assert "No step is recorded" in text and "metrics.jsonl is missing" in text
    (crashed / "environment.json").write_text('{"cut')
    (crashed / "config.toml").write_text("[run")
    lines = (run / "metrics.jsonl").read_bytes()
    (crashed / "metrics.jsonl").write_bytes(lines[: len(lines) // 2] + b"\n\xff\xfe{]\n[3]\n" + lines[:200])
    rows = (run / "completions.jsonl").read_bytes()
    (crashed / "completions.jsonl").write_bytes(rows[: len(rows) // 2])
    text = write_report(crashed).read_text(encoding="utf-8")
    Strict(text)
    assert "config.toml is not TOML" in text and "environment.json is not JSON" in text
    assert "Its settings are not known." in text and "Its last recorded step is" in text
    for size in range(1, 4000, 271):  # cut anywhere
        (crashed / "metrics.jsonl").write_bytes(lines[:size])
        Strict(write_report(crashed).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("completions.jsonl", rb'"group": ?\d+', b'"group": [1]'),
        ("completions.jsonl", rb'"kind": ?"(train|eval)"', b'"kind": {}'),
        ("completions.jsonl", rb'"response": ?', b'"end": ["done"], "response": '),
        ("completions.jsonl", rb'"reward": ?', b'"more": DEEP, "reward": '),
        ("metrics.jsonl", rb'"kind": ?"event"', b'"kind": "event", "event": [1], "more": 1'),
        ("metrics.jsonl", rb'"kind": ?', b'"more": DEEP, "kind": '),
        ("environment.json", rb'"python": ?', b'"more": DEEP, "python": '),
        ("config.toml", rb"\[run\]", b"more = DEEP\n[run]"),
    ],
)
def test_a_page_is_written_of_edited_files(name, old, new, run, tmp_path):
    """Values of other types where names are looked up, and values that nest deeper than a parser goes."""
    edited = tmp_path / "edited"
    shutil.copytree(run, edited)
    content, found = re.subn(old, new.replace(b"DEEP", b"[" * 10_000 + b"]" * 10_000), (edited / name).read_bytes())
    assert found
    (edited / name).write_bytes(content)
    Strict(write_report(edited).read_text(encoding="utf-8"))
    write_comparison([edited, run], tmp_path / "both.html")


def test_a_run_that_stopped_says_so(tmp_path):
    write_run(tmp_path / "r", steps=60, stop=25)
    assert "It is at step 25 of 60" in " ".join(read_out(read_run(tmp_path / "r")).sentences)


def test_examples_are_those_of_the_run_in_the_datas_order(run):
    data = read_run(run)
    assert sorted(data.held_out) == [0, 160] and len(data.held_out[0]) == 32
    text = page(data)
    body = text.split("before and after")[1].split("<tbody>")[1].split("</tbody>")[0]
    prompts = re.findall(r"What is \d \+ \d\?", body)
    assert prompts == [r["prompt"] for r in data.held_out[0][:12]]


def test_every_chart_has_a_title_a_unit_and_a_reading(run):
    charts = [c for _, group in sections(read_run(run)) for c in group]
    assert len(charts) >= 13 and all(c.title and c.reading for c in charts)
    drawn = {s.name for c in charts for s in c.drawn}
    assert {"training", "held-out", "implicit variance", "regret", "kl", "all wrong"} <= drawn
    regret = next(c for c in charts if c.title == "Regret")  # the second order would dwarf it
    assert [list(line.series.values) for line in regret.drawn] == [list(read_run(run).series("regret/series").values)]


def test_a_report_of_episodes_shows_how_they_ended(run, tmp_path):
    data = read_run(write_episodes(tmp_path / "played", run))
    charts = {title: {c.title: [s.name for s in c.drawn] for c in group} for title, group in sections(data)}
    ends = ["ended", "cut at the turn limit", "cut at the token limit", "environment failed"]
    assert charts["Episodes"] == {
        "How episodes end": ends,
        "Held-out episodes that did not end": ends[1:],
        "Turns": ["mean", "most"],
        "Tool calls": ["calls"],
        "Failures and loops": ["failed tool calls", "repeated"],
        "Time waited": ["waited"],
        "Tokens": ["own", "with the environment's"],
    }
    assert "Cut at the token limit" not in charts["Responses"]
    text = page(data)
    shown = "".join(Strict(text).text)
    assert "cut at the turn limit after 3 turns" in shown and "environment failed after 1 turn" in shown
    last = {row[5] for group in rows_of(text)[-1]["groups"] for row in group["rows"]}
    assert {"ended after 2 turns", "cut at the token limit after 4 turns"} <= last
    assert '<option value="turns">cut at the turn limit</option>' in text and 'value="cut"' not in text
    plain = {title: [c.title for c in group] for title, group in sections(read_run(run))}
    assert "Episodes" not in plain and "Cut at the token limit" in plain["Responses"]
    assert '<option value="cut">cut at the token limit</option>' in page(read_run(run))


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A run that falls apart near its end."""
    folder = tmp_path_factory.mktemp("runs") / "broken"
    write_run(folder, steps=160, prompts=4, seed=1)
    return folder


def shown(text):
    return "".join(Strict(text).text)


def test_alerts_are_listed_with_dates_levels_and_advice(broken, tmp_path):
    data = read_run(broken)
    found = episodes(data)
    assert verdict(found) == "BAD" and {e.key for e in found} >= {"reward", "dead_groups"}
    (alerts,) = re.findall('<section class="card verdict">.*?</section>', page(data), re.DOTALL)
    for episode in found:
        assert episode.first <= episode.last
        assert f"{datetime.fromtimestamp(episode.begun, UTC):%d %b %Y, %H:%M} UTC" in alerts
        assert f"step{'s' * (episode.last > episode.first)} {episode.first}" in shown(alerts)
        assert episode.seen in shown(alerts) and episode.advice in shown(alerts)
        assert episode.begun == next(r["time"] for r in data.train if r["step"] == episode.first)
    still = sum(e.open for e in found)
    assert still and f"{len(found)} alerts in 160 steps, {still} of them at the last step" in shown(alerts)
    calm = run_of(reward__mean=[0.5] * 30)
    calm.folder = tmp_path
    assert '<b class="level OK">OK</b> no alert in 30 steps' in page(calm)


def test_the_result_and_its_chart_stand_above_the_alerts(broken):
    text = page(read_run(broken))
    places = [
        text.index(x) for x in ("Held-out reward", "<h2>Is it getting better?", 'class="card verdict"', "<h2>What")
    ]
    assert places == sorted(places)


def test_troubles_are_listed_once(broken):
    text = shown(page(read_run(broken)))
    for episode in episodes(read_run(broken)):
        assert text.count(episode.seen) == 1
    assert 'class="warnings"' not in page(read_run(broken))


def test_prompts_of_training_are_in_the_page_once(run):
    text = page(read_run(run))
    (noscript,) = re.findall("<noscript>(.*?)</noscript>", text)
    assert "completions.jsonl" in text and "What is" not in noscript


def test_an_episode_ends_after_a_gap_and_keeps_its_worst():
    def alert(level, seen):
        return {"key": "kl", "level": level, "seen": seen, "advice": "a"}

    alerts = [[]] * 2 + [[alert("WATCH", "one")], [], [alert("BAD", "two")], [alert("WATCH", "three")]] + [[]] * 8
    alerts += [[alert("WATCH", "later")], [{"key": "kl"}, 3]]
    found = episodes(run_of(verdict=["OK"] * 16, alerts=alerts))
    assert [(e.level, e.first, e.last, e.seen, e.open) for e in found] == [
        ("BAD", 3, 6, "two", False), ("WATCH", 15, 15, "later", False),
    ]  # fmt: skip
    assert verdict(found) == "OK"


def test_seeds_versions_and_resumes_are_reported(run):
    text = "".join(Strict(page(read_run(run))).text)
    assert "Resumed after step" in text and "gvpo 0.1.0, Python 3.11" in text
    data = read_run(run)
    data.config["run"]["seed"] = 7
    assert "Seed7; each sample" in "".join(Strict(page(data)).text)


def rows_of(text):
    return json.loads(html.unescape(re.search("data-rows='([^']*)'", text)[1]))


def test_the_browser_has_the_responses_of_the_run(run, broken, hostile):
    steps = rows_of(page(read_run(run)))
    assert len(steps) >= 60 and steps[0]["step"] == 1 and steps[-1]["step"] == 160
    written = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    for step in steps[:: len(steps) - 1]:
        mine = [r for r in written if r["kind"] == "train" and r["step"] == step["step"]]
        assert step["of"] == len(step["groups"]) == 8
        for group in step["groups"]:
            own = [r for r in mine if str(r["group"]) == group["group"]]
            assert group["prompt"] == own[0]["prompt"] and group["of"] == len(own)
            shown = [(r, n, end == "", t) for r, n, end, t, *_ in group["rows"]]
            assert sorted(map(str, shown)) == sorted(
                str((r["reward"], r["tokens"], r["finished"], r["response"])) for r in own
            )
            rewards = [r for r, *_ in shown if r is not None]
            assert rewards == sorted(rewards, reverse=True)
    browsed = {step["step"] for step in rows_of(page(read_run(broken)))}
    assert {e.first for e in episodes(read_run(broken))} <= browsed  # where something happened
    assert r"\x1b[31m" in rows_of(page(read_run(hostile)))[0]["groups"][0]["rows"][0][3]


@pytest.mark.slow
def test_ten_thousand_steps_make_a_small_page(run, tmp_path):
    folder = write_long_run(tmp_path / "long", run)
    text = page(read_run(folder))
    assert len(text) < 3_500_000
    assert len(rows_of(text)) >= 60
    series = re.findall(r'data-series="([^"]*)"', text)
    assert len(series) >= 12 and all(json.loads(html.unescape(points)) for points in series)
    for points in series:
        assert all(len(s["x"]) <= LIMIT for s in json.loads(html.unescape(points)))
