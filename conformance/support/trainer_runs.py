"""The run that the trainer's tests share: a tiny model, three prompts and a reward by file."""

import json
from pathlib import Path

from places import DEVICE
from trainer_backends import Backend

REWARD = """
def vowels(prompts, completions, **_):
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]
"""


def write_run(folder: Path, backend: Backend, model: Path, *, steps: int, extra: str, model_extra: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "reward.py").write_text(REWARD)
    (folder / "train.jsonl").write_text(
        "".join(json.dumps({"prompt": f"say {w}:"}) + "\n" for w in ("a", "bee", "code"))
    )
    (folder / "config.toml").write_text(
        f"""
[run]
folder = "{folder / "run"}"
backend = "{backend.name}"
steps = {steps}
checkpoint_every = 2
show_every = 0
[model]
path = "{model}"
device = "{DEVICE}"
deterministic = {str(DEVICE == "cuda").lower()}
{"" if "dtype" in model_extra else 'dtype = "float32"'}
{model_extra}
[data]
train = "{folder / "train.jsonl"}"
evaluation = "{folder / "train.jsonl"}"
[evaluation]
every = 5
[rollout]
prompts = 2
responses = 6
max_tokens = 8
[objective]
beta = 0.02
{extra}
[optimizer]
learning_rate = 0.01
[rewards.vowels]
function = "{folder / "reward.py"}:vowels"
"""
    )
    return folder / "config.toml"
