"""A run folder for the report's tests: a small policy really trained with GVPO on sums, in NumPy, in a second.

The policy of "What is a + b?": an answer y with logit -e^sharpness (y - slope (a + b) - shift)^2, and a manner of
answering (the number, the sum, a ramble that is cut). It starts blurred and biased, and generalises to held-out sums.
"""

import json
from pathlib import Path

import numpy as np
from measured_step import encode_record, make_record, metrics_of

from gvpo_core import gvpo_coefficients
from gvpo_core.training.metrics import evaluation_metrics
from gvpo_core.training.watch.alerts import Alerts

ANSWERS, MANNERS, LIMIT, START = 19, 3, 16, 1_790_000_000.0
HOSTILE = (
    "</pre></textarea><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    "<a href='https://example.com'>&amp;]]></a>\x1b[31m\u202e\x00"
)
CONFIG = """[run]
folder = "runs/sums"
steps = {steps}

[model]
path = "models/sum-table"

[rollout]
prompts = {prompts}
responses = 8
max_tokens = 16

[objective]
name = "gvpo"
beta = {beta}

[rewards.right]
function = "rewards.py:right"
"""


class Policy:
    def __init__(self):
        self.sharpness, self.slope, self.shift = np.array(-3.2), np.array(0.8), np.array(2.6)
        self.manner = np.array([0.0, 1.0, 0.5])

    def answers(self, a, b):
        """(off (N, Y): answer minus the guess, log-probabilities (N, Y))."""
        off = np.arange(ANSWERS) - (self.slope * (a + b) + self.shift)[:, None]
        logits = -np.exp(self.sharpness) * off**2
        logits = logits - logits.max(1, keepdims=True)
        return off, logits - np.log(np.exp(logits).sum(1, keepdims=True))

    def manners(self):
        return self.manner - np.log(np.exp(self.manner).sum())

    def score(self, a, b, y, m):
        return self.answers(a, b)[1][np.arange(len(y)), y] + self.manners()[m]

    def step(self, a, b, y, m, coefficients, rate):
        off, logprobs = self.answers(a, b)
        error = (np.eye(ANSWERS)[y] - np.exp(logprobs)) * coefficients[:, None]  # sum_i c_i d log pi_i / d logits
        sharp = np.exp(self.sharpness)
        slope = (error * 2 * sharp * off).sum(1)
        gradient = [-(error * sharp * off**2).sum(), slope @ (a + b), slope.sum()]
        gradient.append(coefficients @ (np.eye(MANNERS)[m] - np.exp(self.manners())))
        parameters = (self.sharpness, self.slope, self.shift, self.manner)
        for parameter, g, scale in zip(parameters, gradient, (1, 0.004, 0.3, 1), strict=True):
            parameter += rate * scale * g
        return float(np.sqrt(sum((g**2).sum() for g in gradient)))


def write_run(
    folder: Path, *, steps=160, stop=None, prompts=8, beta=0.05, rate=0.8, resumed_at=None, seed=0, hostile=""
):
    """A run of `steps`, stopped after `stop`; `hostile` text is put into prompts, responses and settings."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(CONFIG.format(steps=steps, prompts=prompts, beta=beta) + f"# {hostile!r}\n")
    policy_facts = {"backend": "numpy", "device": "cpu", "dtype": "float64", "note": hostile}
    (folder / "environment.json").write_text(json.dumps({"gvpo": "0.1.0", "python": "3.11", "policy": policy_facts}))
    rng = np.random.default_rng(seed)
    sums = rng.permutation(100)
    held_out, pool, policy, reference = sums[:32], sums[32:], Policy(), Policy()
    lines, rows, clock, seen, alerts = [], [], START, None, Alerts(beta)

    def evaluate(step):
        nonlocal clock
        a, b = held_out // 10, held_out % 10
        answer, manner = policy.answers(a, b)[1], policy.manners()
        y, m = answer.argmax(1), np.full(len(a), manner.argmax())
        reward, tokens = reward_of(a, b, y, m)
        clock += 3.0
        found = evaluation_metrics(reward, held_out, tokens, m < 2, seconds=3.0, reward_parts={"right": reward})
        lines.append(make_record("eval", step, found, now=clock))
        rows.extend(completions("eval", step, np.arange(len(a)), a, b, y, m, reward, tokens, hostile))

    evaluate(0)
    for step in range(1, (stop or steps) + 1):
        if step == resumed_at:
            said = {"event": "resume", "message": f"resumed after step {step - 1} of {steps}"}
            lines.append(make_record("event", step - 1, said, now=clock))
        chosen = rng.choice(pool, prompts, replace=False).repeat(8)
        groups, (a, b) = np.arange(prompts).repeat(8), (chosen // 10, chosen % 10)
        answer, manner = policy.answers(a, b)[1], policy.manners()
        y, m = (np.exp(answer).cumsum(1) > rng.random((len(a), 1))).argmax(1), rng.choice(3, len(a), p=np.exp(manner))
        reward, tokens = reward_of(a, b, y, m)
        reward[rng.random(len(a)) < 0.004] = np.nan  # a reward that now and then fails
        now, before = policy.score(a, b, y, m), reference.score(a, b, y, m)
        weights = gvpo_coefficients(now, before, reward, groups, beta=beta, num_groups=prompts)
        generate = 0.02 * tokens.sum() / 8 + 0.4 * rng.random()
        numbers = metrics_of(
            logprobs=now, ref_logprobs=before, rewards=reward, group_ids=groups, num_groups=prompts, lengths=tokens,
            finished=m < 2, beta=beta, gradient_norms=[policy.step(a, b, y, m, weights, rate)], learning_rate=rate,
            seconds={"generate": generate, "reward": 0.05, "score": 0.3, "update": 1.1 + 0.2 * rng.random()},
            tokens_computed=int(tokens.sum()) + 90 * prompts,
            peak_memory=int(2**30 * (1.1 + 0.1 * (step > 3))), reward_parts={"right": reward}, reward_range=seen,
            reward_errors={"right": {"error": int(np.isnan(reward).sum()), "timeout": 0, "none": 0}},
        )  # fmt: skip
        seen = (0.0, 1.0)
        clock += numbers["seconds/step"]
        record = make_record("train", step, numbers, now=clock)
        lines.append(record | alerts.annotate(record))
        rows += completions("train", step, groups, a, b, y, m, reward, tokens, hostile)
        if step % 20 == 0 or step == steps:
            evaluate(step)
    (folder / "metrics.jsonl").write_text("".join(map(encode_record, lines)))
    (folder / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return lines


def reward_of(a, b, y, m):
    return ((y == a + b) & (m < 2)).astype(float), np.array([3, 9, LIMIT])[m]


def completions(kind, step, groups, a, b, y, m, reward, tokens, hostile):
    texts = ("{y}", "{a} + {b} = {y}", "Adding {a} and {b} is a thing that one may do in many a way, and so")
    return [
        {
            "kind": kind, "step": step, "prompt": f"What is {a[i]} + {b[i]}?{hostile}", "group": int(groups[i]),
            "response": texts[m[i]].format(a=a[i], b=b[i], y=y[i]) + hostile, "tokens": int(tokens[i]),
            "finished": bool(m[i] < 2), "reward": None if np.isnan(reward[i]) else float(reward[i]),
            "rewards": {"right": None if np.isnan(reward[i]) else float(reward[i])},
        } | ({"columns": {"answer": int(a[i] + b[i]), "note": f"sum {hostile}"}} if i == 0 or groups[i] != groups[i - 1]
             else {})
        for i in range(len(y))
    ]  # fmt: skip


def write_hostile_run(folder: Path) -> None:
    """A run whose texts, names and events all try to become part of the page."""
    write_run(folder, steps=20, hostile=HOSTILE)
    text = (folder / "metrics.jsonl").read_text()
    event = {"kind": "event", "step": 3, "time": 0.0, "event": "warning", "message": HOSTILE}
    renamed = text.replace("reward/right", f"reward/{json.dumps(HOSTILE)[1:-1]}")
    (folder / "metrics.jsonl").write_text(renamed + encode_record(event), encoding="utf-8")


def write_episodes(folder: Path, run: Path) -> Path:
    """A run of episodes: another run's records and responses, as if every response were an episode."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text((run / "config.toml").read_text())
    with (folder / "metrics.jsonl").open("w") as file:
        for i, record in enumerate(map(json.loads, (run / "metrics.jsonl").read_text().splitlines())):
            if record["kind"] in ("train", "eval"):
                share = 1 / (2 + i % 5)
                ends = {"done": 1 - share, "turns": share / 2, "tokens": share / 3, "failed": share / 6}
                before = "eval/" if record["kind"] == "eval" else ""
                record |= {f"{before}episodes/{end}": value for end, value in ends.items()}
            if record["kind"] == "train":
                record |= {"turns/mean": 2 + share, "turns/max": 4, "tools/calls": 1 + share, "tools/failed": share / 2}
                record |= {"episodes/repeated": share / 4, "episodes/seconds": share, "length/context": 50 + 9 * share}
            file.write(json.dumps(record) + "\n")
    with (folder / "completions.jsonl").open("w") as file:
        for i, row in enumerate(map(json.loads, (run / "completions.jsonl").read_text().splitlines())):
            end = ("done", "done", "turns", "tokens", "failed")[i % 5]
            row |= {"episode": [], "end": end, "turns": 1 + i % 4, "finished": end == "done"}
            file.write(json.dumps(row) + "\n")
    return folder


def write_long_run(folder: Path, run: Path) -> Path:
    """10,000 steps made of those of `run`, with 16 long responses each, in two groups."""
    folder.mkdir()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [r for r in records if r["kind"] == "train"]
    alerts = Alerts()
    with (folder / "metrics.jsonl").open("w") as file, (folder / "completions.jsonl").open("w") as rows:
        for step in range(1, 10_001):
            record = train[step % len(train)] | {"step": step}
            file.write(encode_record(record | alerts.annotate(record)))
            for i in range(16):
                row = {"kind": "train", "step": step, "prompt": "p" * 300, "group": i // 8, "response": "r" * 900}
                row |= {"reward": float(i % 2), "rewards": {"right": float(i % 2)}, "tokens": 200, "finished": True}
                rows.write(json.dumps(row) + "\n")
    return folder
