"""The columns of a prompt stand in completions.jsonl once a group: short, JSON-safe, without secrets."""

import html
import json
import re
from dataclasses import replace
from datetime import date
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from made_up_run import run_of
from table_problem import PROMPTS, REFERENCE, settings, table

from gvpo_core.training.loop import train
from gvpo_core.training.policy.table import TablePolicy
from gvpo_core.training.report.page import page
from gvpo_core.training.run.data_columns import TEXT, TOTAL, shown, with_columns

pytestmark = pytest.mark.core
SECRET = "hunter2-hunter2-hunter2"


class Picture:
    """As PIL's: its repr would be long, and nothing may ask for it."""

    mode, size = "RGB", (640, 480)

    def __repr__(self):
        raise AssertionError("asked for its repr")


class Opaque(Picture):
    size = None


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (32, 32), (True, True), (None, None), ("32", "32"), (0.5, 0.5), (float("nan"), "nan"),
        (np.float32(0.5), 0.5), (np.int64(7), 7), (np.array([1, 2]), "[1, 2]"), (10**5000, "integer of 16610 bits"),
        (np.zeros((224, 224, 3), np.uint8), "array of uint8, 224 x 224 x 3"), (Picture(), "image, 640 x 480"),
        ({"bytes": b"\x89PNG" * 100, "path": None}, "file of 400 bytes"), (b"12345", "5 bytes"), (Opaque(), "<Opaque>"),
        (date(2026, 9, 1), "2026-09-01"), (Decimal("1.50"), "1.50"), (["a", 1], '["a", 1]'),
        ({"role": "user", "content": "2 + 2"}, '{"role": "user", "content": "2 + 2"}'),
        ("x" * 1000, "x" * TEXT + " ... (600 more characters)"),
        ("x" * 10**6, "x" * TEXT + " ... (999,600 more characters)"),
        (list(range(1000)), json.dumps([*range(20), "... 980 more"])),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_a_value_is_short_and_json(value, wanted):
    assert shown(value, "answer", ()) == wanted
    json.dumps(shown(value, "answer", ()), allow_nan=False)


def test_nothing_is_long_however_the_value_nests():
    nested = {"k" * 500: [{"deep": [["x" * 5000] * 500] * 500}] * 500}
    for value in (nested, [nested] * 500, dict.fromkeys(range(500), nested)):
        assert len(shown(value, "rubric", ())) < TEXT + 60


@pytest.mark.parametrize("value", [SECRET, f"see {SECRET}", {"deep": [SECRET]}, "p" * (TEXT - 10) + SECRET, [SECRET]])
def test_a_secret_is_hidden_wherever_it_appears(value):
    said = json.dumps(shown(value, "note", {SECRET}))
    assert "hunter2" not in said and "***" in said


def test_a_column_named_like_a_secret_is_hidden_and_a_password_in_a_url():
    assert shown("12345678", "api_key", ()) == "***"
    assert shown({"password": "12345678"}, "login", ()) == '{"password": "***"}'
    assert "pass1234" not in shown("https://me:pass1234@example.com/x", "source", ())


def test_many_columns_are_bounded_and_those_of_the_rewards_come_first():
    columns = {f"c{i}": "x" * 300 for i in range(40)} | {"answer": "32"}
    (row,) = with_columns([{"group": 0, "row": 0}], [columns], (), {"answer"})
    assert (
        next(iter(row["columns"])) == "answer" and row["columns"]["..."] == f"{42 - len(row['columns'])} more columns"
    )
    assert len(json.dumps(row["columns"])) < 2 * TOTAL


def test_each_group_has_its_own_columns_once():
    rows = [{"group": g, "row": r} for g, r in ((0, 3), (0, 3), (1, 1), (1, 1))]
    shown_columns = [row.get("columns") for row in with_columns(rows, [{"answer": 3}, {"answer": 1}], ())]
    assert shown_columns == [{"answer": 3}, None, {"answer": 1}, None]


def run_with_columns(folder, monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", SECRET)
    rows = [{"prompt": p, "answer": i, "note": f"by {SECRET}", "image": Picture()} for i, p in enumerate(PROMPTS)]
    config = settings(folder)
    config = replace(config, run=replace(config.run, steps=2), rollout=replace(config.rollout, prompts=2))
    policy = TablePolicy(table(REFERENCE), config.optimizer, updates=config.updates)
    reward = lambda completions, answer: [float(len(c) + a) for c, a in zip(completions, answer, strict=True)]
    train(config, policy, train_rows=rows, evaluation_rows=rows, rewards={"value": reward})
    return (folder / "completions.jsonl").read_text(encoding="utf-8")


def test_a_run_writes_the_columns_that_its_rewards_saw(tmp_path, monkeypatch):
    text = run_with_columns(tmp_path / "run", monkeypatch)
    rows = [json.loads(line) for line in text.splitlines()]
    assert SECRET not in text and all(list(row)[:2] == ["kind", "step"] for row in rows)
    groups = {}
    for row in rows:
        groups.setdefault((row["kind"], row["step"], row["group"]), []).append(row)
    assert {kind for kind, *_ in groups} == {"train", "eval"}
    for group in groups.values():
        head, *others = group
        answer = PROMPTS.index(head["prompt"])
        assert head["columns"] == {"answer": answer, "note": "by ***", "image": "image, 640 x 480"}
        assert all("columns" not in row for row in others)


def test_cards_and_held_out_prompts_show_the_columns():
    run = run_of(reward__mean=[0.5], verdict=["OK"])
    row = {
        "group": 0,
        "prompt": "23 + 19 =",
        "response": "32",
        "reward": 0.0,
        "columns": {"answer": 42, "<b>": "</dl>"},
    }
    run.browsed, run.held_out = {1: [row]}, {0: [row], 1: [row]}
    run.evaluations = [{"step": s, "eval/reward": 0.0, "eval/half_width": 0.1, "eval/prompts": 1} for s in (0, 1)]
    run.folder = Path("run")
    text = page(run)
    assert '<dl class="columns"><div><dt>answer</dt><dd>42</dd></div>' in text and "<dt>&lt;b&gt;</dt>" in text
    (step,) = json.loads(html.unescape(re.search("data-rows='([^']*)'", text)[1]))
    assert step["groups"][0]["columns"] == [["answer", "42"], ["<b>", "</dl>"]]
