"""Trains with a real vLLM server as the sampler and as a teacher, and shows that it has the weights of each step.

python conformance/support/vllm_trial.py MODEL_FOLDER URL NAME

The server serves MODEL_FOLDER as NAME in float32. docs/engines.md has its command. What is sent must stay within 1e-3
nat a token of the trainer at every step, with prompts long enough for the prefix cache; what is not sent, or sent in
part, must be stopped by name, with and without a gap_tolerance. A model whose head is its embedding is sent without the
head of its own that the run writes, to show the latter.
"""

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

import gvpo
from gvpo_core.training import cli
from gvpo_core.training.config import ModelConfig, OptimizerConfig, RolloutConfig, RunConfig, TeacherConfig
from gvpo_core.training.policy import Batch
from gvpo_core.training.samplers import Engine, SamplerError
from gvpo_core.training.teacher import load_teacher

STEPS, TOLERANCE = 4, 1e-3  # nats a token
LONG = "Count: " + " ".join(map(str, range(90)))
ROWS = [{"prompt": text} for text in ("The capital of France is", f"{LONG} one", "Once upon a time", f"{LONG} two")]
Weights = Literal["kept", "adapters", "model"]


def reward(completions: Sequence[str], **columns: Any) -> list[float]:
    return [float(text.count("e")) for text in completions]


class Timed:
    """Before a sampler among the bases: tells the seconds of a refresh and the tokens a second."""

    def refresh(self: Any, policy: Any, version: int) -> None:
        start = time.perf_counter()
        super().refresh(policy, version)
        print(f"refresh {version}: {time.perf_counter() - start:.2f} s")

    def generate(self: Any, *arguments: Any) -> Any:
        start = time.perf_counter()
        drawn = super().generate(*arguments)
        tokens = sum(len(response.tokens) for row in drawn for response in row)
        print(f"{tokens} tokens, {tokens / (time.perf_counter() - start):.1f} a second; lost: {self.failures}")
        return drawn


class Watched(Timed, Engine):
    """Also tells which model it asks for."""

    def refresh(self, policy: Any, version: int) -> None:
        super().refresh(policy, version)
        print(f"asks for {self.served}")


class StaleCache(Watched):
    """Leaves the prefix cache of the weights before."""

    def _command(self, path: str, body: dict[str, Any]) -> None:
        if path != "/reset_prefix_cache":
            super()._command(path, body)


class Headless:
    """A policy whose export says that its head is its own, and has none."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def export(self, folder: Path) -> None:
        self.policy.export(folder)
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": False}))


class HalfSent(Watched):
    """Sends a model whole of which vLLM keeps the old head."""

    def refresh(self, policy: Any, version: int) -> None:
        super().refresh(Headless(policy), version)


def trained(
    model: str,
    url: str,
    name: str,
    folder: Path,
    weights: Weights,
    kind: type[Watched] = Watched,
    ahead: int = 0,
    tolerance: float | None = TOLERANCE,
) -> list[float]:
    """The largest gap of each step, nats a token; ahead of time it grows by what the updates between changed."""
    own = folder / f"{kind.__name__}-{weights}-{ahead}-{tolerance}"
    config = config_of(model, own, lora_rank=8 if weights == "adapters" else 0, ahead=ahead)
    place = {"weights": weights, "folder": folder / f"{own.name}-weights"} if weights != "kept" else {}
    engine = kind(url, name, gap_tolerance=tolerance, deadline=300, **place)
    gvpo.train(config, gvpo.load_policy(config), train_rows=ROWS, rewards={"e": reward}, sampler=engine)
    return gaps(own, None if weights == "kept" else ahead)


def config_of(model: str, folder: Path, *, lora_rank: int = 0, ahead: int = 0) -> gvpo.Config:
    """A run of STEPS steps in this folder."""
    return gvpo.Config(
        model=ModelConfig(path=model, device="cpu", lora_rank=lora_rank),
        rollout=RolloutConfig(prompts=4, responses=4, max_tokens=16, ahead=ahead),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        run=RunConfig(steps=STEPS, folder=str(folder)),
    )


def gaps(folder: Path, ahead: int | None = 0) -> list[float]:
    """The largest gap of each step of a run, nats a token.

    Args:
      ahead: steps by which responses are drawn before they are used. None: weights of no known version.
    """
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["responses/lost"] for line in steps] == [0] * STEPS
    if ahead is not None:
        assert [line["sampler/staleness"] for line in steps] == [min(ahead, step) for step in range(STEPS)]
    return [line["sampler/gap/max"] for line in steps]


def stopped(
    model: str,
    url: str,
    name: str,
    folder: Path,
    weights: Weights,
    kind: type[Watched],
    what: str,
    tolerance: float | None = TOLERANCE,
) -> None:
    """The run must be stopped by the gap. Raises: AssertionError: it was not."""
    try:
        found = trained(model, url, name, folder, weights, kind, tolerance=tolerance)
    except SamplerError as error:
        if "log-probabilities differ" not in str(error):
            raise
        print(f"{what}: {error}")
    else:
        raise AssertionError(f"{what} passed for the policy's weights; gaps {found}")


def teach(model: str, url: str, name: str) -> None:
    """Compares the served with a local teacher of the same model. Raises: AssertionError: they differ."""
    config = gvpo.Config(
        model=ModelConfig(path=model, device="cpu"),
        teacher=TeacherConfig(path=model, url=url, model=name),
        rollout=RolloutConfig(prompts=4, responses=4, max_tokens=16),
    )
    policy = gvpo.load_policy(config)
    prompts = [policy.encode(row["prompt"]) for row in ROWS for _ in range(4)]
    texts = [f"{text} {number}" for number, text in enumerate(("Paris", "a, b and c.\n", "\u00e9t\u00e9", "of") * 4)]
    tokens = [policy.encode_responses("", [text], [True])[0].tokens for text in texts]
    batch = Batch(prompts, tokens, [i // 4 for i in range(16)])
    scores = load_teacher(config, policy).scorer.logprobs(batch)
    apart = np.abs(scores - policy.logprobs(batch)) / [len(response) for response in tokens]
    assert (scores < -1).all() and len(set(scores)) == 16, scores
    print(f"teacher: largest gap {apart.max():.1e} nats a token")
    assert apart.max() < TOLERANCE


def try_server(model: str, url: str, name: str) -> None:
    """All that a server of this model must show. Raises: AssertionError."""
    tied = json.loads((Path(model) / "config.json").read_text()).get("tie_word_embeddings", False)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for weights in ("adapters", "model"):
            found = trained(model, url, name, folder, cast(Weights, weights))
            assert len(found) == STEPS
            print(f"{weights}: largest gap of each step {[f'{gap:.1e}' for gap in found]}")
            found = trained(model, url, name, folder, cast(Weights, weights), ahead=1)
            print(f"{weights}, a step ahead: largest gap of each step {[f'{gap:.1e}' for gap in found]}")
        if tied:
            for tolerance in (TOLERANCE, None):
                stopped(model, url, name, folder, "model", HalfSent, f"old head, {tolerance}", tolerance)
        else:
            stopped(model, url, name, folder, "kept", Watched, "weights of the run before")
            stopped(model, url, name, folder, "model", StaleCache, "prefix cache of the run before")


def write_own_head(model: str, folder: Path) -> None:
    """Writes the folder that a server of a model whose head is its embedding is started from."""
    settings = folder.with_name("settings.toml")
    settings.write_text(f'[model]\npath = "{model}"\ndevice = "cpu"\n[data]\ntrain = "none.jsonl"\n')
    assert cli.main(["export", str(settings), str(folder), "--own-head"]) == 0


def own_head(model: str, url: str, name: str) -> None:
    """A server that was started with a head of its own gets all of a model that has none. Raises: AssertionError."""
    assert json.loads((Path(model) / "config.json").read_text())["tie_word_embeddings"]
    with tempfile.TemporaryDirectory() as temporary:
        for tolerance in (TOLERANCE, None):
            found = trained(model, url, name, Path(temporary), "model", tolerance=tolerance)
            print(f"a head of its own: largest gap of each step {[f'{gap:.1e}' for gap in found]}")
            assert max(found) < TOLERANCE


if __name__ == "__main__":
    try_server(*sys.argv[1:])
