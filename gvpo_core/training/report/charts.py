"""Inline SVG charts: lines with bands, points with error bars, stacked areas. The style sheet has the colours."""

import html
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from gvpo_core.training.report.read import Series

_Scale = Callable[[np.ndarray], np.ndarray]
LIMIT = 500  # largest number of points drawn of a series
SMOOTHED = 20
"""Number of steps from which on a line is smoothed."""
_SMOOTHEST = 5  # smallest window of a smoothed line, steps
_WIDTH, _WIDE, _HEIGHT = 560, 900, 240
_X0, _Y0, _Y1 = 54, _HEIGHT - 26, 10  # the corner of the axes, and the top


@dataclass(frozen=True)
class Line:
    """A curve; `half` draws a band of value +- half around it."""

    name: str
    series: Series
    colour: int  # 1..6
    half: np.ndarray | None = None  # (n,), like series.values
    smooth: bool = False  # draw a thin curve with a moving mean over it
    limits: tuple[float, float] = (-math.inf, math.inf)  # bounds of the values: bands end there


@dataclass(frozen=True)
class Points:
    """Marks with error bars, joined by a thin line."""

    name: str
    series: Series
    colour: int
    half: np.ndarray | None = None
    limits: tuple[float, float] = (-math.inf, math.inf)


@dataclass(frozen=True)
class Chart:
    """One chart. `stack` are areas on top of each other over the same steps; a chart has either a stack or lines."""

    title: str
    unit: str
    reading: str
    lines: Sequence[Line] = ()
    points: Sequence[Points] = ()
    stack: Sequence[Line] = ()
    floor: float | None = None  # start of the axis, instead of one chosen from the values
    wide: bool = False  # as wide as the page
    marks: Sequence[float] = field(default=())  # steps with a vertical mark, after which the run was resumed

    @property
    def drawn(self) -> list[Line | Points]:
        """Everything on the chart."""
        return [*self.stack, *self.lines, *self.points]

    def __bool__(self) -> bool:
        return any(bool(x.series) for x in self.drawn)


def figure(chart: Chart) -> str:
    """The chart as an HTML figure: title, unit, legend, SVG, and how to read it."""
    esc = html.escape
    series = chart.drawn
    legend = ""
    if len(series) > 1:
        items = (f'<li><i class="{_swatch(chart, s)} b{s.colour}"></i>{esc(s.name)}</li>' for s in series)
        legend = f'<ul class="legend">{"".join(items)}</ul>'
    unit = f' <span class="unit">{esc(chart.unit)}</span>' if chart.unit else ""
    start = '<figure class="wide">' if chart.wide else "<figure>"
    drawn = svg(chart)
    if chart.wide:  # narrow screens show a second SVG with readable text
        drawn = f'<div class="broad">{drawn}</div><div class="narrow">{svg(replace(chart, wide=False))}</div>'
    return (
        f"{start}<figcaption><h3>{esc(chart.title)}{unit}</h3>{legend}</figcaption>{drawn}"
        f'<p class="reading">{esc(chart.reading)}</p></figure>'
    )


def _ends(drawn: Line | Points, indices: np.ndarray | slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
    """The lower and upper ends of the band or the bars, clipped to the limits."""
    values = drawn.series.values[indices]
    half = np.zeros_like(values) if drawn.half is None else np.nan_to_num(drawn.half[indices])
    low, high = drawn.limits
    return np.clip(values - half, low, high), np.clip(values + half, low, high)


def _swatch(chart: Chart, drawn: Line | Points) -> str:
    return "dot" if isinstance(drawn, Points) else "block" if chart.stack else "bar"


def svg(chart: Chart) -> str:
    """The chart as SVG. `data-series` has the values to show at the pointer."""
    stacked = _stacked(chart.stack)
    x_low, x_high = _x_range([s.series.steps for s in chart.drawn])
    low, high, y_ticks = _y_axis(chart, stacked)
    width = _WIDE if chart.wide else _WIDTH
    right = width - 14

    def px(steps: np.ndarray) -> np.ndarray:
        return np.asarray(_X0 + (steps - x_low) / (x_high - x_low) * (right - _X0))

    def py(values: np.ndarray) -> np.ndarray:
        return np.asarray(_Y0 + (values - low) / (high - low) * (_Y1 - _Y0))

    parts, hover = [], []
    for tick in y_ticks:
        y = float(py(np.asarray(tick)))
        parts.append(f'<line class="grid" x1="{_X0}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_X0 - 7}" y="{y + 4:.1f}" text-anchor="end">{label(tick)}</text>')
    for tick in _ticks(x_low, x_high, 6, integers=True):
        x = float(px(np.asarray(tick)))
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_Y0}" y2="{_Y0 + 4}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{_Y0 + 17}" text-anchor="middle">{label(tick)}</text>')
    parts.append(f'<text class="tick" x="{_X0 - 16}" y="{_Y0 + 17}" text-anchor="end">step</text>')
    for step in chart.marks:
        if x_low <= step <= x_high:
            x = float(px(np.asarray(step)))
            title = f"<title>resumed after step {int(step)}</title>"
            parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_Y0}" y2="{_Y1}">{title}</line>')
    if stacked is not None:
        steps, values, tops = stacked
        indices = downsample(values)
        for i, area in enumerate(chart.stack):
            bottom = tops[i - 1] if i else np.zeros_like(steps)
            outline = _band(px(steps[indices]), py(bottom[indices]), py(tops[i][indices]))
            parts.append(f'<path class="area f{area.colour}" d="{outline}"/>')
            hover.append(_hover(area, px(steps[indices]), steps[indices], values[i][indices]))
    for line in chart.lines:
        parts.extend(_draw_line(line, px, py, hover))
    for points in chart.points:
        parts.extend(_draw_points(points, px, py, hover))
    data = html.escape(json.dumps(hover, separators=(",", ":")), quote=True)
    name = html.escape(f"{chart.title}, {chart.unit} by step" if chart.unit else f"{chart.title} by step")
    return (
        f'<svg viewBox="0 0 {width} {_HEIGHT}" role="img" aria-label="{name}" data-series="{data}">{"".join(parts)}'
        f'<line class="cursor" y1="{_Y0}" y2="{_Y1}"/></svg>'
    )


def downsample(rows: Sequence[np.ndarray], limit: int = LIMIT) -> np.ndarray:
    """At most `limit` sorted indices into arrays of equal length: both ends, and each bucket's minimum and maximum.

    So a spike in any of the arrays stays visible, however long the run is.
    """
    n = len(rows[0])
    if n <= limit:
        return np.arange(n)
    buckets = max(1, (limit - 2) // (2 * len(rows)))
    indices = {0, n - 1}
    for part in np.array_split(np.arange(n), buckets):
        for row in rows:
            values = row[part]
            if np.isfinite(values).any():
                indices |= {int(part[np.nanargmin(values)]), int(part[np.nanargmax(values)])}
            else:
                indices.add(int(part[0]))  # a gap stays a gap
    return np.asarray(sorted(indices))


def moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` values, fewer at the ends. Ignores values that are not finite."""
    finite = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    low = np.maximum(np.arange(len(values)) - window // 2, 0)
    high = np.minimum(np.arange(len(values)) + window // 2 + 1, len(values))
    number = count[high] - count[low]
    return np.asarray(np.where(number > 0, (total[high] - total[low]) / np.maximum(number, 1), np.nan))


def label(value: float) -> str:
    """A short number for a tick: k and M for thousands and millions, powers of ten for very small numbers."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    if size < 1e-3:
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:.6g}"


def _draw_line(line: Line, px: _Scale, py: _Scale, hover: list[dict[str, object]]) -> list[str]:
    steps, values = line.series.steps, line.series.values
    if not line.series:
        return []
    parts = []
    indices = downsample([values] if line.half is None else [values, *_ends(line)])
    x, y = px(steps[indices]), py(values[indices])
    if line.half is not None:
        low, high = (np.clip(py(end), _Y1, _Y0) for end in _ends(line, indices))
        parts.append(f'<path class="band f{line.colour}" d="{_band(x, low, high)}"/>')
    window = max(_SMOOTHEST, len(values) // 15)
    smooth = line.smooth and len(values) >= SMOOTHED
    parts.append(f'<path class="line s{line.colour}{" thin" if smooth else ""}" d="{_path(x, y)}"/>')
    parts.extend(f'<circle class="f{line.colour}" cx="{x[i]:.1f}" cy="{y[i]:.1f}" r="2"/>' for i in _isolated(y))
    if smooth:
        mean = moving_mean(values, window)
        mean_indices = downsample([mean])
        drawn = _path(px(steps[mean_indices]), py(mean[mean_indices]))
        parts.append(f'<path class="line s{line.colour}" d="{drawn}"/>')
    hover.append(
        _hover(line, x, steps[indices], values[indices], line.half[indices] if line.half is not None else None)
    )
    return parts


def _draw_points(points: Points, px: _Scale, py: _Scale, hover: list[dict[str, object]]) -> list[str]:
    if not points.series:
        return []
    indices = downsample([points.series.values])
    steps, values = points.series.steps[indices], points.series.values[indices]
    x, y = px(steps), py(values)
    half = points.half[indices] if points.half is not None else None
    low, high = _ends(points, indices)
    parts = [f'<path class="line s{points.colour}" d="{_path(x, y)}"/>']
    for i in np.flatnonzero(np.isfinite(y)):
        if half is not None and np.isfinite(half[i]):
            ends = np.clip(py(np.asarray([low[i], high[i]])), _Y1, _Y0)
            parts.append(f'<path class="error s{points.colour}" d="M{x[i]:.1f} {ends[0]:.1f}V{ends[1]:.1f}"/>')
        parts.append(f'<circle class="point f{points.colour}" cx="{x[i]:.1f}" cy="{y[i]:.1f}" r="4"/>')
    hover.append(_hover(points, x, steps, values, half))
    return parts


def _hover(
    source: Line | Points, x: np.ndarray, steps: np.ndarray, values: np.ndarray, half: np.ndarray | None = None
) -> dict[str, object]:
    shown = np.flatnonzero(np.isfinite(values))
    data: dict[str, object] = {
        "name": source.name,
        "colour": source.colour,
        "x": [round(float(v), 1) for v in x[shown]],
        "step": [int(v) for v in steps[shown]],
        "y": [float(f"{v:.4g}") for v in values[shown]],
    }
    if half is not None:
        data["half"] = [float(f"{v:.2g}") if math.isfinite(v) else None for v in half[shown]]
    return data


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """An SVG path that is interrupted where y is not finite."""
    parts, pen_up = [], True
    for a, b in zip(x, y, strict=True):
        if math.isfinite(b):
            parts.append(f"{'M' if pen_up else 'L'}{a:.1f} {b:.1f}")
        pen_up = not math.isfinite(b)
    return "".join(parts)


def _isolated(y: np.ndarray) -> list[int]:
    """Indices of points without a neighbour, which a line would not show."""
    finite = np.concatenate([[False], np.isfinite(y), [False]])
    return [int(i) for i in np.flatnonzero(finite[1:-1] & ~finite[:-2] & ~finite[2:])]


def _band(x: np.ndarray, low: np.ndarray, high: np.ndarray) -> str:
    good = np.isfinite(low) & np.isfinite(high)
    shapes = []
    for run in np.split(np.arange(len(x)), np.flatnonzero(~good)):
        part = run[good[run]]
        if len(part):
            upper = [f"{x[i]:.1f} {high[i]:.1f}" for i in part]
            lower = [f"{x[i]:.1f} {low[i]:.1f}" for i in part[::-1]]
            shapes.append(f"M{'L'.join(upper + lower)}Z")
    return "".join(shapes)


def _stacked(stack: Sequence[Line]) -> tuple[np.ndarray, list[np.ndarray], np.ndarray] | None:
    """(steps (n,), values of each area, their tops). A step that an area lacks counts as 0."""
    if not stack:
        return None
    steps = np.unique(np.concatenate([area.series.steps for area in stack]))
    values = []
    for area in stack:
        row = np.zeros(len(steps))
        row[np.searchsorted(steps, area.series.steps)] = np.nan_to_num(area.series.values)
        values.append(row)
    return steps, values, np.cumsum(values, axis=0)


def _x_range(steps: Sequence[np.ndarray]) -> tuple[float, float]:
    all_steps = np.concatenate([s for s in steps if len(s)] or [np.zeros(1)])
    low, high = float(all_steps.min()), float(all_steps.max())
    return (low, high) if high > low else (low - 1, high + 1)


def _y_axis(
    chart: Chart, stacked: tuple[np.ndarray, list[np.ndarray], np.ndarray] | None
) -> tuple[float, float, list[float]]:
    arrays = [np.zeros(1), stacked[2][-1]] if stacked is not None else []
    for line in [] if stacked is not None else chart.drawn:
        arrays += _ends(line)
    values = np.concatenate(arrays) if arrays else np.zeros(1)
    values = values[np.isfinite(values)] if np.isfinite(values).any() else np.zeros(1)
    low, high = float(values.min()), float(values.max())
    if 0 < low < 0.6 * high:
        low = 0.0
    if chart.floor is not None:
        low = chart.floor
    if high <= low:
        pad = abs(high) * 0.1 or 1.0
        low, high = (low if low == chart.floor else low - pad), high + pad
    pad = 0.05 * (high - low)
    low, high = (low if low in (0.0, chart.floor) else low - pad), high + pad
    return low, high, [float(f"{t:.12g}") for t in _ticks(low, high, 5)]


def _ticks(low: float, high: float, count: int, *, integers: bool = False) -> list[float]:
    """About `count` round numbers from low to high."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    spacing = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    if integers:
        spacing = max(1.0, float(round(spacing)))
    first = math.ceil(low / spacing - 1e-9)
    return [i * spacing for i in range(first, math.floor(high / spacing + 1e-9) + 1)]
