"""The result that `train` returns: how the run ended, its numbers, and its curves in a notebook."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gvpo_core.training.report.assets import STYLE
from gvpo_core.training.report.changes import Change, held_out_change
from gvpo_core.training.report.charts import figure
from gvpo_core.training.report.document import escaped
from gvpo_core.training.report.read import Run, read_run
from gvpo_core.training.report.reading import read_out
from gvpo_core.training.report.sections import sections

_SHOWN = ("Reward", "Each reward", "KL to the reference")  # charts by title


@dataclass(frozen=True)
class Result:
    """The result of a run. A notebook displays it as held-out reward before and after, with curves.

    `metrics`, `evaluations` and `held_out` are read from the run folder on first access. They cover the whole run, also
    the steps before a resume. They raise FileNotFoundError if the folder no longer exists.
    """

    step: int
    """Steps done."""
    folder: Path
    """The run folder."""
    exit_status: int
    """0: all steps done, or stopped early by `evaluation.patience`. 128 + the signal's number: stopped by a signal,
    with the state saved."""

    @cached_property
    def metrics(self) -> dict[str, np.ndarray]:
        """The numbers of the training steps: key of docs/metrics.md -> (steps,) float64; NaN if a step has no value.

        "step" holds the step numbers. `pandas.DataFrame(result.metrics)` makes a table.
        """
        numbers = self._run.numbers
        steps = np.asarray([record["step"] for record in self._run.train], np.float64)
        columns = {"step": steps}
        for key in numbers.keys():  # noqa: SIM118
            if key != "step":
                known_steps, values = numbers.series(key)
                columns[key] = np.full(len(steps), np.nan)
                columns[key][np.searchsorted(steps, known_steps)] = values
        return columns

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """The evaluations in order: "step", "eval/reward" and the other keys of docs/metrics.md."""
        return self._run.evaluations

    @cached_property
    def held_out(self) -> Change | None:
        """The change of the held-out reward from the first to the last evaluation; None with fewer than two.

        `start` and `end` are the means, `difference` is their difference, and `paired` is the number of prompts in both
        (0: not paired). `start_half`, `end_half` and `half` are half-widths of 95 % intervals. `beyond_noise` says
        whether the difference is more than noise (None: too little data to tell).
        """
        return held_out_change(self._run)

    @cached_property
    def _run(self) -> Run:
        return read_run(self.folder)

    def _repr_html_(self) -> str:
        try:
            return _html(self._run)
        except OSError:
            return f"<pre>{escaped(repr(self))}</pre>"


def _html(run: Run) -> str:
    """The run as an HTML fragment with its own style, for display in another page such as a notebook."""
    reading = read_out(run)
    cards = "".join(
        f'<div class="card"><span class="label">{escaped(name)}</span><b>{escaped(value)}</b>'
        f'<span class="small">{escaped(small)}</span></div>'
        for name, value, small in reading.figures
    )
    charts = [chart for _, section_charts in sections(run) for chart in section_charts if chart.title in _SHOWN]
    drawn = "".join(figure(replace(chart, wide=False)) for chart in charts)
    report = run.folder / "report.html"
    box = "background: var(--page); color: var(--ink); padding: 14px 16px; border-radius: 8px;"
    style = STYLE.replace(":root", "&")
    return (
        f'<div class="gvpo-result"><style>.gvpo-result {{ {box} {style} }}</style>'
        f'<div class="figures" style="margin-top: 0">{cards}</div>'
        f"{''.join(f'<p>{escaped(sentence)}</p>' for sentence in reading.sentences)}"
        f'<div class="charts">{drawn}</div>'
        f'<p class="small" style="margin: 10px 0 0">All charts and responses: {escaped(str(report))}</p></div>'
    )
