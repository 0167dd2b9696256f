"""Checks that a row of the console is its record, rounded."""

import math

from gvpo_core.training.watch.alerts import LEVELS
from gvpo_core.training.watch.columns import COLUMNS


def check_number(text, want, name=""):
    """The text is the number, rounded: 0 only for nothing at all, "~0" for less than a narrow field can show."""
    if text.endswith("~0"):
        assert 0 < abs(want) < 0.005 and text[:-2] in (("-",) if want < 0 else ("", "+")), (name, text, want)
        return
    scale = {"k": 1e3, "M": 1e6}.get(text[-1], 1.0)
    digits, _, power = text.rstrip("kM").partition("e")
    unit = scale * 10.0 ** int(power or 0)
    value, error = float(digits) * unit, 0.5 * unit * 10.0 ** -len(digits.partition(".")[2])
    assert abs(value - want) <= (error * (1 + 1e-9) if value else 0), (name, text, want)


def check_percent(text, want, name=""):
    """The text is the percentage, rounded; 0 and 100 only where it is just that."""
    if text in ("~0", "0", "100"):
        assert 0 < want < 0.5 if text == "~0" else want == int(text), (name, text, want)
    else:
        assert abs(int(text) - want) <= 0.5 or (text == "99" and 99.5 < want < 100), (name, text, want)


def check_row(cells, record, columns=COLUMNS):
    """Every field but the time left is a number of the record, rounded."""
    assert len(cells) == len(columns) + 2
    for column, text in zip(columns, cells, strict=False):
        values = [record.get(key) for key in column.meaning.split(" ")]
        if column.title == "dead%":
            best, worst = (record[f"groups/all_{x}"] for x in ("best", "worst"))
            dead, counted = record["groups/all_equal"], record["groups/counted"]
            values = [best, worst] if best + worst == dead else [dead]
            for x, v in zip(text.split("/"), values, strict=True):
                check_percent(x, 100 * v / counted, column.title)
        elif text == "-":
            assert values[0] is None or not math.isfinite(values[0]), (column.title, record["step"])
        elif column.title == "cut%":
            check_percent(text, 100 * values[0], column.title)
        else:
            check_number(text, values[0], column.title)
    verdicts = [record[key] for key in ("verdict", "machine/verdict") if key in record]
    assert cells[-1] == max(verdicts, key=LEVELS.index, default="-")
