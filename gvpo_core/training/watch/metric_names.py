"""The keys of metrics.jsonl and their meanings, from which docs/metrics.md is generated."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from gvpo_core.training.watch.alerts import ALERTS

PHASES = ("generate", "reward", "score", "update", "evaluate", "checkpoint")
LOSSES = ("eval/loss", "eval/accuracy", "eval/nll", "eval/teacher_kl")  # metrics of an evaluation other than its reward


class Metric(NamedTuple):
    """The meaning of a key of metrics.jsonl."""

    unit: str
    meaning: str


METRICS: dict[str, Metric] = {
    "kind": Metric("text", "train: one training step; eval: one evaluation; event: something else, named in `event`."),
    "step": Metric(
        "steps", "Rollouts so far, including this one. An evaluation at step n uses the policy after step n."
    ),
    "time": Metric("seconds", "Unix time when the line was written."),
    "event": Metric(
        "text",
        "Kind of event: resume, stop, failed (an error ended the run), early (evaluation.patience ended it), back "
        "(--from-step), reset (the policy was already trained, and was reset), warning.",
    ),
    "message": Metric("text", "The event in words."),
    "reward/mean": Metric(
        "reward",
        "Mean total reward of the step's scored responses. In a mixture: of those drawn for this step; with "
        "rollout.own_responses, of those that the policy drew.",
    ),
    "reward/half_width": Metric(
        "reward",
        "Half the width of the 95 % interval of reward/mean: Student's t over the group means. Absent with one group.",
    ),
    "reward/trend": Metric(
        "reward",
        "reward/mean minus its mean over the 10 steps before, or fewer at the start. Absent in the first step.",
    ),
    "reward/spread": Metric(
        "reward", "Standard deviation of the rewards within a group (k - 1 in the divisor), mean over counted groups."
    ),
    "reward/min": Metric("reward", "Lowest total reward of the step."),
    "reward/max": Metric("reward", "Highest total reward of the step."),
    "reward/<name>": Metric("reward", "Mean of one reward over the responses that it scored, without its weight."),
    "reward_errors/<name>/<kind>": Metric(
        "responses",
        "Responses for which one reward failed: error (it raised), timeout, none (None or NaN). They leave their "
        "group. If the reward has a failure_value, errors and timeouts get that value instead.",
    ),
    "reward_seconds/<name>": Metric("seconds", "Time that one reward took for all responses, on the slowest rank."),
    "loss": Metric("reward^2", "GVPO loss (Eq. 16) before the update, mean over counted groups."),
    "loss/implicit_variance": Metric("reward^2", "Variance of the implicit rewards beta s within groups (Eq. 17)."),
    "loss/reward_variance": Metric("reward^2", "Variance of the rewards within groups (Eq. 17)."),
    "loss/covariance": Metric(
        "reward^2",
        "Covariance of implicit and actual reward within groups (Eq. 17). loss = sum of the two variances - 2 x this.",
    ),
    "regret/second_order": Metric(
        "reward", "loss / (2 beta): the regularised reward still to be gained, to second order. Absent when beta = 0."
    ),
    "regret/series": Metric(
        "reward", "beta log mean exp(w / beta): the same to all orders, too low by O(1/k). Absent when beta = 0."
    ),
    "kl": Metric(
        "nats/response",
        "Mean of s = log pi_theta - log pi_ref over counted responses. It estimates KL(pi_theta || pi_ref) (the k1 "
        "estimator) only if the responses were sampled from pi_theta at temperature 1. Otherwise it is only the mean "
        "log-ratio.",
    ),
    "entropy": Metric(
        "nats/token",
        "Minus the mean log-probability of a sampled token, over the responses that the policy scored. It estimates "
        "the entropy under the same condition as kl.",
    ),
    "log_ratio": Metric(
        "nats/response",
        "As kl, but over the other responses: recorded, replayed, and with rollout.own_responses those of the sampler.",
    ),
    "nll": Metric("nats/token", "Minus the mean log-probability of a token, over the responses of log_ratio."),
    "gradient_norm": Metric("", "Norm of the gradient before clipping, mean over the step's updates."),
    "gradient_norm/max": Metric("", "Largest gradient norm of the step's updates."),
    "learning_rate": Metric("", "Learning rate of the step's last update."),
    "length/mean": Metric(
        "tokens", "Mean response length, including end tokens. Of episodes: the policy's own tokens."
    ),
    "length/max": Metric("tokens", "Length of the longest response."),
    "length/best": Metric(
        "tokens",
        "Mean length of the finished responses with the step's highest reward (the right ones if rewards are 0 and 1). "
        "Absent if there is none, or if all rewards are equal.",
    ),
    "length/worst": Metric(
        "tokens",
        "Mean length of the finished responses with the step's lowest reward (the wrong ones). Absent in the same "
        "cases.",
    ),
    "length/truncated": Metric(
        "tokens", "Mean length of the responses that `truncated` counts. Absent if there is none."
    ),
    "truncated": Metric("share", "Responses cut at the token limit. Of episodes: all except episodes/done."),
    "responses/total": Metric("responses", "Responses of the step."),
    "responses/lost": Metric(
        "responses",
        "Responses that the sampler did not return, or whose episode failed at reset. Their groups are smaller.",
    ),
    "sampler/gap": Metric(
        "nats/token",
        "Mean absolute difference between the sampler's and the policy's log-probability. Absent if unknown.",
    ),
    "sampler/gap/max": Metric("nats/token", "Largest such difference of a response in the step."),
    "sampler/retokenized": Metric(
        "responses",
        "Texts of the sampler that have more or fewer tokens here than the sampler counted. At least this many were "
        "sampled as other tokens. Absent if the sampler returns token ids.",
    ),
    "sampler/staleness": Metric(
        "steps",
        "Age of the weights that drew a response: steps that the policy has taken since. Mean over responses; absent "
        "if unknown.",
    ),
    "sampler/staleness/max": Metric("steps", "Largest age in the step."),
    "turns/mean": Metric(
        "turns",
        "Mean number of the policy's turns in an episode. This key and those down to length/context appear only with "
        "[environment].",
    ),
    "turns/max": Metric("turns", "Largest number of turns in an episode."),
    "tools/calls": Metric("calls", "Mean number of tool calls in an episode, including calls that could not be read."),
    "tools/failed": Metric(
        "share",
        "Tool calls that could not be read, that named an unknown tool or wrong arguments, or whose tool raised. "
        "Absent if there was no call.",
    ),
    "episodes/done": Metric("share", "Episodes ended by the environment, or by the first message without a tool call."),
    "episodes/turns": Metric("share", "Episodes cut at environment.max_turns."),
    "episodes/tokens": Metric("share", "Episodes cut at rollout.max_tokens or environment.turn_tokens."),
    "episodes/failed": Metric("share", "Episodes without a score because the environment raised, died or timed out."),
    "episodes/repeated": Metric(
        "share", "Episodes in which the policy repeated a message or a tool call: a sign of loops."
    ),
    "episodes/segments": Metric(
        "segments",
        "Mean number of contexts of an episode: 1, plus 1 each time the chat template rewrote earlier turns.",
    ),
    "episodes/prefilled": Metric(
        "tokens",
        "Prompt tokens of the step's turns that were computed. This key and episodes/reused appear only if the policy "
        "draws the turns itself and keeps keys and values between them.",
    ),
    "episodes/reused": Metric(
        "tokens",
        "Prompt tokens of the step's turns that were not computed again, because their keys and values were kept.",
    ),
    "episodes/seconds": Metric("seconds", "Time that the slowest episode waited for tools and environments."),
    "length/context": Metric(
        "tokens", "Mean length of an episode after the prompt, including the environment's tokens."
    ),
    "responses/unscored": Metric("responses", "Responses without a total reward. They leave their group."),
    "responses/left_out": Metric(
        "responses",
        "Scored responses that the update skips: cut ones (rollout.truncated), those of equal groups (rollout.equal), "
        "and those that the teacher did not score. Absent if no response was skipped.",
    ),
    "groups/total": Metric("groups", "Groups of the step."),
    "groups/counted": Metric(
        "groups", "Groups with at least two scored responses. All are in the loss, except groups/left_out."
    ),
    "groups/left_out": Metric("groups", "Counted groups that the update skips (responses/left_out)."),
    "groups/redrawn": Metric("groups", "Groups drawn to replace equal ones (rollout.equal = redraw)."),
    "groups/revisited": Metric("groups", "Groups of prompts that were seen before (data.curriculum)."),
    "groups/recorded": Metric("groups", "Groups of the step that come from data.recorded."),
    "groups/replayed": Metric("groups", "Groups of the step that come from earlier steps ([replay])."),
    "teacher/unread": Metric(
        "responses",
        "Responses that the teacher cannot read, or that exceed its context. They leave their group "
        "(objective.reference).",
    ),
    "teacher/lost": Metric("responses", "Responses for which teacher.url returned no score. They leave their group."),
    "replay/age": Metric("steps", "Mean age of the replayed groups. Absent if there is none."),
    "replay/kept": Metric("groups", "Groups kept for replay after the step."),
    "groups/dropped_unscored": Metric("groups", "Groups with fewer than two scored responses."),
    "groups/all_equal": Metric(
        "groups", "Dead groups: counted groups in which all rewards are equal. Only beta moves them."
    ),
    "groups/all_best": Metric("groups", "Dead groups at the highest reward seen so far: too easy."),
    "groups/all_worst": Metric("groups", "Dead groups at the lowest reward seen so far: too hard."),
    "groups/skipped": Metric(
        "groups",
        "Groups of recorded data that no step uses, because too few responses are scored. Absent if there is none.",
    ),
    "machine/reference_cached": Metric(
        "responses", "Recorded responses of the step whose reference score was in the cache."
    ),
    "machine/reference_scored": Metric("responses", "Recorded responses of the step that the reference had to score."),
    "tokens/sampled": Metric(
        "tokens", "Response tokens drawn in the step, all ranks; 0 if all responses were recorded."
    ),
    "tokens/computed": Metric("tokens", "Tokens in the forward passes of the update, including prompts and padding."),
    "tokens_per_second": Metric(
        "tokens/s", "Response tokens of the step, divided by the seconds of generate, reward, score and update."
    ),
    "seconds/<phase>": Metric("seconds", f"Time of one phase: {', '.join(PHASES)}. other: the rest of the step."),
    "seconds/step": Metric("seconds", "Time of the whole step."),
    "share/<phase>": Metric("share", "seconds/<phase> divided by seconds/step."),
    "memory/peak": Metric("bytes", "Peak memory of the rank that uses most: of its device, or of its process on CPU."),
    "verdict": Metric(
        "text",
        "OK, WATCH or BAD: the worst level in `alerts`. A resumed run gives the same one. Also in an event `failed`.",
    ),
    "alerts": Metric("list", "Problems of the training: key, level, seen (the numbers), advice."),
    "machine/verdict": Metric("text", "OK or WATCH: the worst level in `machine/alerts`."),
    "machine/alerts": Metric(
        "list", "Problems of speed or memory, in the form of `alerts`. Two equal runs may differ here."
    ),
    "policy/<detail>": Metric("", "A backend's own number, from its `Update.details`."),
    "eval/reward": Metric(
        "reward", "Mean total reward on held-out prompts: the mean of each prompt, averaged over the prompts."
    ),
    "eval/half_width": Metric(
        "reward",
        "Half the width of the 95 % interval of eval/reward over prompts: Student's t, or Wilson's larger side if "
        "every prompt scores 0 or 1. Absent with one prompt.",
    ),
    "eval/reward/<name>": Metric("reward", "Mean of one reward on held-out prompts, without its weight."),
    "eval/length": Metric("tokens", "Mean length of held-out responses."),
    "eval/truncated": Metric(
        "share",
        "Held-out responses cut at the token limit. Of episodes: also those cut at the turn limit, and failed ones.",
    ),
    "eval/episodes/done": Metric(
        "share", "As episodes/done, for held-out episodes. The next three keys are the other ends."
    ),
    "eval/episodes/turns": Metric("share", "Held-out episodes cut at environment.max_turns."),
    "eval/episodes/tokens": Metric("share", "Held-out episodes cut at rollout.max_tokens or environment.turn_tokens."),
    "eval/episodes/failed": Metric("share", "Held-out episodes without a score because the environment failed."),
    "eval/loss": Metric(
        "",
        "Loss of the objective on held-out recorded groups: Eq. 8 for dpo; for sft and reject_sampling minus the mean "
        "log-probability of the responses of a group (sft) or of its best ones (reject_sampling), in nats a response; "
        "Eq. 16 for all others, your own objective included.",
    ),
    "eval/accuracy": Metric(
        "share",
        "Pairs of held-out responses with different rewards that log pi_theta - log pi_ref puts in the same order. "
        "Ties count half; mean over groups. Absent if there is no such pair, or if objective.reference is rollout.",
    ),
    "eval/nll": Metric("nats/token", "Minus the mean log-probability of a token of held-out recorded responses."),
    "eval/teacher_kl": Metric(
        "nats/response",
        "KL of the policy to its teacher on held-out prompts: mean of log pi_theta - log pi_T over responses drawn at "
        "temperature 1. Absent if objective.reference is not teacher, or if evaluation.temperature is not 1.",
    ),
    "eval/teacher_kl_half_width": Metric(
        "nats/response",
        "Half the width of the 95 % interval of eval/teacher_kl over prompts (Student's t). Absent with one prompt.",
    ),
    "eval/groups": Metric("groups", "Held-out recorded groups with enough scored responses."),
    "eval/lost": Metric(
        "responses", "Held-out responses that the sampler did not return. Absent if the policy draws them."
    ),
    "eval/prompts": Metric("prompts", "Held-out prompts with a score. Without rewards: all held-out prompts."),
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
    """The text of docs/metrics.md."""
    lines = [
        "# What metrics.jsonl holds",
        "",
        "The file metrics.jsonl in a run folder holds the numbers of the run. Each line is one JSON object. Its",
        "`kind` is `train` (the keys below, except `eval/`), `eval` (the keys of `eval/` and `seconds/evaluate`)",
        "or `event` (the keys `event` and `message`). A number that is not finite is written as `null`. Rewards",
        "are in the units of your reward functions. The source of this page is",
        "`gvpo_core.training.watch.metric_names.METRICS`.",
        "",
        "| key | unit | meaning |",
        "|---|---|---|",
    ]
    for key, metric in METRICS.items():
        lines.append(f"| `{key}` | {metric.unit} | {metric.meaning.replace('|', chr(92) + '|')} |")
    lines += [
        "",
        "## What the alerts mean",
        "",
        "An alert compares a step with the run's own first steps and with its usual numbers. The usual number is",
        "the median of up to 20 earlier steps, without outliers. An outlier of KL or gradient norm raises WATCH,",
        "three in five steps raise BAD, and ten in a row become the usual numbers. `throughput` and `memory` are",
        "in `machine/alerts`, the others in `alerts`.",
        "",
        "| key | is raised when |",
        "|---|---|",
        *(f"| `{key}` | {meaning} |" for key, meaning in ALERTS.items()),
    ]
    return "\n".join(lines) + "\n"
