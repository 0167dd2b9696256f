"""What a person sees while a run goes on: a header, one row a step within 80 columns, evaluations, samples, the end.

On a terminal a live bar stands below the rows (rich); anywhere else the output is plain lines without ANSI, in which a
row's fields are split by spaces and a missing number is "-". Every number is one of metrics.jsonl, rounded. A row ends
with its verdict; why it is not OK, and what to do, stands below the row once, not at every step.
"""

import math
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TextIO, cast

from gvpo_core.training.watch.alerts import BAD, LEVELS, OK, WATCH
from gvpo_core.training.watch.metric_names import PHASES
from gvpo_core.training.watch.output import Forgiving
from gvpo_core.training.watch.time_left import TimeLeft

WIDTH = 80
Record = Mapping[str, Any]


class Column(NamedTuple):
    """One field of a row."""

    title: str
    width: int
    text: Callable[[Record, int], str]  # of a record, in at most `width` characters
    meaning: str  # the key of metrics.jsonl, or how it is made of keys


def _number(title: str, width: int, key: str) -> Column:
    return Column(title, width, lambda record, width: fit(record.get(key), width), key)


def _signed(record: Record, width: int) -> str:
    value = record.get("reward/trend")
    if value is None:
        return "-"
    text = fit(abs(value), width - 1)
    return text if text in ("-", "0") else f"{'-' if value < 0 else '+'}{text}"


def _dead(record: Record, width: int) -> str:
    counted, dead = record.get("groups/counted"), record.get("groups/all_equal", 0)
    best, worst = record.get("groups/all_best", 0), record.get("groups/all_worst", 0)
    if not counted:
        return "-"
    if best + worst < dead:  # alike in between, or nothing to tell best from worst by
        return _percent(dead / counted)
    return f"{_percent(best / counted)}/{_percent(worst / counted)}"


COLUMNS = (
    _number("step", 5, "step"),
    _number("rewrd", 5, "reward/mean"),
    Column("trnd", 4, _signed, "reward/trend"),
    _number("+-", 3, "reward/half_width"),
    _number("spr", 3, "reward/spread"),
    Column("dead%", 5, _dead, "groups/all_best / groups/all_worst by groups/counted"),
    Column("cut", 3, lambda record, width: _percent(record.get("truncated")), "truncated"),
    _number("len", 4, "length/mean"),
    _number("kl", 4, "kl"),
    _number("entr", 4, "entropy"),
    _number("grad", 4, "gradient_norm"),
    _number("regr", 4, "regret/second_order"),
    _number("sec", 3, "seconds/step"),
    _number("tk/s", 4, "tokens_per_second"),
)
LEGEND = (
    "trnd: reward against the 10 steps before; +-: half of its 95 % interval",
    "spr: spread inside groups; dead%: groups all right/all wrong (one number: alike",
    "otherwise); cut: % at the token limit; regr: reward to be gained; ~0: nearly 0",
)
_LEFT = 5  # columns of the time left, after the last field
_TITLES_EVERY = 20
_PHASES_EVERY = 10
_ALERTS = ("alerts", "machine/alerts")
_REMIND = 50  # steps after which a reason that still holds is said again


class Console:
    """Prints a run. Never raises because a terminal cannot show a character, or because its reader went away."""

    def __init__(
        self, steps: int, *, stream: TextIO | None = None, first_step: int = 0, evaluations: Sequence[int] = ()
    ) -> None:
        """
        Args:
          steps: steps in the whole run.
          stream: default: standard output.
          first_step: steps already done, in a resumed run.
          evaluations: steps after which the run evaluates.
        """
        self._steps, self._stream = steps, Forgiving(stream or sys.stdout)
        self._rows = 0
        self._since_phases = 0
        self._said: dict[str, tuple[str, int]] = {}  # alert -> its level and step when last said
        self._time_left = TimeLeft(steps, evaluations)
        self._bar: Any = None
        self._task: Any = None
        self._live = self._open_bar(first_step) if self._stream.isatty() else None

    def header(self, facts: Mapping[str, Any], *, legend: bool = True) -> None:
        """The run's facts, one a line: name, value; then what the columns of a row mean."""
        width = max((len(name) for name in facts), default=0)
        for name, value in facts.items():
            self._fact(name, value, width)
        self._print("")
        if legend:
            for line in LEGEND:
                self._print(line, style="dim")
            self._print("")

    def phase(self, name: str) -> None:
        """Says on the live bar what is being done; prints nothing elsewhere."""
        if self._bar is not None:
            self._bar.update(self._task, phase=name)

    def step(self, record: Record) -> None:
        """One row: the numbers of a train record. Below it, where due: what is wrong, and the seconds by phase."""
        if self._rows % _TITLES_EVERY == 0:
            self._print(titles(), style="bold")
        self._rows += 1
        line = row(record, duration(self._time_left.stepped(int(record["step"]))))
        said = verdict(record)
        self._print(line, mark=(len(line) - len(said), {WATCH: "bold yellow", BAD: "bold red"}.get(said, "")))
        self._reasons(record)
        if self._since_phases == 0 and (phases := phase_line(record)):
            self._print(phases, style="dim")
        self._since_phases = (self._since_phases + 1) % _PHASES_EVERY
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"])

    def evaluation(self, record: Record) -> None:
        """One line: the numbers of an eval record."""
        self._time_left.evaluated(record.get("seconds/evaluate", 0.0))
        parts = [f"eval {record['step']:>5}", f"reward {fit(record.get('eval/reward'), 6)}"]
        if "eval/half_width" in record:
            parts.append(f"+- {fit(record['eval/half_width'], 6)}")
        rewards = {key: value for key, value in record.items() if key.startswith("eval/reward/")}
        if len(rewards) > 1 or record.get("eval/reward") not in rewards.values():  # one, unweighted, says no more
            for key, value in rewards.items():
                parts.append(f"{key.removeprefix('eval/reward/')} {fit(value, 6)}")
        parts.append(f"len {fit(record.get('eval/length'), 5)}")
        parts.append(f"cut {_percent(record.get('eval/truncated'), '%')}")
        parts.append(f"prompts {record.get('eval/prompts', '-')}")
        parts.append(f"sec {fit(record.get('seconds/evaluate'), 5)}")
        for line in _wrap(parts):
            self._print(line)

    def sample(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """One group: its prompt, the rewards of all its responses, and the best and the worst of them.

        Args:
          rows: a step's rows of completions.jsonl; the group whose rewards differ most is shown. Nothing is printed
            when none is scored.
        """
        groups: dict[Any, list[Mapping[str, Any]]] = {}
        for response in rows:
            groups.setdefault(response["group"], []).append(response)
        known = [[r for r in group if _scored(r)] for group in groups.values()]
        ranked = [sorted(group, key=lambda r: -r["reward"]) for group in known if group]
        if not ranked:
            return
        scored = max(ranked, key=lambda group: group[0]["reward"] - group[-1]["reward"])
        self._print("")
        self._quote("prompt", scored[0]["prompt"])
        rewards = [fit(r["reward"], 8) for r in scored]
        rewards += ["-"] * (len(groups[scored[0]["group"]]) - len(scored))
        said = f"its {len(rewards)} responses: rewards {' '.join(rewards)}"
        for line in textwrap.wrap(said, WIDTH, initial_indent="  ", subsequent_indent="    "):
            self._print(line)
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
                self._fact(name, value, width)

    def _fact(self, name: str, value: Any, width: int) -> None:
        text = f"{printable(name).replace('_', ' '):<{width}}  {_text(value, name)}"
        # Whole words, and whole paths, however long.
        lines = textwrap.wrap(
            text, WIDTH, subsequent_indent=" " * (width + 2), break_long_words=False, break_on_hyphens=False
        )
        for line in lines:
            self._print(line)

    def _reasons(self, record: Record) -> None:
        """What is wrong and what to do, where it is new, worse than before, or was said long ago."""
        step, now = int(record["step"]), {a["key"]: a for key in _ALERTS for a in record.get(key, ())}
        self._said = {key: said for key, said in self._said.items() if key in now or step - said[1] < _REMIND}
        for key, alert in now.items():
            level, since = self._said.get(key, (OK, step - _REMIND))
            if LEVELS.index(alert["level"]) > LEVELS.index(level) or step - since >= _REMIND:
                self._said[key] = (alert["level"], step)
                text = printable(f"{alert['level']} {alert['seen']}: {alert['advice']}")
                for line in textwrap.wrap(text, WIDTH, initial_indent="    ! ", subsequent_indent="      "):
                    self._print(line, style="yellow" if alert["level"] == WATCH else "red")

    def _quote(self, title: str, text: str) -> None:
        self._print(f"  {printable(title)}")
        lines = printable(text, keep="\n").split("\n")
        room = WIDTH - 4
        shown = [line[i : i + room] for line in lines for i in range(0, max(len(line), 1), room)]
        for line in shown[:8]:
            self._print(f"  | {line}")
        if len(shown) > 8:
            self._print(f"  | ... {len(shown) - 8} more lines")

    def _print(self, line: str, *, style: str = "", mark: tuple[int, str] = (0, "")) -> None:
        """Prints a line; on a terminal in a style, and from a place on in another."""
        line = line.rstrip()
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        line = line.encode(encoding, "backslashreplace").decode(encoding)
        if self._live is not None:
            from rich.text import Text

            text = Text(line, style=style, end="")
            text.stylize(mark[1], mark[0])
            self._live.console.print(text, highlight=False, soft_wrap=True)
        else:
            self._stream.write(line + "\n")
            self._stream.flush()

    def _open_bar(self, done: int) -> Any:
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
            console=RichConsole(file=cast(TextIO, self._stream)),
            transient=True,
        )
        self._task = self._bar.add_task("", total=self._steps, completed=done, phase="")
        self._bar.start()
        return self._bar


def _scored(response: Mapping[str, Any]) -> bool:
    return response["reward"] is not None and not math.isnan(response["reward"])


def titles() -> str:
    """The line above the rows."""
    return " ".join(f"{c.title:>{c.width}}" for c in COLUMNS) + f" {'left':>{_LEFT}} state"


def row(record: Record, left: str = "-") -> str:
    """One step as a line of fixed width."""
    cells = [f"{column.text(record, column.width):>{column.width}}" for column in COLUMNS]
    return f"{' '.join(cells)} {left:>{_LEFT}} {verdict(record)}"


def verdict(record: Record) -> str:
    """The worse of the record's two verdicts, on the training and on the machine; "-" without one."""
    found = [record[key] for key in ("verdict", "machine/verdict") if key in record]
    return max(found, key=LEVELS.index, default="-")


def phase_line(record: Record) -> str:
    """The seconds of a step by phase and its peak memory, as a line; empty where a record has none."""
    parts = [f"{p} {fit(record[key], 4)}" for p in (*PHASES, "other") if (key := f"seconds/{p}") in record]
    if record.get("memory/peak"):
        parts.append(f"memory {_bytes(record['memory/peak'])}")
    return f"    seconds: {', '.join(parts)}" if parts else ""


def fit(value: float | None, width: int) -> str:
    """A number in at most `width` characters; "-" for none.

    Three significant digits where they fit, and from 0.01 up at most three decimals, so that a column stays in line.
    Integers stand in full where they fit; where only that makes it fit, .5 stands for 0.5, and 12k for 12345. 0 is
    exactly 0; too small for any form: ~0, with its sign; too large: asterisks.
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
        for form in (text, text.replace("0.", ".", 1)) if abs(value) < 1 else (text,):
            if len(form) <= width:
                return form
    for unit, name in ((1e3, "k"), (1e6, "M")):
        for places in (1, 0):
            text = f"{value / unit:.{places}f}{name}"
            if len(text) <= width and abs(value) >= unit:
                return text
    for digits in (2, 1, 0):
        text = re.sub(r"e([+-])0*(\d)", lambda m: "e" + m[1].strip("+") + m[2], f"{value:.{digits}e}")
        if len(text) <= width:
            return text
    text = f"{value:.{max(0, width - 1 - (value < 0))}f}".replace("0.", ".", 1)  # one digit, but not the first
    if len(text) <= width and re.search("[1-9]", text):
        return text
    return "*" * width if abs(value) >= 1 else "-~0" if value < 0 and width > 2 else "~0"


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


def _percent(share: float | None, unit: str = "") -> str:
    """0 and 100 stand for none and all, never for nearly so."""
    if share is None or not math.isfinite(share):
        return "-"
    percent = round(100 * share)
    nearly = {0: "~0", 100: "99"}.get(percent, "") if 0 < share < 1 else ""
    return f"{nearly or percent}{unit}"


def _text(value: Any, name: str = "") -> str:
    """A fact as a person reads it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int | float) and "memory" in name:
        return _bytes(value)
    if isinstance(value, float):
        return fit(value, 8)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{printable(str(key))} {_text(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value)
    return printable(str(value))


def _bytes(count: float) -> str:
    unit, name = (2**30, "GiB") if count >= 2**30 else (2**20, "MiB")
    return f"{fit(count / unit, 5)} {name}"


def _wrap(parts: Sequence[str]) -> list[str]:
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + 2 + len(part) > WIDTH:
            lines.append("          " + part)
        else:
            lines[-1] += "  " + part
    return lines
