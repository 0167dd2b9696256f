"""Runs of the toy policy: a bigram model over characters, quick enough for the trainer's own tests."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from toy_policy import ToyPolicy

from gvpo_core.training import Config, ModelConfig, train
from gvpo_core.training.config import DataConfig, OptimizerConfig, RolloutConfig, RunConfig
from gvpo_core.training.watch.console import Console

CHARACTERS = "|abcdefghijklmnopqrstuvwxyz"


def write_model(folder: Path) -> Path:
    """A random bigram model; its end token is id 0."""
    size = len(CHARACTERS)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"characters": CHARACTERS}))
    np.save(folder / "weights.npy", np.random.default_rng(0).normal(size=(size, size)))
    return folder


def policy(model: Path, *, updates: int = 10, reference: bool = True, **settings: Any) -> ToyPolicy:
    optimizer = OptimizerConfig(**({"learning_rate": 0.1} | settings))
    return ToyPolicy(ModelConfig(path=str(model)), optimizer, updates=updates, reference=reference, seed=0)


def config_of(run: Path, model: Path, steps: int = 2, **sections: Any) -> Config:
    """Settings of a short run; each section's changes as a mapping."""
    config = Config(
        run=RunConfig(folder=str(run), steps=steps, checkpoint_every=1, show_every=0),
        model=ModelConfig(path=str(model)),
        data=DataConfig(train="given", shuffle=False),
        rollout=RolloutConfig(prompts=2, responses=4, max_tokens=12),
        optimizer=OptimizerConfig(learning_rate=0.1),
    )
    for name, changes in sections.items():
        config = replace(config, **{name: replace(getattr(config, name), **changes)})
    return config


def run(config: Config, rows: Any, of_policy: ToyPolicy | None = None, **given: Any) -> ToyPolicy:
    """Trains, quietly; the policy."""
    of_policy = of_policy or policy(Path(config.model.path), updates=config.updates)
    console = Console(config.run.steps, stream=io.StringIO())
    train(config, of_policy, train_rows=rows, console=console, **given)
    return of_policy


def records(folder: Path, name: str = "metrics", kind: str = "train") -> list[dict[str, Any]]:
    lines = (folder / f"{name}.jsonl").read_text().splitlines()
    return [r for line in lines if (r := json.loads(line))["kind"] == kind]
