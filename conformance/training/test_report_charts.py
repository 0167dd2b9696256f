"""The report's drawings: what is left out of a long series, what stays, and where they end."""

import re

import numpy as np
import pytest
from made_up_run import run_of
from simulated_run import write_run

from gvpo_core.training.report.charts import LIMIT, Chart, Line, downsample, figure, label, moving_mean, svg
from gvpo_core.training.report.read import Series, read_run
from gvpo_core.training.report.sections import RESULT, sections

pytestmark = pytest.mark.core


def test_downsampling_keeps_ends_and_spikes():
    rng = np.random.default_rng(0)
    rows = [rng.random(10_000) for _ in range(3)]
    rows[0][4321], rows[1][77], rows[2][9000] = 50.0, -50.0, 50.0
    kept = downsample(rows)
    assert len(kept) <= LIMIT and {0, 9999, 4321, 77, 9000} <= set(kept) and (np.diff(kept) > 0).all()
    assert list(downsample([np.full(1000, np.nan)])[:1]) == [0]
    assert len(downsample([np.arange(LIMIT)])) == LIMIT


def test_a_gap_breaks_the_line_and_a_lonely_point_is_drawn():
    values = np.array([1.0, 2.0, np.nan, 3.0, np.nan, 1.0, 1.0])
    drawn = figure(Chart("t", "u", "r", [Line("a", Series(np.arange(7.0), values), 1)]))
    (path,) = re.findall('class="line s1" d="([^"]+)"', drawn)
    assert path.count("M") == 3 and "nan" not in drawn
    assert drawn.count("<circle") == 1


def test_moving_mean_and_labels():
    got = moving_mean(np.array([1.0, 2.0, 6.0, np.nan, 4.0]), 3)
    assert got.tolist() == [1.5, 3.0, 4.0, 5.0, 4.0]
    numbers = (0, 0.25, 1000, 12500, 2.5e6, 1e-6, 2.5e-6, -0.5)
    assert [label(x) for x in numbers] == ["0", "0.25", "1000", "12.5k", "2.5M", "1e-6", "2.5e-6", "-0.5"]


def heights(drawn: str, kind: str) -> list[float]:
    """The y of every corner of the shapes of a class."""
    paths = re.findall(rf'class="{kind} [^"]*" d="([^"]+)"', drawn)
    return [float(y) for path in paths for _, y in re.findall(r"([\d.]+) ([\d.]+)", path)]


def test_a_band_ends_where_no_value_can_be():
    """An interval of a mean of zeros and ones may pass both; the mean cannot."""
    values, half = np.linspace(0.2, 0.9, 8), np.full(8, 0.6)
    series = Series(np.arange(8.0), values)
    free = figure(Chart("t", "u", "r", [Line("a", series, 1, half)]))
    held = figure(Chart("t", "u", "r", [Line("a", series, 1, half, limits=(0.0, 1.0))]))
    ticks = [float(t) for t in re.findall('text-anchor="end">([-\\d.]+)<', held)]
    assert min(ticks) == 0 and max(ticks) == 1
    assert max(heights(held, "band")) - min(heights(held, "band")) > 150  # it fills the chart
    assert max(float(t) for t in re.findall('text-anchor="end">([-\\d.]+)<', free)) > 1


def test_the_reward_of_a_run_is_drawn_within_its_rewards(tmp_path):
    write_run(tmp_path / "run", steps=30, prompts=2)
    _, charts = sections(read_run(tmp_path / "run"))[0]
    assert charts[0].title == "Reward" and charts[0].lines[0].limits == (0.0, 1.0)
    drawn = figure(charts[0])
    assert drawn.count("<svg") == 2  # a wide chart has another shape for narrow screens
    assert {"0", "1"} <= set(re.findall('text-anchor="end">([-\\d.]+)<', drawn)) <= {"0", "0.2", "0.25", "0.4", "0.5",
                                                                             "0.6", "0.75", "0.8", "1"}  # fmt: skip


def test_reward_curve(tmp_path):
    pytest.importorskip("matplotlib")
    from gvpo_core.training.report.figure import reward_curve_png

    run = tmp_path / "run"
    write_run(run, steps=30)
    out = reward_curve_png(run, tmp_path / "figures" / "curve.png")
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 20_000
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(ValueError, match="no step with a reward"):
        reward_curve_png(tmp_path, tmp_path / "none.png")


@pytest.mark.parametrize(("steps", "evaluated"), [(19, True), (20, True), (20, False), (3, False)])
def test_the_reward_chart_names_what_is_on_it_and_nothing_else(steps, evaluated):
    evaluations = [{"step": step, "eval/reward": 0.5} for step in (0, steps)] if evaluated else []
    run = run_of(evaluations=evaluations, reward__mean=[0.1 * (i % 3) for i in range(steps)])
    ((chart,),) = (charts for title, charts in sections(run) if title == RESULT)
    drawn = svg(chart)
    assert ("thick one" in chart.reading) == ("thin" in drawn) == (steps >= 20)
    assert ("held-out" in chart.reading) == ('class="point' in drawn) == evaluated
