"""Trains with a real server that gives text alone, mlx_lm.server or transformers serve, as the sampler.

python conformance/support/text_trial.py MODEL_FOLDER URL NAME

The server serves MODEL_FOLDER as NAME. With --transformers, requests are those that `transformers serve` takes. Two
steps on text prompts, then two on chat messages where the model has a template, and two by the chat endpoint: every
response must have come, and have a finite log-probability under the policy.
"""

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gvpo
from gvpo_core.training.config import EngineConfig, ModelConfig, OptimizerConfig, RolloutConfig, RunConfig

TEXTS: Sequence[Mapping[str, Any]] = [{"prompt": text} for text in ("The capital of", "Once upon a time", "one two")]
CHATS: Sequence[Mapping[str, Any]] = [{"prompt": [{"role": "user", "content": str(row["prompt"])}]} for row in TEXTS]
ENGINE: dict[str, Any] = {"tokens": "text", "deadline": 300, "concurrency": 4}
STEPS, PROMPTS, RESPONSES = 2, 2, 4


def reward(completions: Sequence[Any], **columns: Any) -> list[float]:
    return [float(str(text).count("e")) - len(str(text)) / 100 for text in completions]


def trained(model: str, url: str, name: str, folder: Path, rows: Sequence[Mapping[str, Any]], **how: Any) -> None:
    """Runs, and checks what the run folder holds."""
    config = gvpo.Config(
        model=ModelConfig(path=model, device="cpu"),
        rollout=RolloutConfig(sampler="engine", prompts=PROMPTS, responses=RESPONSES, max_tokens=12),
        engine=EngineConfig(url, name, **(ENGINE | how)),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        run=RunConfig(steps=STEPS, folder=str(folder)),
    )
    gvpo.train(config, gvpo.load_policy(config), train_rows=rows, rewards={"e": reward})
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [record for record in records if record["kind"] == "train"]
    responses = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    assert len(metrics) == STEPS
    for record in metrics:
        assert record["responses/total"] == PROMPTS * RESPONSES, record
        assert record["responses/lost"] == 0 and isinstance(record["loss"], float), record
    assert len({response["response"] for response in responses}) > PROMPTS, "one seed for all responses"
    cut, other = sum(not r["finished"] for r in responses), sum(m["sampler/retokenized"] for m in metrics)
    print(f"{folder.name}: {len(responses)} responses, {cut} cut, {other} sampled as other tokens")


def try_server(model: str, url: str, name: str, *, transformers: bool = False) -> None:
    """All that a server of this model must show. Raises: AssertionError."""
    if transformers:
        ENGINE["omit"] = ("top_k", "min_p", "repetition_penalty")
        ENGINE["fields"] = {"generation_config": '{"do_sample": true, "top_k": 0}'}
    with tempfile.TemporaryDirectory() as temporary:
        trained(model, url, name, Path(temporary) / "texts", TEXTS)
        if (Path(model) / "chat_template.jinja").is_file():
            trained(model, url, name, Path(temporary) / "chats", CHATS)
            trained(model, url, name, Path(temporary) / "endpoint", CHATS, tokens="chat")


if __name__ == "__main__":
    try_server(*sys.argv[1:4], transformers="--transformers" in sys.argv)
