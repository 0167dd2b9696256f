"""The charts of a report, their order, and how to read each."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gvpo_core.training.config.check import RESERVED_REWARD_NAMES
from gvpo_core.training.report.charts import SMOOTHED, Chart, Line, Points
from gvpo_core.training.report.read import Run, Series
from gvpo_core.training.watch.ending import ENDS
from gvpo_core.training.watch.metric_names import PHASES

_NONE = Chart("", "", "")  # draws nothing
RESULT = "Is it getting better?"
"""Title of the section whose charts show the result."""


def sections(run: Run) -> list[tuple[str, list[Chart]]]:
    """The charts by section title, in order. Charts without a finite number are left out."""
    marks = [e["step"] for e in run.events if e.get("event") == "resume"]

    def line(name: str, key: str, colour: int, *, kind: str = "train", smooth: bool = True) -> Line:
        return Line(name, run.series(key, kind=kind), colour, smooth=smooth)

    def chart(title: str, unit: str, reading: str, *drawn: Line | Points, **more: Any) -> Chart:
        lines = [x for x in drawn if isinstance(x, Line) and x.series]
        points = [x for x in drawn if isinstance(x, Points) and x.series]
        return Chart(title, unit, reading, lines, points, marks=marks, **more)

    def stack(title: str, unit: str, reading: str, *areas: Line, **more: Any) -> Chart:
        return Chart(title, unit, reading, stack=[a for a in areas if a.series], marks=marks, **more)

    reward, held_out = run.series("reward/mean"), run.series("eval/reward", kind="eval")
    limits = run.reward_range()
    latencies = run.keys("reward_seconds/")
    parts = [key for key in run.keys("reward/") if key.removeprefix("reward/") not in _TOTALS]
    errors, episodes = run.keys("reward_errors/"), run.keys("episodes/")
    result = [
        (
            RESULT,
            [
                chart(
                    "Reward",
                    "",
                    _how_to_read(reward, held_out),
                    Line("training", reward, 1, run.along(reward, "reward/half_width"), True, limits),
                    Points("held-out", held_out, 2, run.along(held_out, "eval/half_width", kind="eval"), limits),
                    wide=len(parts) < 2,
                ),
                chart(
                    "Each reward",
                    "unweighted",
                    "If one rises while another falls, adjust their weights.",
                    *(
                        line(key.removeprefix("reward/"), key, 1 + i % 6)
                        for i, key in enumerate(parts)
                        if len(parts) > 1
                    ),
                ),
            ],
        ),
        (
            "What the objective sees",
            [
                chart(
                    "Loss in its three parts",
                    "reward²",
                    "Loss = implicit + reward variance - 2 x covariance. It falls as beta s approaches the reward.",
                    line("loss", "loss", 1),
                    line("implicit variance", "loss/implicit_variance", 3),
                    line("reward variance", "loss/reward_variance", 2),
                    line("covariance", "loss/covariance", 4),
                ),
                chart(
                    "Regret",
                    "reward",
                    "Regularised reward still to gain: beta KL to the optimum. Zero is the optimum.",
                    line("regret", "regret/series", 2),
                ),
                chart(
                    "Spread of rewards inside a group",
                    "standard deviation",
                    "The learning signal. Near zero, the responses of a group score alike, and a step changes little.",
                    line("spread", "reward/spread", 3),
                    floor=0.0,
                ),
                stack(
                    "Groups by what they teach",
                    "groups",
                    "Only mixed groups carry the reward's signal. All right: too easy. All wrong: too hard.",
                    Line("all right", run.series("groups/all_best"), 3),
                    Line("all wrong", run.series("groups/all_worst"), 2),
                    Line("all equal", _rest(run, "groups/all_equal", "groups/all_best", "groups/all_worst"), 5),
                    Line("unscored", run.series("groups/dropped_unscored"), 6),
                    Line("mixed", _rest(run, "groups/counted", "groups/all_equal"), 1),
                ),
            ],
        ),
        (
            "How far has the policy moved?",
            [
                chart(
                    "KL to the reference",
                    "nats a response",
                    "A slow rise beside a rising reward is normal. A jump is not: lower the learning rate.",
                    line("kl", "kl", 1),
                ),
                chart(
                    "Entropy",
                    "nats a token",
                    "How varied the samples are. At zero, all responses to a prompt are equal.",
                    line("entropy", "entropy", 4),
                    floor=0.0,
                ),
                chart(
                    "Gradient norm",
                    "before clipping",
                    "Spikes together with jumps in KL mean that the learning rate is too high.",
                    line("gradient norm", "gradient_norm", 1),
                    floor=0.0,
                ),
                chart(
                    "Sampler and policy",
                    "nats a token",
                    "How far their log-probabilities differ. The gap grows if the sampler keeps old weights.",
                    line("mean", "sampler/gap", 1),
                    line("worst response", "sampler/gap/max", 2),
                    floor=0.0,
                ),
                chart(
                    "Age of the sampler's weights",
                    "steps",
                    "Steps that the policy has taken since these weights.",
                    line("mean", "sampler/staleness", 1, smooth=False),
                    line("oldest", "sampler/staleness/max", 2, smooth=False),
                    floor=0.0,
                ),
                chart(
                    "Learning rate",
                    "",
                    "The value of each step, after warmup and schedule.",
                    line("learning rate", "learning_rate", 3, smooth=False),
                    floor=0.0,
                ),
            ],
        ),
        (
            "Episodes",
            [
                stack(
                    "How episodes end",
                    "share",
                    "Ended: by the environment, or by a message without a tool call. Cut episodes score cut_reward.",
                    *(
                        Line(ENDS[end], run.series(f"episodes/{end}"), colour)
                        for end, colour in (("done", 3), ("turns", 2), ("tokens", 5), ("failed", 6))
                    ),
                ),
                chart(
                    "Held-out episodes that did not end",
                    "share",
                    "They hide what the model can do: raise the limit that cuts them, or reward short episodes.",
                    *(
                        Points(ENDS[end], run.series(f"eval/episodes/{end}", kind="eval"), colour)
                        for end, colour in (("turns", 2), ("tokens", 5), ("failed", 6))
                    ),
                    floor=0.0,
                ),
                chart(
                    "Turns",
                    "an episode",
                    "Turns of the policy. A climb to environment.max_turns without more reward is a loop.",
                    line("mean", "turns/mean", 1),
                    line("most", "turns/max", 2),
                    floor=0.0,
                ),
                chart(
                    "Tool calls",
                    "an episode",
                    "Includes calls that could not be read.",
                    line("calls", "tools/calls", 1),
                    floor=0.0,
                ),
                chart(
                    "Failures and loops",
                    "share",
                    "Failed: tool calls, unreadable or raised. Repeated: episodes that repeat a message or a call.",
                    line("failed tool calls", "tools/failed", 2),
                    line("repeated", "episodes/repeated", 4),
                    floor=0.0,
                ),
                chart(
                    "Time waited",
                    "seconds a step",
                    "Wait of the slowest episode for tools and environments. It is part of the time to generate.",
                    line("waited", "episodes/seconds", 5),
                    floor=0.0,
                ),
                chart(
                    "Tokens",
                    "an episode",
                    "The policy's own tokens, and all tokens of an episode: the context that must fit.",
                    line("own", "length/mean", 1),
                    line("with the environment's", "length/context", 5),
                    floor=0.0,
                )
                if episodes
                else _NONE,
            ],
        ),
        (
            "Responses",
            [
                chart(
                    "Length",
                    "tokens",
                    "Right and wrong: finished responses with the step's highest and lowest reward. Cut responses "
                    "are not among the wrong ones, whose mean length they would raise.",
                    line("all", "length/mean", 1),
                    line("right", "length/best", 3),
                    line("wrong", "length/worst", 2),
                    line("cut", "length/truncated", 6),
                    floor=0.0,
                ),
                chart(
                    "Cut at the token limit",
                    "share",
                    "A cut answer is usually a wrong one: high values hide what the model can do.",
                    line("training", "truncated", 2),
                    Points("held-out", run.series("eval/truncated", kind="eval"), 1),
                    floor=0.0,
                )
                if not episodes
                else _NONE,
                stack(
                    "Responses on which a reward failed",
                    "responses",
                    _failures(run, errors),
                    *(
                        Line(key.removeprefix("reward_errors/").replace("/", ": "), run.series(key), 1 + i % 6)
                        for i, key in enumerate(errors)
                        if np.nansum(run.series(key).values) > 0
                    ),
                ),
                chart(
                    "Time that a reward takes",
                    "seconds a step",
                    "For all responses. The slowest reward sets the pace; near its limit, it begins to lose responses.",
                    *(line(key.removeprefix("reward_seconds/"), key, 1 + i % 6) for i, key in enumerate(latencies)),
                    floor=0.0,
                ),
            ],
        ),
        (
            "Time and memory",
            [
                stack(
                    "Where the time goes",
                    "seconds a step",
                    "Optimise the phase with the tallest band first.",
                    *(
                        Line(phase, run.series(f"seconds/{phase}"), colour)
                        for phase, colour in zip((*PHASES[:4], "other"), (1, 5, 3, 2, 6), strict=True)
                    ),
                    wide=True,
                ),
                chart(
                    "Tokens sampled",
                    "tokens a second",
                    "Over generation, rewards, scoring and update together.",
                    line("tokens/s", "tokens_per_second", 1),
                    floor=0.0,
                ),
                chart(
                    "Peak memory",
                    "GiB",
                    "Of the device with the highest peak, or of the process on CPU. It should be flat.",
                    Line("memory", _scaled(run.series("memory/peak"), 2.0**-30), 4),
                    floor=0.0,
                ),
            ],
        ),
    ]
    kept = [(title, [c for c in charts if c]) for title, charts in result]
    return [(title, charts) for title, charts in kept if charts]


_TOTALS = RESERVED_REWARD_NAMES


def _how_to_read(training: Series, held_out: Series) -> str:
    lines = "The thin line is one training step, the thick one the mean of the steps around it."
    return " ".join(
        sentence
        for sentence in (
            "Points are held-out prompts: judge the run by them." if held_out else "",
            lines if len(training.values) >= SMOOTHED else "The line is the training prompts of each step.",
            "Bands and bars are 95 % intervals.",
        )
        if sentence
    )


def _failures(run: Run, keys: Sequence[str]) -> str:
    names = dict.fromkeys(key.removeprefix("reward_errors/").rpartition("/")[0] for key in keys)
    values = [(name, value) for name in names if (value := run.failure_value(name)) is not None]
    if not values:
        return "By reward and cause. These responses leave their group; they do not count as zero."
    counted = ", ".join(f"{value:g} ({name})" for name, value in values)
    return f"By reward and cause. Errors and timeouts count as the failure_value: {counted}; others leave their group."


def _rest(run: Run, total: str, *parts: str) -> Series:
    series = run.series(total)
    taken = sum((np.nan_to_num(run.along(series, part)) for part in parts), np.zeros(len(series.values)))
    return Series(series.steps, np.maximum(series.values - taken, 0))


def _scaled(series: Series, factor: float) -> Series:
    return Series(series.steps, series.values * factor)
