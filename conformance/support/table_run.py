"""A small run of the table policy as files on disk: what the command-line tests start."""

import json
from pathlib import Path

PROMPTS = ("p0", "p1", "p2")
RESPONSES = ("a", "b", "c", "d")


# In a thread: a process a run is what most of a run's time would go into. Tests of processes name another.
REWARD = 'function = "exact_match"\nisolation = "thread"'


def make(folder: Path, *, steps: int = 12, extra: str = "", reward: str = REWARD) -> Path:
    """Writes table.json, train.jsonl and config.toml; returns the config. The run folder is folder/run."""
    folder.mkdir(parents=True, exist_ok=True)
    table = {p: {r: float(1 + (i + j) % 3) for j, r in enumerate(RESPONSES)} for i, p in enumerate(PROMPTS)}
    (folder / "table.json").write_text(json.dumps(table))
    rows = [{"prompt": p, "answer": r} for p, r in zip(PROMPTS, RESPONSES, strict=False)]
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = folder / "config.toml"
    config.write_text(
        f"""
[run]
folder = "{folder / "run"}"
backend = "table"
steps = {steps}
checkpoint_every = 2

[model]
path = "{folder}"

[data]
train = "{folder / "train.jsonl"}"
evaluation = "{folder / "train.jsonl"}"

[rollout]
prompts = 2
responses = 6
max_tokens = 2

[objective]
beta = 0.5
epochs = 2

[optimizer]
learning_rate = 1.0
schedule = "cosine"

[evaluation]
every = 3

[rewards.right]
{reward}
{extra}
"""
    )
    return config
