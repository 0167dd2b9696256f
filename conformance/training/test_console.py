"""The console: what it prints is metrics.jsonl rounded, within 80 columns, inert, and parsable when piped."""

import io
import itertools
import math
import random
import re
import subprocess
import sys

import pytest
from console_rows import check_row

from gvpo_core.training.terminal.text import columns, pieces
from gvpo_core.training.watch import time_left
from gvpo_core.training.watch.columns import COLUMNS, columns_for, legend, row, titles
from gvpo_core.training.watch.console import Console

pytestmark = pytest.mark.core

RECORD = {
    "kind": "train",
    "step": 12,
    "time": 0.0,
    "reward/mean": 0.40625,
    "reward/half_width": 0.21875,
    "reward/trend": -0.0625,
    "reward/spread": 0.353,
    "groups/counted": 8,
    "groups/all_equal": 3,
    "groups/all_best": 2,
    "groups/all_worst": 1,
    "truncated": 0.0625,
    "length/mean": 9.875,
    "kl": -0.0123,
    "entropy": 0.812,
    "gradient_norm": 12.75,
    "regret/second_order": 0.0417,
    "seconds/step": 8.25,
    "tokens_per_second": 1234.5,
    "verdict": "OK",
}
ALERT = {"key": "kl", "level": "WATCH", "seen": "KL 9 nats a response, usually 1", "advice": "lower the learning rate"}


def test_a_row_is_the_record_rounded():
    fields = dict(zip(titles().split(), row(RECORD, "9m40s").split(), strict=True))
    assert fields["left"] == "9m40s" and fields["trend"] == "-.062" and fields["dead%"] == "25/12"
    check_row(list(fields.values()), RECORD)
    check_row(row(RECORD | {"groups/all_best": 0}).split(), RECORD | {"groups/all_best": 0})
    check_row(row(RECORD | {"machine/verdict": "WATCH"}).split(), RECORD | {"machine/verdict": "WATCH"})
    assert row(RECORD | {"groups/all_best": 0}).split()[4] == "38"  # alike, but neither best nor worst


@pytest.mark.parametrize("wrong", ["0", "~0", "-~0", "-", "7", "0/0"])
def test_a_wrong_field_of_a_row_is_seen(wrong):
    cells = row(RECORD).split()
    for i in range(len(cells)):
        if i != len(COLUMNS) and cells[i] != wrong:  # the time left is no number of the record
            with pytest.raises((AssertionError, ValueError)):
                check_row([*cells[:i], wrong, *cells[i + 1 :]], RECORD)


def test_no_field_is_0_or_100_percent_unless_it_is():
    random.seed(1)
    values = [0.009, 0.004, 1e-9, -0.0004, 0.995, 0.9999] + [10 ** random.uniform(-6, 0) for _ in range(200)]
    for value in values:
        record = {k: value for k in RECORD if k not in ("kind", "step", "time", "verdict")}
        record |= {"step": 3, "groups/counted": 1000, "groups/all_best": 1, "groups/all_worst": 999}
        record |= {"groups/all_equal": 1000, "truncated": abs(value), "verdict": "OK"}
        check_row(row(record).split(), record)
        between = record | {"groups/all_worst": 0, "groups/all_equal": 2}
        check_row(row(between).split(), between)
        assert "~0/99" in row(record)


def test_every_row_is_within_80_columns_and_splits_into_its_fields():
    random.seed(0)
    values = [0.0, 1.0, -1.0, math.nan, math.inf, None, 1e-9, -1e-9, 1e9, -1e9, 123456, 99999.5, 0.99999]
    values += [10 ** random.uniform(-8, 8) * random.choice((-1, 1)) for _ in range(200)]
    for value in values:
        record = {"step": 99999} | {k: value for k in RECORD if k not in ("kind", "step", "time")}
        record |= {"groups/counted": 8, "groups/all_equal": 8, "groups/all_best": 8, "groups/all_worst": 0}
        record |= {"truncated": 1.0, "verdict": "WATCH"}
        line = row(record, "2d04h")
        assert len(line) <= 80, (value, line)
        assert len(line.split()) == len(COLUMNS) + 2, line
    assert len(titles()) <= 80


def test_titles_return_every_20_rows():
    out = io.StringIO()
    console = Console(45, stream=out)
    for step in range(1, 46):
        console.step(RECORD | {"step": step})
    lines = out.getvalue().splitlines()
    begin = lines.index(titles())
    assert [i - begin for i, line in enumerate(lines) if line == titles()] == [0, 21, 42]
    assert len(lines) - begin == 45 + 3


def test_the_seconds_by_phase_stand_below_every_tenth_row():
    out = io.StringIO()
    console = Console(45, stream=out)
    phases = {"seconds/generate": 4.5, "seconds/reward": 0.25, "seconds/score": 1.0, "seconds/update": 2.0}
    for step in range(1, 22):
        console.step(RECORD | phases | {"step": step, "memory/peak": 3 * 2**30})
    lines = out.getvalue().splitlines()
    said = [(i, line) for i, line in enumerate(lines) if line.startswith("    seconds: ")]
    assert [lines[i - 1].split()[0] for i, _ in said] == ["1", "11", "21"]
    assert said[0][1].strip() == "seconds: generate 4.50, reward .250, score 1.00, update 2.00, memory 3.00"
    assert lines[said[0][0] + 1] == "      GiB" and max(map(len, lines)) <= 80


def test_an_alert_is_printed_again_only_if_worse_or_old():
    out = io.StringIO()
    console = Console(200, stream=out)
    bad = ALERT | {"level": "BAD", "advice": "stop \x1b[31m" + "and look " * 12}
    for step in range(1, 101):
        alerts = [ALERT] if 10 <= step < 30 else [bad] if step >= 30 else []
        level = alerts[0]["level"] if alerts else "OK"
        console.step(RECORD | {"step": step, "verdict": level, "alerts": alerts})
    lines = out.getvalue().splitlines()
    at = {line: lines[i - 1].split()[0] for i, line in enumerate(lines) if "!" in line}
    said = [(lines[i - 1].split()[0], line[6:].split()[0]) for i, line in enumerate(lines) if line.startswith("    !")]
    assert said == [("10", "WATCH"), ("30", "BAD"), ("80", "BAD")]
    assert "    ! WATCH KL 9 nats a response, usually 1: lower the learning rate" in at
    assert max(map(len, lines)) <= 80 and "\x1b" not in out.getvalue() and "\\x1b[31m" in out.getvalue()
    machine = io.StringIO()
    Console(9, stream=machine).step(RECORD | {"machine/verdict": "WATCH", "machine/alerts": [ALERT]})
    assert "! WATCH KL 9" in machine.getvalue() and machine.getvalue().splitlines()[-2].endswith(" WATCH")


def test_facts_are_text_that_a_person_reads():
    out = io.StringIO()
    facts = {"versions": {"torch": "2.13.0", "transformers": "5.23.0"}, "trainable_parameters": 134515008}
    facts |= {
        "estimated memory": int(5.25 * 2**30),
        "compiled": True,
        "devices": ["cpu", "cuda:0"],
        "layout": "x " * 60,
    }
    Console(9, stream=out).header(facts)
    lines = out.getvalue().splitlines()
    assert lines[:5] == [
        "versions              torch 2.13.0, transformers 5.23.0",
        "trainable parameters  134,515,008",
        "estimated memory      5.25 GiB",
        "compiled              yes",
        "devices               cpu, cuda:0",
    ]
    assert max(map(len, lines)) <= 80 and lines[6].startswith(" " * 22 + "x x")


def test_time_left_is_that_of_the_last_steps_and_evaluations(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time_left.time, "monotonic", lambda: clock[0])
    out = io.StringIO()
    console = Console(20, stream=out, evaluations=[0, 15, 20])

    def after(seconds: float, step: int) -> str:
        clock[0] += seconds
        console.step(RECORD | {"step": step})
        return out.getvalue().splitlines()[-1].split()[-2]

    clock[0] += 30.0
    console.evaluation({"step": 0, "seconds/evaluate": 30.0})
    assert after(40.0, 11) == "7m00s"  # nine steps as this one, two evaluations: a resumed run counts from where it is
    assert after(10.0, 12) == "2m20s"  # the first step compiled
    assert after(10.0, 15) == "1m50s"  # the evaluation of this step is still to come
    clock[0] += 20.0
    console.evaluation({"step": 15, "seconds/evaluate": 20.0})
    assert after(13.0, 16) == "1m04s"  # (10 + 10 + 13) / 3 a step


def test_an_evaluation_shows_the_records_numbers_within_80_columns():
    out = io.StringIO()
    record = {"step": 10, "eval/reward": 0.8125, "eval/half_width": 0.14, "eval/length": 5.5, "eval/truncated": 0.25}
    record |= {"eval/prompts": 32, "seconds/evaluate": 3.5} | {f"eval/reward/part{i}": 0.5 for i in range(9)}
    Console(10, stream=out).evaluation(record)
    text = out.getvalue()
    assert "reward 0.812 " in text and "+- 0.140 " in text and "cut 25%" in text and "prompts 32" in text
    assert text.count("0.500") == 9 and max(map(len, text.splitlines())) <= 80


def test_a_single_reward_is_not_said_twice_for_a_rounding():
    record = {"step": 1, "eval/reward": 0.4541666666666666, "eval/reward/environment": 0.4541666666666667}
    out = io.StringIO()
    Console(10, stream=out).evaluation(record)
    Console(10, stream=out).evaluation(record | {"eval/reward/environment": 0.46})
    first, second = out.getvalue().splitlines()
    assert "environment" not in first and "environment 0.460" in second


def test_episodes_say_at_which_limit_they_were_cut():
    record = RECORD | {"episodes/turns": 0.25, "episodes/tokens": 0.004, "truncated": 0.254}
    assert columns_for(80, RECORD) == COLUMNS
    for width in (80, 120):
        chosen = columns_for(width, record)
        assert dict(zip(titles(chosen).split(), row(record, "9m40s", chosen).split(), strict=True))["cut%"] == "25/~0"
        assert len(titles(chosen)) <= width and "cut%: episodes cut at the turn limit/at the token" in legend(chosen)
    out = io.StringIO()
    ends = {"eval/truncated": 0.3, "eval/episodes/turns": 0.125, "eval/episodes/tokens": 0.0}
    console = Console(10, stream=out)
    console.evaluation({"step": 10, "eval/reward": 0.8125} | ends)
    assert "cut at turn limit 12%  cut at token limit 0%" in " ".join(out.getvalue().split("\n          "))
    played = [r | {"end": end, "turns": 3} for r, end in zip(group(0.0, 1.0), ("turns", "done"), strict=True)]
    console.sample(played)
    assert "best: reward 1.00 (r=1.00), 3 tokens, ended after 3 turns" in out.getvalue()
    assert "worst: reward 0 (r=0), 3 tokens, cut at the turn limit after 3 turns" in out.getvalue()


def group(*rewards, response="4"):
    return [
        {"group": 0, "prompt": "2+2?", "response": f"{response}#{i}", "tokens": 3, "finished": i > 0}
        | {"reward": r, "rewards": {"r": r}}
        for i, r in enumerate(rewards)
    ]  # fmt: skip


def test_a_sample_is_the_best_and_the_worst_of_its_group():
    out = io.StringIO()
    dead = [r | {"group": 1, "prompt": "1+1?"} for r in group(1.0, 1.0)]
    Console(10, stream=out).sample(dead + group(0.0, None, 1.0, math.nan))
    lines = [line.strip() for line in out.getvalue().splitlines() if line.strip()]
    assert lines == [
        "prompt", "| 2+2?", "its 4 responses: rewards 1.00 0 - -",
        "best: reward 1.00 (r=1.00), 3 tokens", "| 4#2",
        "worst: reward 0 (r=0), 3 tokens, cut", "| 4#0",
    ]  # fmt: skip
    out = io.StringIO()
    Console(10, stream=out).sample(group(None, None))
    assert out.getvalue() == ""


def test_a_sample_without_rewards_shows_none():
    """As in distillation, where each response counts 0."""
    out = io.StringIO()
    Console(10, stream=out).sample([r | {"rewards": {}} for r in group(0.0, 0.0)])
    lines = [line.strip() for line in out.getvalue().splitlines() if line.strip()]
    assert lines == [
        "prompt", "| 2+2?", "its 2 responses", "first: 3 tokens, cut", "| 4#0", "last: 3 tokens", "| 4#1",
    ]  # fmt: skip


def test_model_text_cannot_drive_the_terminal():
    hostile = "a\x1b[2J\x1b]0;title\x07b\rc\x9b31md\u202ee\u200b\ud800\tf\nsecond line" + "x" * 300
    out = io.StringIO()
    console = Console(10, stream=out)
    console.header({"model": hostile})
    console.sample(group(0.0, 1.0, response=hostile))
    console.event(hostile)
    console.close({"folder": hostile})
    text = out.getvalue()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u200b\ud800]", text)
    assert r"\x1b[2J" in text and r"\x9b31m" in text and r"\u202e" in text and r"\ud800" in text
    assert "  | second line" in text
    assert all(len(line) <= 80 for line in text.splitlines() if line.startswith("  |"))


def test_piped_output_is_plain_and_survives_a_closed_reader():
    code = "from gvpo_core.training.watch.console import Console\nc = Console(3)\nc.header({'model': 'π'})\n"
    code += f"r = {RECORD!r}\nc.phase('generate')\n"
    code += "[c.step(r | {'step': i}) for i in (1, 2, 3)]\nc.close({'report': 'x'})"
    environment = {"PYTHONIOENCODING": "ascii", "PYTHONPATH": ":".join(sys.path), "FORCE_COLOR": "1"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=environment)
    assert b"\x1b" not in out.stdout and rb"\u03c0" in out.stdout
    rows = [line.split() for line in out.stdout.decode().splitlines()]
    assert [r[0] for r in rows if len(r) == len(COLUMNS) + 2 and r[-1] in ("state", "OK")] == ["step", "1", "2", "3"]
    closed = io.StringIO()
    console = Console(3, stream=closed)
    closed.close()
    console.step(RECORD)


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def test_a_terminal_has_a_live_bar_and_the_same_rows(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    out = Terminal()
    console = Console(20, stream=out)
    console.phase("generate [bold]")
    console.step(RECORD | {"seconds/update": 2.0})
    console.step(RECORD | {"verdict": "WATCH", "alerts": [ALERT]})
    console.event("[red]not markup[/red]")
    console.close({"report": "r.html"})
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "12/20" in text and "generate [bold]" in text
    assert "\x1b[" in out.getvalue()
    assert row(RECORD).rsplit(maxsplit=2)[0].strip() in text
    assert "\x1b[1;33mWATCH" in out.getvalue() and "\x1b[2m" in out.getvalue()  # coloured verdict, dim phases
    assert "[red]not markup[/red]" in text


def test_without_rich_a_terminal_gets_plain_lines(monkeypatch):
    for name in [m for m in sys.modules if m == "rich" or m.startswith("rich.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    out = Terminal()
    console = Console(20, stream=out)
    console.step(RECORD)
    console.close()
    lines = out.getvalue().splitlines()
    assert "\x1b" not in out.getvalue() and len(lines) - lines.index(titles()) == 2


def test_at_120_columns_a_row_has_every_field_and_the_rewards_by_name():
    record = RECORD | {"reward/right": 0.25, "reward/format": 0.5, "regret/series": 0.58, "regret/second_order": 1.87}
    out = io.StringIO()
    console = Console(20, stream=out, width=120)
    console.header({"model": "m"})
    console.step(record)
    lines = out.getvalue().splitlines()
    head, cells = next((a.split(), b.split()) for a, b in itertools.pairwise(lines) if a.lstrip().startswith("step"))
    shown = dict(zip(head, cells, strict=True))
    assert {"entropy", "gradient", "length", "+-"} <= set(head)
    assert (shown["right"], shown["format"], shown["regret"]) == ("0.250", "0.500", "0.580")
    assert max(map(len, lines)) <= 120
    narrow = row(record)
    assert "0.58" not in narrow and "1.87" not in narrow and len(narrow) <= 80


@pytest.mark.parametrize("width", [80, 120, 160])
def test_the_legend_explains_the_columns_that_are_shown_and_no_other(width):
    everything = RECORD | {"sampler/gap": 0.1, "reward/right": 0.25, "reward/format": 0.5}
    for record in (RECORD, RECORD | {"reward/right": 0.25}, everything):
        out = io.StringIO()
        Console(20, stream=out, width=width).step(record)
        lines = out.getvalue().splitlines()
        above = lines[: next(i for i, line in enumerate(lines) if line.lstrip().startswith("step "))]
        shown = columns_for(width, record)
        assert " ".join(line for line in above if line) == legend(shown) and max(map(len, lines)) <= width
        explained = re.findall(r"(?:^|\. )([^:]+):", legend(shown))
        titles_of = [name for names in explained for name in names.split(", ")]
        assert sorted(titles_of) == sorted({c.title for c in shown} - {"step"} | {"left", "~0"})


def test_an_event_is_cut_at_words_and_its_command_is_not():
    out = io.StringIO()
    console = Console(20, stream=out)
    console.event("went back from step 9 to step 2: " + "all later records " * 6, "gvpo train " + "--a.b c " * 20)
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("* went back") and re.match("  (all|later|records)", lines[1])
    assert max(map(len, lines[:-1])) <= 80
    assert lines[-1].startswith("  resume with: gvpo train --a.b c") and len(lines[-1]) > 160


def test_wide_characters_are_cut_by_the_columns_they_take():
    assert (columns("日本語"), columns("e\u0301"), columns("ab")) == (6, 1, 2)
    assert columns("\u1112\u1161\u11ab\u1100\u116e\u11a8") == columns("한국") == 4, "as macOS decomposes file names"
    assert pieces("日本語ab", 4) == ["日本", "語ab"] and pieces("", 4) == [""]
    out = io.StringIO()
    Console(10, stream=out).sample(group(0.0, 1.0, response="汉" * 200))
    quoted = [line for line in out.getvalue().splitlines() if line.startswith("  | 汉")]
    assert quoted and max(map(columns, quoted)) <= 80 and columns(quoted[0]) == 80
