"""Replay, recorded responses beside drawn ones and stop texts through every backend, and back to a checkpoint."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import trainer_backends
from trainer_runs import write_run

from gvpo_core.training import cli

PRESENT = trainer_backends.present()
if not PRESENT:
    pytest.skip("no backend of a language model is among the subjects", allow_module_level=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_models.write_model("llama", tmp_path_factory.mktemp("model"))


def lines(path: Path, kind: str = "train") -> list[dict]:
    return [r for line in path.read_text().splitlines() if (r := json.loads(line))["kind"] == kind]


def test_steps_after_a_checkpoint_repeat_with_its_buffer(tmp_path, backend, model, capsys):
    config = write_run(tmp_path, backend, model, steps=4, extra="", model_extra="")
    rows = [{"prompt": f"say {w}", "responses": ["ab", "c"]} for w in ("a", "bee", "code")]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--rollout.source", "mixed", "--rollout.stop", "a", "--replay.groups", "3", "--replay.share", "0.5"]
    options += ["--run.checkpoint_every", "2", "--run.keep_checkpoints", "3"]
    assert cli.main(["train", str(config), *options]) == 0
    run = tmp_path / "run"
    first, drawn = lines(run / "metrics.jsonl"), lines(run / "completions.jsonl")
    assert [r["groups/replayed"] for r in first] == [0, 1, 1, 1]
    assert {"kl", "log_ratio", "nll"} <= {*first[0]} and all(np.isfinite(r["gradient_norm"]) for r in first)
    recorded = [r for r in drawn if r["step"] == 1 and r["response"] in ("ab", "c")]
    assert len(recorded) >= 2 and all(isinstance(r["reward"], float) for r in recorded), "scored by the run's reward"
    ended = [r for r in drawn if r.get("stopped")]
    assert ended and all(r["finished"] and "a" in r["response"] and "a" not in r["response"][:-1] for r in ended)
    assert len(json.loads((run / "checkpoints" / "step-00000002" / "source.json").read_text())["replay"]) == 2

    assert cli.main(["train", str(config), *options, "--from-step", "2"]) == 0
    again = lines(run / "metrics.jsonl")
    assert lines(run / "completions.jsonl") == drawn
    for a, b in zip(first, again, strict=True):
        assert (a["loss"], a["gradient_norm"], a["kl"]) == (b["loss"], b["gradient_norm"], b["kl"])
