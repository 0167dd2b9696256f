"""Any text within the width of a terminal: emoji, marks, directions, escapes, and encodings without them."""

import io
import re
import unicodedata

import pytest

from gvpo_core.training.terminal.output import encodable
from gvpo_core.training.terminal.text import columns, pieces
from gvpo_core.training.watch.console import Console

pytestmark = pytest.mark.core

RECORD = {"step": 12, "reward/mean": 0.40625, "verdict": "OK"}
CELLS = {
    "❤️": 2,  # drawn as an emoji by the selector behind it
    "1️⃣": 2,
    "🇩🇪": 2,
    "🏳️": 2,
    "👍🏽": 4,  # two where the skin tone is drawn on the hand
    "שלום": 4,
    "مرحبا": 5,
    "हि": 2,
    "a" + "\u0301" * 4: 1,
}
"""Text and the columns that it takes at most, on terminals that join characters and on those that do not."""
RESPONSES = {
    "emoji": "❤️" * 200,
    "keycaps": "1️⃣" * 200,
    "flags": "🇩🇪" * 200,
    "families": "👩‍👩‍👧‍👦" * 100,
    "right to left": "שלום مرحبا " * 60,
    "overrides": "a\u202eb\u2066c\u200f" * 90,
    "invisible": "a\u200b\u2060\ufeff\u180e\u3164" * 90,
    "marks": "a" + "\u0301" * 5000,
    "commands": "\x1b]52;c;aGk=\x07\x9b31m\x1bP0;1|\x1b\\\x1b[2J" * 40,
}


@pytest.mark.parametrize("text", CELLS)
def test_characters_that_terminals_join_or_draw_wide_are_counted(text):
    assert columns(text) == CELLS[text]
    assert max(map(columns, pieces(text * 40, 9))) <= 9 and "".join(pieces(text * 40, 9)) == text * 40


def taken(line: str) -> int:
    """Columns at most, counted apart from the code: each selector, mark beyond four and escape takes one."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" and not "\U0001f1e6" <= c <= "\U0001f1ff" for c in line)
    marks = sum(map(len, re.findall("(?:(?<=[^\u0301])\u0301{4})|\ufe0e|\u20e3", line)))
    return len(line) + wide - marks


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "gbk"])
@pytest.mark.parametrize("kind", RESPONSES)
def test_any_text_stays_within_the_terminal_and_commands_nothing(kind, encoding):
    text, raw = RESPONSES[kind], io.BytesIO()
    out = io.TextIOWrapper(raw, encoding=encoding, errors="strict", write_through=True)
    console = Console(10, stream=out)
    facts = {"group": 0, "prompt": text, "response": text, "tokens": 3, "finished": True}
    console.sample([facts | {"reward": reward, "rewards": {"r": reward}} for reward in (0.0, 1.0)])
    record = RECORD | {"reward/" + text[:4]: 0.5, "reward/b": 0.5}
    console.step(record)
    console.evaluation({"step": 10, "eval/reward": 0.5, "eval/reward/" + text[:4]: 0.5, "eval/reward/b": 0.5})
    lines = raw.getvalue().decode(encoding).splitlines()
    assert any("left state" in line for line in lines) and sum(line.startswith("  | ") for line in lines) >= 12
    assert max(map(taken, lines)) <= 80
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]", "\n".join(lines))


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_columns_of_rewards_stay_in_line_whatever_their_names(encoding):
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding=encoding, errors="strict", write_through=True)
    record = RECORD | {"reward/❤️🇩🇪❤️": 0.125, "reward/é": 0.5}
    Console(10, stream=out, width=200).step(record)
    lines = raw.getvalue().decode(encoding).splitlines()
    place = next(i for i, line in enumerate(lines) if "left state" in line)
    title, values = lines[place], lines[place + 1]
    cut = values.index("0.125") + len("0.125")
    first = encodable("❤️🇩🇪❤️", out)
    assert first in title and columns(title[: title.index(first)] + first) == cut
