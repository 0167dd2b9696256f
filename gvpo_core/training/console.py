"""What a person sees while a run goes on: a header, one row a step within 80 columns, evaluations, samples, the end.

On a terminal a live bar stands below the rows (rich); anywhere else the output is plain lines without ANSI, in which a
row's fields are split by spaces and a missing number is "-". Every number is one of metrics.jsonl, rounded.
"""

import contextlib
import math
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

WIDTH = 80
Record = Mapping[str, Any]


class Column(NamedTuple):
    """One field of a row."""

    title: str
    width: int
    value: Callable[[Record], float | None]
    meaning: str
    percent: bool = False


def _key(name: str) -> Callable[[Record], float | None]:
    return lambda record: record.get(name)


def _dead(record: Record) -> float | None:
    counted = record.get("groups/counted")
    return record.get("groups/all_equal", 0) / counted if counted else None


COLUMNS = (
    Column("step", 5, _key("step"), "step"),
    Column("reward", 6, _key("reward/mean"), "reward/mean"),
    Column("+-", 4, _key("reward/half_width"), "reward/half_width"),
    Column("sprd", 4, _key("reward/spread"), "reward/spread"),
    Column("dead", 4, _dead, "groups/all_equal by groups/counted", percent=True),
    Column("cut", 4, _key("truncated"), "truncated", percent=True),
    Column("len", 4, _key("length/mean"), "length/mean"),
    Column("kl", 6, _key("kl"), "kl"),
    Column("entr", 4, _key("entropy"), "entropy"),
    Column("grad", 5, _key("gradient_norm"), "gradient_norm"),
    Column("regret", 6, _key("regret/second_order"), "regret/second_order"),
    Column("sec", 4, _key("seconds/step"), "seconds/step"),
    Column("tok/s", 5, _key("tokens_per_second"), "tokens_per_second"),
)
_LEFT = 5  # columns of the time left, after the last field
_TITLES_EVERY = 20


class Console:
    """Prints a run. Never raises because a terminal cannot show a character, or because its reader went away."""

    def __init__(self, steps: int, *, stream: TextIO | None = None, first_step: int = 0) -> None:
        """
        Args:
          steps: steps in the whole run.
          stream: default: standard output.
          first_step: steps already done, in a resumed run.
        """
        self._steps, self._stream = steps, stream or sys.stdout
        self._rows = 0
        self._first, self._started = first_step, time.monotonic()
        self._bar: Any = None
        self._task: Any = None
        self._live = self._open_bar() if self._stream.isatty() else None

    def header(self, facts: Mapping[str, Any]) -> None:
        """The run's facts, one a line: name, value."""
        width = max((len(name) for name in facts), default=0)
        for name, value in facts.items():
            self._print(f"{name:<{width}}  {_text(value)}")
        self._print("")

    def phase(self, name: str) -> None:
        """Says on the live bar what is being done; prints nothing elsewhere."""
        if self._bar is not None:
            self._bar.update(self._task, phase=name)

    def step(self, record: Record) -> None:
        """One row: the numbers of a train record of metrics.jsonl."""
        if self._rows % _TITLES_EVERY == 0:
            self._print(titles())
        self._rows += 1
        self._print(row(record, self._left(int(record["step"]))))
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"])

    def evaluation(self, record: Record) -> None:
        """One line: the numbers of an eval record."""
        parts = [f"eval {record['step']:>5}", f"reward {fit(record.get('eval/reward'), 6)}"]
        if "eval/half_width" in record:
            parts.append(f"+- {fit(record['eval/half_width'], 6)}")
        for key, value in record.items():
            if key.startswith("eval/reward/"):
                parts.append(f"{key.removeprefix('eval/reward/')} {fit(value, 6)}")
        parts.append(f"len {fit(record.get('eval/length'), 5)}")
        parts.append(f"cut {_percent(record.get('eval/truncated'))}")
        parts.append(f"prompts {record.get('eval/prompts', '-')}")
        parts.append(f"sec {fit(record.get('seconds/evaluate'), 5)}")
        for line in _wrap(parts):
            self._print(line)

    def sample(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """One group: its prompt, and the best and the worst response with their rewards.

        Args:
          rows: a step's rows of completions.jsonl; the group whose rewards differ most is shown. Nothing is printed
            when none is scored.
        """
        groups: dict[Any, list[Mapping[str, Any]]] = {}
        for response in rows:
            if response["reward"] is not None and not math.isnan(response["reward"]):
                groups.setdefault(response["group"], []).append(response)
        if not groups:
            return
        ranked = [sorted(group, key=lambda r: -r["reward"]) for group in groups.values()]
        scored = max(ranked, key=lambda group: group[0]["reward"] - group[-1]["reward"])
        self._print("")
        self._quote("prompt", scored[0]["prompt"])
        best, worst = scored[0], scored[-1]
        for name, response in [("best", best), ("worst", worst)] if worst is not best else [("only", best)]:
            parts = " ".join(f"{part}={fit(value, 8)}" for part, value in response["rewards"].items())
            cut = "" if response["finished"] else ", cut"
            title = f"{name}: reward {fit(response['reward'], 8)} ({parts}), {response['tokens']} tokens{cut}"
            self._quote(title, response["response"])
        self._print("")
        self._rows = 0  # the titles again, below the sample

    def event(self, message: str) -> None:
        """A line about something that happened: a resume, a checkpoint, a warning."""
        self._print(f"* {printable(message)}")

    def close(self, facts: Mapping[str, Any] | None = None) -> None:
        """Ends the bar and prints the closing lines: what is where."""
        if self._live is not None:
            self._live.stop()
            self._live = self._bar = None
        if facts:
            self._print("")
            width = max(len(name) for name in facts)
            for name, value in facts.items():
                self._print(f"{name:<{width}}  {_text(value)}")

    def _left(self, step: int) -> str:
        done = step - self._first
        if done < 1:
            return "-"
        return duration((time.monotonic() - self._started) / done * (self._steps - step))

    def _quote(self, title: str, text: str) -> None:
        self._print(f"  {printable(title)}")
        lines = printable(text, keep="\n").split("\n")
        room = WIDTH - 4
        shown = [line[i : i + room] for line in lines for i in range(0, max(len(line), 1), room)]
        for line in shown[:8]:
            self._print(f"  | {line}")
        if len(shown) > 8:
            self._print(f"  | ... {len(shown) - 8} more lines")

    def _print(self, line: str) -> None:
        line = line.rstrip()
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        line = line.encode(encoding, "backslashreplace").decode(encoding)
        with contextlib.suppress(BrokenPipeError, ValueError):  # the reader went away, or closed the stream
            if self._live is not None:
                self._live.console.print(line, markup=False, highlight=False, soft_wrap=True, emoji=False)
            else:
                self._stream.write(line + "\n")
                self._stream.flush()

    def _open_bar(self) -> Any:
        try:
            from rich.console import Console as RichConsole
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        except ImportError:  # the extra "train" is not there: plain lines
            return None
        self._bar = Progress(
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[phase]}", markup=False),
            console=RichConsole(file=self._stream),
            transient=True,
        )
        self._task = self._bar.add_task("", total=self._steps, completed=self._first, phase="")
        self._bar.start()
        return self._bar


def titles() -> str:
    """The line above the rows."""
    return " ".join(f"{c.title:>{c.width}}" for c in COLUMNS) + f" {'left':>{_LEFT}}"


def row(record: Record, left: str = "-") -> str:
    """One step as a line of fixed width."""
    cells = []
    for column in COLUMNS:
        value = column.value(record)
        cells.append(f"{_percent(value) if column.percent else fit(value, column.width):>{column.width}}")
    return " ".join(cells) + f" {left:>{_LEFT}}"


def fit(value: float | None, width: int) -> str:
    """A number in at most `width` characters; "-" for none.

    Three significant digits where they fit, and from 0.01 up at most three decimals, so that a column stays in line.
    Integers stand in full where they fit. Too small for any form: 0.
    """
    if value is None or not math.isfinite(value):
        return "-"
    if isinstance(value, int) and len(str(value)) <= width:
        return str(value)
    if value == 0:
        return "0"
    for digits in (3, 2, 1):
        places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        if abs(value) >= 0.01:
            places = min(places, 3)
        text = f"{value:.{places}f}"
        if len(text) <= width:
            return text
    for digits in (2, 1, 0):
        text = re.sub(r"e([+-])0*(\d)", lambda m: "e" + m[1].strip("+") + m[2], f"{value:.{digits}e}")
        if len(text) <= width:
            return text
    return "0" if abs(value) < 1 else text


def duration(seconds: float) -> str:
    """Seconds in at most five characters: 42s, 9m40s, 3h05m, 2d04h."""
    whole = round(seconds)
    for big, big_name, small, small_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= big:
            text = f"{whole // big}{big_name}{whole % big // small:02d}{small_name}"
            return text if len(text) <= _LEFT else f"{whole // big}{big_name}"
    return f"{whole}s"


_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


def printable(text: str, *, keep: str = "") -> str:
    r"""Text with every control, direction-changing and invisible character written as an escape, as \x1b.

    Args:
      keep: characters left as they are, as a newline.
    """

    def escape(match: re.Match[str]) -> str:
        char = match[0]
        if char in keep:
            return char
        short = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
        return short.get(char) or (f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}")

    return _HIDDEN.sub(escape, text)


def _percent(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{100 * value:.0f}%"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return fit(value, 8)
    return printable(str(value))


def _wrap(parts: Sequence[str]) -> list[str]:
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + 2 + len(part) > WIDTH:
            lines.append("          " + part)
        else:
            lines[-1] += "  " + part
    return lines
