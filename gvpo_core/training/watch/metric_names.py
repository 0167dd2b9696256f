"""The keys of metrics.jsonl: the dictionary that docs/metrics.md is made of, and what is not in it."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from gvpo_core.training.watch.alerts import ALERTS

PHASES = ("generate", "reward", "score", "update", "evaluate", "checkpoint")
LOSSES = ("eval/loss", "eval/accuracy", "eval/nll", "eval/teacher_kl")  # of an evaluation, beside its reward


class Metric(NamedTuple):
    """What a key of metrics.jsonl means."""

    unit: str
    meaning: str


METRICS: dict[str, Metric] = {
    "kind": Metric("text", "train: one step; eval: one evaluation; event: something that happened, in `event`."),
    "step": Metric("steps", "Rollouts done, this one included. An evaluation at step n uses the policy after n."),
    "time": Metric("seconds", "Unix time at which the line was written."),
    "event": Metric(
        "text",
        "Kind of event: resume, stop, failed (what ended the run), early (evaluation.patience), back (--from-step), "
        "reset (of a used policy), warning.",
    ),
    "message": Metric("text", "The event in words."),
    "reward/mean": Metric(
        "reward", "Mean total reward over the step's scored responses; of a mixture, over those drawn for the step."
    ),
    "reward/half_width": Metric(
        "reward", "Half the 95 % interval of reward/mean: Student's t over the group means; absent with one group."
    ),
    "reward/trend": Metric(
        "reward", "reward/mean minus the mean of the up to 10 steps before; absent in the first step."
    ),
    "reward/spread": Metric("reward", "Standard deviation (k - 1) within a group, mean over counted groups."),
    "reward/min": Metric("reward", "Lowest total reward of the step."),
    "reward/max": Metric("reward", "Highest total reward of the step."),
    "reward/<name>": Metric("reward", "Mean of one reward, unweighted, over the responses it scored."),
    "reward_errors/<name>/<kind>": Metric(
        "responses",
        "Responses on which one reward failed: error (raised), timeout, none (None or NaN). They leave their group; "
        "where the reward has a failure_value, errors and timeouts count as that instead.",
    ),
    "reward_seconds/<name>": Metric("seconds", "Time that one reward took, all responses; of the slowest rank."),
    "loss": Metric("reward^2", "GVPO loss (Eq. 16) before the update, mean over counted groups."),
    "loss/implicit_variance": Metric("reward^2", "Variance of the implicit rewards beta s within groups (Eq. 17)."),
    "loss/reward_variance": Metric("reward^2", "Variance of the rewards within groups (Eq. 17)."),
    "loss/covariance": Metric(
        "reward^2", "Covariance of implicit and actual reward within groups (Eq. 17); loss = sum - 2 x this."
    ),
    "regret/second_order": Metric(
        "reward", "loss / (2 beta): regularised reward still to be gained, to second order. Absent when beta = 0."
    ),
    "regret/series": Metric(
        "reward",
        "beta log mean exp(w / beta): the same to all orders, low by O(1/k). Absent when beta = 0.",
    ),
    "kl": Metric(
        "nats/response",
        "Mean of s = log pi_theta - log pi_ref over counted responses. It estimates KL(pi_theta || pi_ref) (k1) only "
        "where the responses were sampled from pi_theta at temperature 1; elsewhere it is the mean log-ratio.",
    ),
    "entropy": Metric(
        "nats/token",
        "Minus the mean log-probability of a sampled token, over the responses that the policy scored: an estimate of "
        "the entropy, under the same condition.",
    ),
    "log_ratio": Metric("nats/response", "In the place of kl where the responses were recorded."),
    "nll": Metric(
        "nats/token",
        "In the place of entropy where the responses were recorded: minus their mean log-probability.",
    ),
    "gradient_norm": Metric("", "Norm of the gradient before clipping, mean over the step's updates."),
    "gradient_norm/max": Metric("", "Largest of them."),
    "learning_rate": Metric("", "Of the step's last update."),
    "length/mean": Metric("tokens", "Mean response length, end tokens included; of episodes, the policy's own tokens."),
    "length/max": Metric("tokens", "Longest response."),
    "length/best": Metric(
        "tokens",
        "Mean length of the finished responses with the step's highest reward (right ones, where rewards are 0 and 1); "
        "absent without one, and when all rewards are equal.",
    ),
    "length/worst": Metric("tokens", "Mean length of the finished ones with its lowest reward (wrong); likewise."),
    "length/truncated": Metric("tokens", "Mean length of the responses cut at the token limit; absent without one."),
    "truncated": Metric("share", "Responses cut at the token limit; of episodes, all but episodes/done."),
    "responses/total": Metric("responses", "Responses of the step."),
    "responses/lost": Metric(
        "responses",
        "Responses that the sampler did not give, or whose episode failed at reset; their groups are smaller.",
    ),
    "sampler/gap": Metric(
        "nats/token", "Mean difference between the sampler's and the policy's log-probability; absent if unknown."
    ),
    "sampler/gap/max": Metric("nats/token", "The largest such difference of a response in the step."),
    "sampler/retokenized": Metric(
        "responses",
        "Texts of the sampler that have another number of tokens here than it counted: at least so many were sampled "
        "as other tokens. Absent where it gives token ids.",
    ),
    "sampler/staleness": Metric(
        "steps", "Mean number of steps that the policy took since the sampler's weights; absent if unknown."
    ),
    "sampler/staleness/max": Metric("steps", "The largest of them in the step."),
    "turns/mean": Metric(
        "turns", "Turns of the policy in an episode; this and the next ones with [environment] alone."
    ),
    "turns/max": Metric("turns", "The most of them."),
    "tools/calls": Metric("calls", "Mean number of tool calls in an episode, unreadable ones included."),
    "tools/failed": Metric("share", "Tool calls that could not be read, or whose tool raised; absent without a call."),
    "episodes/done": Metric("share", "Episodes that the environment ended, or the first message without a tool call."),
    "episodes/turns": Metric("share", "Episodes cut at environment.max_turns."),
    "episodes/tokens": Metric("share", "Episodes cut at rollout.max_tokens or environment.turn_tokens."),
    "episodes/failed": Metric("share", "Episodes without a score because the environment raised, died or timed out."),
    "episodes/repeated": Metric("share", "Episodes in which the policy repeated a message or a tool call: loops."),
    "episodes/segments": Metric(
        "segments", "Contexts of an episode: 1, and one more each time that the chat template rewrote earlier turns."
    ),
    "episodes/prefilled": Metric(
        "tokens",
        "Tokens before the step's turns that were computed; this and the next one where the policy draws the turns and"
        " keeps keys and values between them.",
    ),
    "episodes/reused": Metric("tokens", "Tokens before turns whose keys and values were kept from earlier turns."),
    "episodes/seconds": Metric("seconds", "Time that the slowest episode waited for tools and environments."),
    "length/context": Metric(
        "tokens", "Mean length of an episode after the prompt, the environment's tokens included."
    ),
    "responses/unscored": Metric("responses", "Responses without a total reward; they leave their group."),
    "responses/left_out": Metric(
        "responses",
        "Scored responses that leave the update: cut ones (rollout.truncated) and those of equal groups "
        "(rollout.equal). Absent without one.",
    ),
    "groups/total": Metric("groups", "Groups of the step."),
    "groups/counted": Metric(
        "groups", "Groups with at least two scored responses: those in the loss, except groups/left_out."
    ),
    "groups/left_out": Metric("groups", "Counted groups that leave the update (responses/left_out)."),
    "groups/redrawn": Metric("groups", "Groups drawn to replace equal ones (rollout.equal = redraw)."),
    "groups/revisited": Metric("groups", "Groups of prompts that were seen before (data.curriculum)."),
    "groups/recorded": Metric("groups", "Groups of data.recorded in the step."),
    "groups/replayed": Metric("groups", "Past groups in the step ([replay])."),
    "teacher/unread": Metric(
        "responses", "Responses that the teacher cannot read or hold; they leave their group (objective.reference)."
    ),
    "teacher/lost": Metric("responses", "Responses whose score did not come from teacher.url; they leave their group."),
    "replay/age": Metric("steps", "Mean age of the replayed groups; absent without one."),
    "replay/kept": Metric("groups", "Groups kept for replay after the step."),
    "groups/dropped_unscored": Metric("groups", "Groups with fewer than two scored responses."),
    "groups/all_equal": Metric("groups", "Dead groups: counted, with all rewards equal. Only beta moves them."),
    "groups/all_best": Metric("groups", "Dead groups at the highest reward seen so far: too easy."),
    "groups/all_worst": Metric("groups", "Dead groups at the lowest reward seen so far: too hard."),
    "groups/skipped": Metric(
        "groups", "Groups of recorded data that no step takes: too few scored responses. Absent without one."
    ),
    "machine/reference_cached": Metric("responses", "Recorded responses of the step whose reference score was known."),
    "machine/reference_scored": Metric("responses", "Recorded responses of the step that the reference had to score."),
    "tokens/sampled": Metric("tokens", "Response tokens drawn in the step, all ranks; 0 where they were recorded."),
    "tokens/computed": Metric("tokens", "Tokens through forward passes of the update, prompt and padding included."),
    "tokens_per_second": Metric(
        "tokens/s", "Response tokens of the step by the seconds of generate, reward, score and update."
    ),
    "seconds/<phase>": Metric("seconds", f"Time in one phase: {', '.join(PHASES)}; other: the rest of the step."),
    "seconds/step": Metric("seconds", "Time of the whole step."),
    "share/<phase>": Metric("share", "seconds/<phase> by seconds/step."),
    "memory/peak": Metric("bytes", "Peak memory of the fullest rank: of its device, or of the process on CPU."),
    "verdict": Metric(
        "text", "OK, WATCH or BAD: the worst level of `alerts`. The same in a resumed run. In an event `failed` too."
    ),
    "alerts": Metric("list", "What is wrong with the training: key, level, seen (in numbers), advice."),
    "machine/verdict": Metric("text", "OK or WATCH: the worst level of `machine/alerts`."),
    "machine/alerts": Metric("list", "What is wrong with speed or memory, as `alerts`; equal runs may differ in it."),
    "policy/<detail>": Metric("", "A backend's own number, as its `Update.details` gives it."),
    "eval/reward": Metric(
        "reward", "Mean total reward on held-out prompts: the mean over prompts of each prompt's mean."
    ),
    "eval/half_width": Metric(
        "reward",
        "Half the 95 % interval of eval/reward over prompts: Student's t, or Wilson's larger side where every prompt "
        "scores 0 or 1; absent with one prompt.",
    ),
    "eval/reward/<name>": Metric("reward", "Mean of one reward on held-out prompts, unweighted."),
    "eval/length": Metric("tokens", "Mean length of held-out responses."),
    "eval/truncated": Metric(
        "share", "Held-out responses cut at the token limit; of episodes, at the limit of turns too, and failed ones."
    ),
    "eval/episodes/done": Metric("share", "As episodes/done, of held-out episodes; likewise the next three."),
    "eval/episodes/turns": Metric("share", "Held-out episodes cut at environment.max_turns."),
    "eval/episodes/tokens": Metric("share", "Held-out episodes cut at rollout.max_tokens or environment.turn_tokens."),
    "eval/episodes/failed": Metric("share", "Held-out episodes without a score, as the environment failed."),
    "eval/loss": Metric(
        "",
        "Loss of the objective on held-out recorded groups: Eq. 16 of gvpo and of an objective of your own, Eq. 8 of "
        "dpo; of the others nats a response, the best of each group (reject_sampling) or all (sft).",
    ),
    "eval/accuracy": Metric(
        "share",
        "Pairs of held-out responses with different rewards that log pi_theta - log pi_ref puts in the same order, "
        "ties half; mean over groups. Absent without such a pair, and where objective.reference is rollout.",
    ),
    "eval/nll": Metric("nats/token", "Minus the mean log-probability of a token of held-out recorded responses."),
    "eval/teacher_kl": Metric(
        "nats/response",
        "KL of the policy to its teacher on held-out prompts: mean of log pi_theta - log pi_T of responses drawn at "
        "temperature 1. Absent where objective.reference is not teacher or evaluation.temperature is not 1.",
    ),
    "eval/teacher_kl_half_width": Metric(
        "nats/response", "Half the 95 % interval of eval/teacher_kl over prompts (Student's t); absent with one prompt."
    ),
    "eval/groups": Metric("groups", "Held-out recorded groups with enough scored responses."),
    "eval/lost": Metric(
        "responses", "Held-out responses that the sampler did not give; absent where the policy answers."
    ),
    "eval/prompts": Metric("prompts", "Held-out prompts with a score."),
    "eval/unscored": Metric("responses", "Held-out responses without a score."),
}


def _pattern(key: str) -> re.Pattern[str]:
    names = {"<name>": ".+", "<detail>": ".+", "<kind>": "[a-z_]+", "<phase>": f"(?:{'|'.join(PHASES)}|other)"}
    parts = re.split(r"(<\w+>)", key)
    return re.compile("".join(names.get(part) or re.escape(part) for part in parts))


_PATTERNS = [_pattern(key) for key in METRICS]


def undocumented(record: Mapping[str, Any]) -> list[str]:
    """The record's keys that METRICS does not explain."""
    return [key for key in record if key not in METRICS and not any(pattern.fullmatch(key) for pattern in _PATTERNS)]


def metrics_page() -> str:
    """docs/metrics.md: the dictionary as a page."""
    lines = [
        "# What metrics.jsonl holds",
        "",
        "One JSON object a line. `kind` says which: `train` has the keys below except `eval/`; `eval` has `eval/` and",
        "`seconds/evaluate`; `event` has `event` and `message`. Numbers that are not finite are `null`.",
        "Rewards are in the units of your reward functions. Source: `gvpo_core.training.watch.metric_names.METRICS`.",
        "",
        "| key | unit | meaning |",
        "|---|---|---|",
    ]
    for key, metric in METRICS.items():
        lines.append(f"| `{key}` | {metric.unit} | {metric.meaning.replace('|', chr(92) + '|')} |")
    lines += [
        "",
        "# What the alerts mean",
        "",
        "An alert compares a step with the run's own first and usual numbers: `usual` is the median of up to 20 steps",
        "before, without the outliers among them. KL and gradient outliers are WATCH, BAD where three of five steps",
        "are, and the usual after ten. `throughput` and `memory` are in `machine/alerts`, the others in `alerts`.",
        "",
        "| key | is raised when |",
        "|---|---|",
        *(f"| `{key}` | {meaning} |" for key, meaning in ALERTS.items()),
    ]
    return "\n".join(lines) + "\n"
