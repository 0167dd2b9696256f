"""Runs without a usable standard output: none at all, replaced by few methods, closed, or its descriptor closed."""

import io
import json
import subprocess
import sys

import pytest
import table_run

from gvpo_core.training.watch.console import Console

pytestmark = pytest.mark.core


class Bare:
    """As a tracker's or a cluster's redirection: write and flush alone."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text
        return len(text)

    def flush(self):
        pass


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("make", [lambda: None, Bare, closed, object], ids=["none", "bare", "closed", "object"])
def test_a_console_prints_to_any_standard_output(make, monkeypatch):
    stream = make()
    monkeypatch.setattr(sys, "stdout", stream)
    console = Console(2)
    console.header({"model": "Ünïcödé 你好"})
    console.event("said")
    console.close({})
    if isinstance(stream, Bare):
        assert "Ünïcödé 你好" in stream.text and "said" in stream.text


@pytest.mark.parametrize("closing", ["<&-", "<&- >&- 2>&-"])
def test_a_run_with_closed_standard_descriptors_scores_and_trains(closing, tmp_path):
    (tmp_path / "reward.py").write_text(
        "def right(completions, answer, **_):\n    return [float(len(c)) for c in completions]\n"
    )
    config = table_run.make(tmp_path, steps=2, reward=f'function = "{tmp_path}/reward.py:right"\nworkers = 1')
    run = f'"{sys.executable}" -m gvpo_core.training.cli train "{config}" {closing}'
    done = subprocess.run(["bash", "-c", run], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().split("\n") if line]
    assert [r["reward/mean"] for r in records if r["kind"] == "train"] == [1.0, 1.0]
