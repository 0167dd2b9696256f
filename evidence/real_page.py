"""Results of claim 9: writes docs/evidence_real.md and its picture from the saved results."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evidence.page import table
from evidence.real_plan import (
    BETA,
    HELD_OUT,
    METHODS,
    PROMPTS,
    RATES,
    RESPONSES,
    SEEDS,
    STALENESS,
    STEPS,
    TASKS,
    TUNING_SEED,
    TUNING_STEPS,
    VALIDATION,
    Run,
    final_runs,
    tuning_runs,
)
from gvpo_core.training.intervals import mean_half_width

Cell = tuple[str, int, str]  # task, staleness, objective


def accuracies(runs: Sequence[Run], results: dict[str, dict[str, Any]]) -> dict[Cell, list[float]]:
    """Returns the accuracies after training of the finished seeds."""
    by_cell: dict[Cell, list[float]] = {}
    for run in runs:
        if run.name in results:
            by_cell.setdefault((run.task, run.staleness, run.method), []).append(results[run.name]["after"])
    return by_cell


def means(by_cell: dict[Cell, list[float]]) -> str:
    """Returns a table of means over the seeds with 95 % intervals (Student's t)."""

    def cell(values: list[float]) -> str:
        if not values:
            return ""
        seeds = "" if len(values) == len(SEEDS) else f" ({len(values)} of {len(SEEDS)} seeds)"
        half = f" +- {mean_half_width(np.array(values)):.3f}" if len(values) > 1 else ""
        return f"{np.mean(values):.3f}{half}{seeds}"

    rows = [
        [f"{task}, {age} steps old", *(cell(by_cell.get((task, age, m), [])) for m in METHODS)]
        for task in TASKS
        for age in STALENESS
    ]
    return table(["", *METHODS], rows)


def page(results: dict[str, dict[str, Any]], elsewhere: dict[str, dict[str, Any]]) -> str:
    """Returns the text of docs/evidence_real.md for the finished runs.

    Args:
      elsewhere: results of the same runs on another machine.
    """
    runs = final_runs(results)
    here, there = accuracies(runs, results), accuracies(runs, elsewhere)
    differences = []
    for task in TASKS:
        for age in STALENESS:
            by_method = {method: here.get((task, age, method), []) for method in METHODS}
            for method in METHODS[1:]:
                if len(by_method["gvpo"]) == len(by_method[method]) == len(SEEDS):
                    by_seed = np.array(by_method["gvpo"]) - np.array(by_method[method])
                    half = mean_half_width(by_seed)
                    verdict = "significant" if abs(by_seed.mean()) > half else "not significant"
                    verdict = verdict if by_seed.any() else "the same runs"
                    where = f"{task}, {age} steps old: gvpo - {method}"
                    differences.append([where, f"{by_seed.mean():+.3f} +- {half:.3f}", verdict])
    done = sum(len(values) for values in here.values())
    total = len(TASKS) * len(STALENESS) * len(METHODS) * len(SEEDS)
    tuning = sum(run.name in results for run in tuning_runs())
    seeds, rates = ", ".join(map(str, SEEDS)), ", ".join(f"{r:g}" for r in RATES)
    chosen = {(run.task, run.method): f"{run.rate:g}" for run in final_runs(results)}
    tuned = table(["", *METHODS], [[task, *(chosen.get((task, m), "") for m in METHODS)] for task in TASKS])
    before, before_there = (
        ", ".join(f"{task} {accuracy:.3f}" for task, accuracy in _before(runs, source).items()) or "not measured yet"
        for source in (results, elsewhere)
    )
    hours = sum(result["seconds"] for result in results.values()) / 3600
    return f"""# Evidence: a real model

`nox -s paper -- real` trains SmolLM2-135M-Instruct on two reasoning-gym tasks: {STEPS} steps of {PROMPTS} prompts x
{RESPONSES} responses, beta {BETA}, products in bfloat16, seeds {seeds}. It saves each finished run in
[real.jsonl](evidence/real.jsonl) and resumes if it was stopped. **{tuning} of {len(tuning_runs())} tuning runs
and {done} of {total} reported runs are
finished**: {hours:.1f} hours of runs on a CPU, several at the same time. `python -m evidence real --list` lists them.

The learning rate of each task and objective is the best of {rates} by accuracy on {VALIDATION} validation
problems after {TUNING_STEPS} steps, on-policy, with seed {TUNING_SEED}:

{tuned}

Accuracy of the most likely answer on {HELD_OUT} held-out problems, mean over the seeds with 95 % interval (Student's t
over seeds). Before training: {before}.

{means(here)}

![Held-out accuracy of each seed](evidence/real.png)

Difference by seed with 95 % interval over {len(SEEDS)} seeds, not corrected for multiple comparisons:

{table(["", "difference", ""], differences)}

"4 steps old": the policy of four steps ago draws the responses, at the rate tuned on-policy. The ratio of grpo and rloo
is relative to the policy at the start of the step, so it is 1 here. Neither gets the log-probabilities at sampling.
With this ratio and the KL penalty in the reward, rloo has the coefficients of gvpo ([Objectives](objectives.md)), so
at the same learning rate their runs are identical.
{SHOWS if done == total else ""}
## The same runs on a GPU

One H200 (PyTorch 2.11.0) did the same runs with the same command, rates and seeds, ten at a time in three minutes. A
GPU adds numbers in another order, so samples differ from the first steps on. {sum(len(v) for v in there.values())}
of {total} results are in [real_h200.jsonl](evidence/real_h200.jsonl), read from the logs of the runs. The other
results were lost. Before training: {before_there}.

{means(there)}
"""


SHOWS = """
Shows: every method learns basic_arithmetic, and no difference there exceeds its interval. On gcd with old responses
gvpo ends above grpo with every seed, each at its own tuned rate. This is the only difference that exceeds its interval.
One seed of gvpo on gcd with fresh responses gains nothing at its rate: tuning with one seed and 12 steps chose the
highest of the three rates.

Does not show: that gvpo is better than reject sampling, or that the difference on gcd holds elsewhere: on the GPU
(below) one seed of gvpo with old responses ends below its start. With three seeds of 24 steps, most intervals are wider
than the differences.
"""


def holds(results: dict[str, dict[str, Any]], elsewhere: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """Returns each statement of SHOWS -> whether these results support it."""
    runs = final_runs(results)
    before, before_there = _before(runs, results), _before(runs, elsewhere)
    here, there = accuracies(runs, results), accuracies(runs, elsewhere)
    beyond = []
    for task in TASKS:
        for age in STALENESS:
            for method in METHODS[1:]:
                apart = np.array(here[task, age, "gvpo"]) - np.array(here[task, age, method])
                if abs(apart.mean()) > mean_half_width(apart):
                    beyond.append((task, age, method))
    sums, gcd = "basic_arithmetic", "gcd"
    rates = {(run.task, run.method): run.rate for run in runs}
    return {
        "every method learns basic_arithmetic": all(
            min(here[sums, age, method]) > before[sums] for age in STALENESS for method in METHODS
        ),
        "only one difference exceeds its interval": beyond == [(gcd, 4, "grpo")],
        "gvpo ends above grpo on gcd with old responses": min(here[gcd, 4, "gvpo"]) > max(here[gcd, 4, "grpo"]),
        "one seed of gvpo gains nothing on gcd": sum(y < before[gcd] + 0.01 for y in here[gcd, 0, "gvpo"]) == 1,
        "tuning chose the highest rate": rates[gcd, "gvpo"] == max(RATES),
        "on the GPU one seed of gvpo ends below its start": sum(y < before_there[gcd] for y in there[gcd, 4, "gvpo"])
        == 1,
    }


def draw(results: dict[str, dict[str, Any]], elsewhere: dict[str, dict[str, Any]], path: Path) -> None:
    """Draws one panel per task: the accuracy of each seed, the means, and the accuracy before training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = final_runs(results)
    before, here, there = _before(runs, results), accuracies(runs, results), accuracies(runs, elsewhere)
    figure, panels = pyplot.subplots(1, len(TASKS), figsize=(9, 3.4), sharey=True, layout="constrained")
    for axes, task in zip(panels, TASKS, strict=True):
        cells = [(age, method) for age in STALENESS for method in METHODS]
        if task in before:
            axes.axhline(before[task], color="grey", linestyle="--", label="before training, CPU")
        for name, of, shift, style in (("CPU", here, -0.12, "o"), ("one H200", there, 0.12, "s")):
            points = [(i + shift, y) for i, (age, m) in enumerate(cells) for y in of.get((task, age, m), [])]
            mean = [(i + shift, np.mean(of[task, age, m])) for i, (age, m) in enumerate(cells) if (task, age, m) in of]
            (dots,) = axes.plot(*zip(*points, strict=True), style, markersize=4, alpha=0.5) if points else (None,)
            if dots is not None:
                x, y = zip(*mean, strict=True)
                axes.plot(x, y, "_", markersize=13, markeredgewidth=2, color=dots.get_color(), label=f"{name}, mean")
        axes.set_xticks(range(len(cells)), [method.replace("_", "\n") for _, method in cells], fontsize=7)
        for i, age in enumerate(STALENESS):
            axes.text((i + 0.5) / len(STALENESS), 0.02, f"{age} steps old", ha="center", transform=axes.transAxes)
        axes.axvline(len(METHODS) - 0.5, color="lightgrey", linewidth=1)
        axes.set(title=task, ylim=(0, 0.8))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("held-out accuracy")
    panels[0].legend(fontsize=8, loc="upper left")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _before(runs: Sequence[Run], results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Returns task -> held-out accuracy before training, for tasks with a reported run."""
    return {run.task: results[run.name]["before"] for run in runs if run.name in results}
