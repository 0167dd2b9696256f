"""What a person sees of a run: a header, one row a step, evaluations, samples, the end.

On a terminal a live bar (rich) is below the rows. Elsewhere the output is plain lines of at most 80 columns without
ANSI: spaces separate the fields of a row, a missing number is "-". Every number is one of metrics.jsonl, rounded. A row
ends with its verdict; the reasons and what to do are printed below it once, not at every step.
"""

import math
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, TextIO, cast

from gvpo_core.training.terminal.output import Forgiving, encodable
from gvpo_core.training.terminal.text import Command, columns, duration, fact, fit, percent, pieces, printable, size
from gvpo_core.training.watch.alerts import BAD, LEVELS, OK, WATCH
from gvpo_core.training.watch.columns import ALL_LEGEND, LEGEND, NARROW, WIDE, Column, columns_for, row, titles, verdict
from gvpo_core.training.watch.metric_names import LOSSES, PHASES
from gvpo_core.training.watch.time_left import TimeLeft

Record = Mapping[str, Any]
_TITLES_EVERY = 20
_PHASES_EVERY = 10
_ALERTS = ("alerts", "machine/alerts")
_REMIND = 50  # steps after which a reason that still holds is said again


class Console:
    """Prints a run. Never raises because a terminal cannot show a character, or because its reader went away."""

    def __init__(
        self,
        steps: int,
        *,
        stream: TextIO | None = None,
        first_step: int = 0,
        evaluations: Sequence[int] = (),
        width: int | None = None,
    ) -> None:
        """
        Args:
          steps: steps in the whole run.
          stream: default: standard output.
          first_step: steps already done, in a resumed run.
          evaluations: steps after which the run evaluates.
          width: columns; at 120 and more rows have all their fields. Default: the terminal's, 80 elsewhere.
        """
        self._steps, self._stream = steps, Forgiving(stream or sys.stdout)
        self._rows = 0
        self._since_phases = 0
        self._shown: dict[str, tuple[str, int]] = {}  # alert -> its level and step when last shown
        self._time_left = TimeLeft(steps, evaluations)
        self._bar: Any = None
        self._task: Any = None
        terminal = self._stream.isatty()
        self._width = width or (max(NARROW, shutil.get_terminal_size().columns) if terminal else NARROW)
        self._columns: tuple[Column, ...] = ()  # chosen at the first row, which names the rewards
        self._live = self._open_bar(first_step) if terminal else None

    def header(self, facts: Mapping[str, Any], *, legend: bool = True) -> None:
        """The run's facts, one a line: name, value; then what the columns of a row mean."""
        width = max((len(name) for name in facts), default=0)
        for name, value in facts.items():
            self._fact(name, value, width)
        self._print("")
        if legend:
            for line in textwrap.wrap(ALL_LEGEND if self._width >= WIDE else LEGEND, self._width):
                self._print(line, style="dim")
            self._print("")

    def phase(self, name: str) -> None:
        """Says on the live bar what is being done; prints nothing elsewhere."""
        if self._bar is not None:
            self._bar.update(self._task, phase=name)

    def step(self, record: Record) -> None:
        """One row: the numbers of a train record. Below it, where due: what is wrong, and the seconds by phase."""
        self._columns = self._columns or columns_for(self._width, record)
        if self._rows % _TITLES_EVERY == 0:
            self._print(titles(self._columns), style="bold")
        self._rows += 1
        line = row(record, duration(self._time_left.stepped(int(record["step"]))), self._columns)
        state = verdict(record)
        self._print(line, mark=(len(line) - len(state), {WATCH: "bold yellow", BAD: "bold red"}.get(state, "")))
        self._reasons(record)
        if self._since_phases == 0 and (phases := phase_line(record)):
            self._print(phases, style="dim")
        self._since_phases = (self._since_phases + 1) % _PHASES_EVERY
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"])

    def evaluation(self, record: Record) -> None:
        """One line: the numbers of an eval record."""
        self._time_left.evaluated(record.get("seconds/evaluate", 0.0))
        parts = [f"eval {record['step']:>5}"]
        parts += [f"{key.removeprefix('eval/')} {fit(record[key], 6)}" for key in LOSSES if key in record]
        if "eval/reward" in record or len(parts) == 1:
            parts += self._answers(record)
        parts.append(f"sec {fit(record.get('seconds/evaluate'), 5)}")
        for line in _wrap(parts, self._width):
            self._print(line)

    def _answers(self, record: Record) -> list[str]:
        """The fields of an evaluation that answered prompts: rewards, length, cut responses."""
        parts = [f"reward {fit(record.get('eval/reward'), 6)}"]
        if "eval/half_width" in record:
            parts.append(f"+- {fit(record['eval/half_width'], 6)}")
        rewards = {key: value for key, value in record.items() if key.startswith("eval/reward/")}
        if len(rewards) > 1 or record.get("eval/reward") not in rewards.values():  # one, unweighted, says no more
            for key, value in rewards.items():
                parts.append(f"{printable(key.removeprefix('eval/reward/'))} {fit(value, 6)}")
        parts.append(f"len {fit(record.get('eval/length'), 5)}")
        parts.append(f"cut {percent(record.get('eval/truncated'), '%')}")
        parts.append(f"prompts {record.get('eval/prompts', '-')}")
        return parts

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
        summary = f"its {len(rewards)} responses: rewards {' '.join(rewards)}"
        for line in textwrap.wrap(summary, self._width, initial_indent="  ", subsequent_indent="    "):
            self._print(line)
        best, worst = scored[0], scored[-1]
        for name, response in [("best", best), ("worst", worst)] if worst is not best else [("only", best)]:
            parts = " ".join(f"{part}={fit(value, 8)}" for part, value in response["rewards"].items())
            cut = "" if response["finished"] else ", cut"
            parts = f" ({parts})" if parts else ""
            title = f"{name}: reward {fit(response['reward'], 8)}{parts}, {response['tokens']} tokens{cut}"
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
        text = f"{printable(name).replace('_', ' '):<{width}}  {fact(value, name)}"
        # Whole words, and whole paths, however long.
        lines = [text]
        if not isinstance(value, Command):
            indent = " " * (width + 2)
            lines = textwrap.wrap(
                text, self._width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
            )
        for line in lines:
            self._print(line)

    def _reasons(self, record: Record) -> None:
        """What is wrong and what to do, where it is new, worse than before, or was said long ago."""
        step, now = int(record["step"]), {a["key"]: a for key in _ALERTS for a in record.get(key, ())}
        self._shown = {key: last for key, last in self._shown.items() if key in now or step - last[1] < _REMIND}
        for key, alert in now.items():
            level, since = self._shown.get(key, (OK, step - _REMIND))
            if LEVELS.index(alert["level"]) > LEVELS.index(level) or step - since >= _REMIND:
                self._shown[key] = (alert["level"], step)
                text = printable(f"{alert['level']} {alert['seen']}: {alert['advice']}")
                for line in textwrap.wrap(text, self._width, initial_indent="    ! ", subsequent_indent="      "):
                    self._print(line, style="yellow" if alert["level"] == WATCH else "red")

    def _quote(self, title: str, text: str) -> None:
        self._print(f"  {printable(title)}")
        lines = printable(text, keep="\n").split("\n")
        room = self._width - 4
        shown = [piece for line in lines for piece in pieces(line, room)]
        for line in shown[:8]:
            self._print(f"  | {line}")
        if len(shown) > 8:
            self._print(f"  | ... {len(shown) - 8} more lines")

    def _print(self, line: str, *, style: str = "", mark: tuple[int, str] = (0, "")) -> None:
        """Prints a line; on a terminal in a style, and from a place on in another."""
        line = encodable(line.rstrip(), self._stream)
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
            redirect_stderr=sys.stderr is not None and sys.stderr.isatty(),  # a warning would tear the bar
        )
        self._task = self._bar.add_task("", total=self._steps, completed=done, phase="")
        self._bar.start()
        return self._bar


def _scored(response: Mapping[str, Any]) -> bool:
    return response["reward"] is not None and not math.isnan(response["reward"])


def phase_line(record: Record) -> str:
    """The seconds of a step by phase and its peak memory, as a line; empty where a record has none."""
    parts = [f"{p} {fit(record[key], 4)}" for p in (*PHASES, "other") if (key := f"seconds/{p}") in record]
    if record.get("memory/peak"):
        parts.append(f"memory {size(record['memory/peak'])}")
    return f"    seconds: {', '.join(parts)}" if parts else ""


def _wrap(parts: Sequence[str], width: int) -> list[str]:
    lines = [parts[0]]
    for part in parts[1:]:
        if columns(lines[-1]) + 2 + columns(part) > width:
            lines.append("          " + part)
        else:
            lines[-1] += "  " + part
    return lines
