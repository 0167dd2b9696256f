"""Trains with a real vLLM server as the sampler, and shows that it has the weights of each step.

python conformance/support/vllm_trial.py MODEL_FOLDER URL NAME

The server serves MODEL_FOLDER, whose head must not be its embedding, as NAME in float32. docs/samplers.md has its
command. Three runs: adapters are sent, the whole model is sent, nothing is sent. The first two must stay within 1e-3
nat a token of the trainer at every step, with prompts long enough for the prefix cache. The third must be stopped by
name.
"""

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import gvpo
from gvpo_core.training.config import ModelConfig, OptimizerConfig, RolloutConfig, RunConfig
from gvpo_core.training.samplers import Engine, SamplerError

STEPS, TOLERANCE = 4, 1e-3  # nats a token
LONG = "Count: " + " ".join(map(str, range(90)))
ROWS = [{"prompt": text} for text in ("The capital of France is", f"{LONG} one", "Once upon a time", f"{LONG} two")]
Weights = Literal["kept", "adapters", "model"]


def reward(completions: Sequence[str], **columns: Any) -> list[float]:
    return [float(text.count("e")) for text in completions]


class Watched(Engine):
    """Tells the seconds of a refresh and the tokens a second."""

    def refresh(self, policy: Any, version: int) -> None:
        start = time.perf_counter()
        super().refresh(policy, version)
        print(f"refresh {version}: {time.perf_counter() - start:.2f} s, asks for {self.served}")

    def generate(self, *arguments: Any) -> Any:
        start = time.perf_counter()
        drawn = super().generate(*arguments)
        tokens = sum(len(response.tokens) for row in drawn for response in row)
        print(f"{tokens} tokens, {tokens / (time.perf_counter() - start):.1f} a second; lost: {self.failures}")
        return drawn


def trained(model: str, url: str, name: str, folder: Path, weights: Weights) -> list[float]:
    """The largest gap of each step, nats a token."""
    lora = {"lora_rank": 8} if weights == "adapters" else {}
    config = gvpo.Config(
        model=ModelConfig(path=model, device="cpu", **lora),
        rollout=RolloutConfig(prompts=2, responses=4, max_tokens=16),
        optimizer=OptimizerConfig(learning_rate=1e-3 if lora else 2e-5),
        run=RunConfig(steps=STEPS, folder=str(folder / weights)),
    )
    place = {"weights": weights, "folder": folder / f"{weights}-weights"} if weights != "kept" else {}
    engine = Watched(url, name, gap_tolerance=TOLERANCE, deadline=300, **place)
    gvpo.train(config, gvpo.load_policy(config), train_rows=ROWS, rewards={"e": reward}, sampler=engine)
    lines = [json.loads(line) for line in (folder / weights / "metrics.jsonl").read_text().splitlines()]
    return [line["sampler/gap/max"] for line in lines if line["kind"] == "train"]


def main() -> None:
    model, url, name = sys.argv[1:]
    with tempfile.TemporaryDirectory() as temporary:
        for weights in ("adapters", "model"):
            gaps = trained(model, url, name, Path(temporary), weights)
            assert len(gaps) == STEPS
            print(f"{weights}: largest gap of each step {[f'{gap:.1e}' for gap in gaps]}")
        try:
            trained(model, url, name, Path(temporary), "kept")  # the server now has the weights of the run before
        except SamplerError as error:
            print(f"kept: {error}")
        else:
            raise AssertionError("the server's old weights passed for the policy's")


if __name__ == "__main__":
    main()
