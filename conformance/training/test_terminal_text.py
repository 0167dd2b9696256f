"""Numbers, intervals, durations and lines as people read them on a terminal."""

import math

import pytest

from gvpo_core.training.terminal.text import duration, fit, interval, printable, wrapped

pytestmark = pytest.mark.core


@pytest.mark.parametrize(
    ("value", "width", "text"),
    [(0.40625, 6, "0.406"), (0.40625, 4, ".406"), (-0.40625, 4, "-.41"), (12345, 4, "12k"), (1234.5, 3, "1k"),
     (1.25e6, 4, "1.2M"),
     (0.05, 3, ".05"), (0.0012, 4, ".001"), (1e100, 4, "****"), (-0.00123, 6, "-.0012"),
     (1234.5, 5, "1234"), (0.0, 5, "0"),
     (12, 5, "12"), (None, 4, "-"), (math.nan, 4, "-"), (-math.inf, 4, "-"), (1.2e-7, 6, "1.2e-7"),
     (4.56e12, 6, "4.6e12"), (-1e-9, 4, "-~0"),
     (0.009, 3, ".01"), (-0.009, 4, "-.01"), (0.004, 3, "~0"), (0.1, 1, "~0"), (-0.1, 2, "~0"),
     (99.96, 4, "100"), (8.25, 4, "8.25"), (1e-9, 4, "1e-9"),
     (0.0896, 6, "0.090"), (0.09998, 6, "0.100")],
)  # fmt: skip
def test_fit(value, width, text):
    assert fit(value, width) == text


@pytest.mark.parametrize(
    ("value", "half", "text"),
    [(0.00278, 0.00253, "0.00278 +- 0.00253"), (0.00357, 0.072, "0.004 +- 0.072"), (0.342, 0.0622, "0.342 +- 0.062"),
     (2.584, 0.82, "2.58 +- 0.82"), (0.0, 0.0, "0 +- 0"), (-12.34, 0.5, "-12.3 +- 0.5"), (0.5, None, "0.500"),
     (0.5, math.nan, "0.500"), (1e9, 1e-9, "1000000k +- 1.00e-9")],
)  # fmt: skip
def test_interval(value, half, text):
    assert interval(value, half) == text


def test_wrapped_cuts_at_spaces_and_keeps_longer_words():
    assert wrapped("ab  cd ef", 6, " ") == ["ab  cd", " ef"] and wrapped("", 9) == [""]
    assert wrapped("  a /long/path b", 6, "  ") == ["  a", "  /long/path", "  b"]
    assert wrapped("日本 語", 6) == ["日本", "語"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.6, "1m00s"), (580, "9m40s"), (11100, "3h05m"), (36000, "10h"), (187200, "2d04h"), (9e6, "104d")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text and len(text) <= 5


def test_printable_leaves_ordinary_text_alone():
    text = "x² + 1 = π; 日本語, العربية, 👍"
    assert printable(text) == text
    assert printable("\u3164a\u115f\u180b\uffa0\U0001d173") == r"\u3164a\u115f\u180b\uffa0\u1d173", "they show nothing"
    assert printable("a\nb", keep="\n") == "a\nb" and printable("a\nb") == r"a\nb"
