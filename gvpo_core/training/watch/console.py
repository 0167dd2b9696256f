"""The console output of a run: a header, one row for each step, evaluations, samples, closing lines.

On a terminal, a live bar (rich) is below the rows. Elsewhere the output is plain lines of at most 80 columns without
ANSI codes: spaces separate the fields of a row, and a missing number is "-". Every number is one of metrics.jsonl,
rounded. A row ends with its verdict. The reasons and what to do are printed below it once, not at every step.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO, cast

from gvpo_core.training.terminal.output import Forgiving, encodable, line_width
from gvpo_core.training.terminal.text import (
    Command,
    columns,
    duration,
    fact,
    fit,
    interval,
    percent,
    pieces,
    printable,
    size,
    wrapped,
)
from gvpo_core.training.watch.alerts import BAD, LEVELS, OK, WATCH
from gvpo_core.training.watch.columns import Column, columns_for, legend, row, titles, verdict
from gvpo_core.training.watch.ending import ending
from gvpo_core.training.watch.metric_names import LOSSES, PHASES
from gvpo_core.training.watch.time_left import TimeLeft

Record = Mapping[str, Any]
_TITLES_EVERY = 20
_PHASES_EVERY = 10
_ALERTS = ("alerts", "machine/alerts")
_REMIND = 50  # steps after which a reason that still holds is printed again


class Console:
    """Prints a run. Never raises if the terminal cannot show a character or the reader of the output is gone."""

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
          width: columns; with 120 or more, rows have all fields. Default: the terminal's width, 80 elsewhere.
        """
        self._steps, self._stream = steps, Forgiving(stream or sys.stdout)
        self._rows = 0
        self._since_phases = 0
        self._shown: dict[str, tuple[str, int]] = {}  # alert -> its level and step when last shown
        self._time_left = TimeLeft(steps, evaluations)
        self._bar: Any = None
        self._task: Any = None
        self._width = width or line_width(self._stream)
        self._columns: tuple[Column, ...] = ()  # chosen at the first row, whose record has the names of the rewards
        self._live = self._open_bar(first_step) if self._stream.isatty() else None

    def header(self, facts: Mapping[str, Any]) -> None:
        """Prints the run's facts, one a line: name, value."""
        width = max((len(name) for name in facts), default=0)
        for name, value in facts.items():
            self._fact(name, value, width)
        self._print("")

    def phase(self, name: str) -> None:
        """Shows the current phase on the live bar; without a bar, prints nothing."""
        if self._bar is not None:
            self._bar.update(self._task, phase=name)

    def step(self, record: Record) -> None:
        """Prints the numbers of a train record as one row.

        The legend of the columns is above the first row. New alerts and, every 10 steps, the seconds by phase are
        below the row.
        """
        if not self._columns:
            self._columns = columns_for(self._width, record, self._stream)
            self._wrapped(legend(self._columns), style="dim")
            self._print("")
        if self._rows % _TITLES_EVERY == 0:
            self._print(titles(self._columns), style="bold")
        self._rows += 1
        line = row(record, duration(self._time_left.stepped(int(record["step"]))), self._columns)
        state = verdict(record)
        self._print(line, mark=(len(line) - len(state), {WATCH: "bold yellow", BAD: "bold red"}.get(state, "")))
        self._reasons(record)
        if self._since_phases == 0 and (phases := phase_line(record)):
            self._wrapped(phases, " " * 6, style="dim")
        self._since_phases = (self._since_phases + 1) % _PHASES_EVERY
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"])

    def evaluation(self, record: Record) -> None:
        """Prints the numbers of an eval record on one line, wrapped if needed."""
        self._time_left.evaluated(record.get("seconds/evaluate", 0.0))
        parts = [f"eval {record['step']:>5}"]
        parts += [f"{key.removeprefix('eval/')} {fit(record[key], 6)}" for key in LOSSES if key in record]
        if "eval/reward" in record or len(parts) == 1:
            parts += self._answers(record)
        parts.append(f"sec {fit(record.get('seconds/evaluate'), 5)}")
        for line in _wrap(parts, self._width):
            self._print(line)

    def _answers(self, record: Record) -> list[str]:
        """The fields of an evaluation that sampled responses: rewards, length, cut responses."""
        reward = record.get("eval/reward")
        parts = [f"reward {interval(reward, record.get('eval/half_width'))}"]
        rewards = {key: value for key, value in record.items() if key.startswith("eval/reward/")}
        # A single reward of weight 1 is the total itself, up to rounding: it is not repeated.
        if len(rewards) > 1 or not any(_same(reward, value) for value in rewards.values()):
            for key, value in rewards.items():
                name = encodable(printable(key.removeprefix("eval/reward/")), self._stream)
                parts.append(f"{name} {fit(value, 6)}")
        parts.append(f"len {fit(record.get('eval/length'), 5)}")
        if "eval/episodes/turns" in record:
            for name in ("turns", "tokens"):
                parts.append(f"cut at {name[:-1]} limit {percent(record.get(f'eval/episodes/{name}'), '%')}")
        else:
            parts.append(f"cut {percent(record.get('eval/truncated'), '%')}")
        parts.append(f"prompts {record.get('eval/prompts', '-')}")
        return parts

    def sample(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Prints one group: its prompt, all its rewards, and its best and worst response.

        Args:
          rows: a step's rows of completions.jsonl; the group with the largest difference of rewards is shown. Nothing
            is printed if no response is scored.
        """
        groups: dict[Any, list[Mapping[str, Any]]] = {}
        for response in rows:
            groups.setdefault(response["group"], []).append(response)
        scored_groups = [[r for r in group if _scored(r)] for group in groups.values()]
        ranked = [sorted(group, key=lambda r: -r["reward"]) for group in scored_groups if group]
        if not ranked:
            return
        scored = max(ranked, key=lambda group: group[0]["reward"] - group[-1]["reward"])
        self._print("")
        self._quote("prompt", scored[0]["prompt"])
        rewards = [fit(r["reward"], 8) for r in scored]
        rewards += ["-"] * (len(groups[scored[0]["group"]]) - len(scored))
        has_rewards = any(r["rewards"] or r["reward"] for r in scored)  # in distillation without rewards all are 0
        summary = f"its {len(rewards)} responses" + (f": rewards {' '.join(rewards)}" if has_rewards else "")
        self._wrapped(f"  {summary}", " " * 4)
        best, worst = scored[0], scored[-1]
        names = ("best", "worst") if has_rewards else ("first", "last")
        for name, response in zip(names, (best, worst), strict=True) if worst is not best else [("only", best)]:
            parts = " ".join(f"{part}={fit(value, 8)}" for part, value in response["rewards"].items())
            parts = f" ({parts})" if parts else ""
            reward = f"reward {fit(response['reward'], 8)}{parts}" if has_rewards else ""
            facts = [reward, f"{response['tokens']} tokens", ending(response)]
            title = f"{name}: {', '.join(text for text in facts if text)}"
            self._quote(title, response["response"])
        self._print("")
        self._rows = 0  # print the titles again below the sample

    def event(self, message: str, command: str = "") -> None:
        """Prints a line about something that happened: a resume, a checkpoint, a warning.

        Args:
          command: the command that resumes the run, printed on one line, however long it is.
        """
        self._wrapped(f"* {printable(message)}", "  ")
        if command:
            self._print(f"  resume with: {printable(command)}")

    def close(self, facts: Mapping[str, Any] | None = None) -> None:
        """Removes the bar and prints the closing facts, such as the files that the run wrote."""
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
        if isinstance(value, Command):
            self._print(text)
        else:
            self._wrapped(text, " " * (width + 2))

    def _reasons(self, record: Record) -> None:
        """Prints each alert and what to do if it is new, worse than before, or was printed long ago."""
        step, alerts = int(record["step"]), {a["key"]: a for key in _ALERTS for a in record.get(key, ())}
        self._shown = {key: last for key, last in self._shown.items() if key in alerts or step - last[1] < _REMIND}
        for key, alert in alerts.items():
            level, since = self._shown.get(key, (OK, step - _REMIND))
            if LEVELS.index(alert["level"]) > LEVELS.index(level) or step - since >= _REMIND:
                self._shown[key] = (alert["level"], step)
                text = printable(f"{alert['level']} {alert['seen']}: {alert['advice']}")
                self._wrapped(f"    ! {text}", " " * 6, style="yellow" if alert["level"] == WATCH else "red")

    def _quote(self, title: str, text: str) -> None:
        self._wrapped(f"  {printable(title)}", " " * 4)
        lines = encodable(printable(text, keep="\n"), self._stream).split("\n")
        room = self._width - 4
        shown = [piece for line in lines for piece in pieces(line, room)]
        for line in shown[:8]:
            self._print(f"  | {line}")
        if len(shown) > 8:
            self._print(f"  | ... {len(shown) - 8} more lines")

    def _wrapped(self, text: str, indent: str = "", *, style: str = "") -> None:
        for line in wrapped(encodable(text, self._stream), self._width, indent):
            self._print(line, style=style)

    def _print(self, line: str, *, style: str = "", mark: tuple[int, str] = (0, "")) -> None:
        """Prints a line.

        Args:
          style: style of the line on a terminal.
          mark: (place, style): the style on a terminal from this place on.
        """
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
        except ImportError:  # the extra "train" is not installed: print plain lines
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


def _same(a: float | None, b: float | None) -> bool:
    return a == b or (a is not None and b is not None and math.isclose(a, b, rel_tol=1e-9))


def _scored(response: Mapping[str, Any]) -> bool:
    return response["reward"] is not None and not math.isnan(response["reward"])


def phase_line(record: Record) -> str:
    """The seconds of a step by phase and its peak memory, as a line; empty if the record has neither."""
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
