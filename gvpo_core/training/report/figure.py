"""Draws the reward curve of a run as a PNG. Needs matplotlib: the extra "demo"."""

from pathlib import Path

import numpy as np

from gvpo_core.training.report.charts import moving_mean
from gvpo_core.training.report.read import read_run


def reward_curve_png(run: Path, out: Path) -> Path:
    """Draws training reward with its 95 % band and held-out reward with error bars; returns `out`.

    Raises: ImportError: no matplotlib. FileNotFoundError: not a run folder. ValueError: no step with a reward.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError('the reward curve needs matplotlib: pip install "gvpo[demo]"') from e
    data = read_run(run)
    reward, limits = data.series("reward/mean"), data.reward_range()
    held_out = data.series("eval/reward", kind="eval")
    if not reward:
        raise ValueError(f"{run / 'metrics.jsonl'} has no step with a reward; run at least one step")
    figure = Figure(figsize=(7.2, 3.8), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)  # our own canvas, so matplotlib chooses no global backend and opens no window
    axes = figure.add_subplot()
    halves = np.nan_to_num(data.along(reward, "reward/half_width"))
    window = max(1, len(reward.values) // 15) | 1  # odd: moving_mean is centred
    smooth, place = moving_mean(reward.values, window), np.arange(len(halves))
    averaged = np.minimum(place + window // 2 + 1, len(halves)) - np.maximum(place - window // 2, 0)
    band = np.sqrt(moving_mean(halves**2, window) / averaged)  # half-width of the mean that the line shows
    low, high = np.clip(smooth - band, *limits), np.clip(smooth + band, *limits)
    axes.fill_between(reward.steps, low, high, color="#2563c9", alpha=0.14, linewidth=0)
    axes.plot(reward.steps, reward.values, color="#2563c9", alpha=0.35, linewidth=0.8)
    name = f"training, mean of {window} steps" if window > 1 else "training"
    axes.plot(reward.steps, smooth, color="#2563c9", linewidth=1.8, label=name)
    if held_out:
        half = np.nan_to_num(data.along(held_out, "eval/half_width", kind="eval"))
        ends = np.clip([held_out.values - half, held_out.values + half], *limits)
        errors = np.abs(ends - held_out.values)
        prompts = data.evaluations[-1].get("eval/prompts")
        axes.errorbar(
            held_out.steps, held_out.values, errors, color="#d9580d", fmt="o-", markersize=5, linewidth=1.4,
            elinewidth=1.2, capsize=3, label=f"held out, {prompts} prompts" if prompts else "held out", zorder=3,
        )  # fmt: skip
    axes.set_xlabel("step")
    axes.set_ylabel("mean reward")
    axes.grid(axis="y", color="#e6e6e2", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="best", title="bars and band: 95 % intervals", title_fontsize="small")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Software": None})
    return out
