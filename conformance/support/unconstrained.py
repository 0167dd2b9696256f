"""Trains, exports and reloads tiny families with the installed wheel: what a user's `pip install` gives today.

python unconstrained.py BACKEND [COUNT]  torch, jax or mlx, and of how many families; `nox -s unconstrained` makes the
                                         environment

It imports nothing of this repository but `tiny_models`, which makes the models.
"""

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models

FAMILIES = {
    "torch": ("llama", "qwen3", "gemma3_text", "qwen3_moe", "phi3", "olmo2"),
    "jax": ("llama", "llama3", "mistral", "qwen2", "qwen3"),
    "mlx": ("llama", "mistral", "qwen2", "qwen3"),
}
PACKAGES = {
    "torch": ("torch", "transformers", "peft"),
    "jax": ("jax", "optax", "orbax-checkpoint", "transformers"),
    "mlx": ("mlx", "mlx-lm", "transformers"),
}
ALL = ("numpy", "array-api-compat", "safetensors", "tokenizers", "huggingface-hub", "tyro", "rich")
STEPS = 2


def check_installed(backend: str) -> None:
    """Raises AssertionError where what is imported is not the wheel."""
    site = Path(sysconfig.get_paths()["purelib"])
    for name in ("gvpo", "gvpo_core", f"gvpo_{backend}"):
        path = Path(str(importlib.import_module(name).__file__))
        assert path.is_relative_to(site), f"{name} is {path}, which is not in {site}"
    origin = json.loads(distribution("gvpo").read_text("direct_url.json") or "{}")
    assert origin.get("url", "").endswith(".whl"), f"gvpo was installed from {origin}: expected a wheel"
    print(f"gvpo {version('gvpo')} from {Path(origin['url']).name}, Python {sys.version.split()[0]}")
    for package in (*PACKAGES[backend], *ALL):
        try:
            print(f"  {package} {version(package)}")
        except PackageNotFoundError:
            print(f"  {package} is not installed")


def vowels(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]


def run(backend: str, model: Path, folder: Path) -> float:
    """Two steps, an export, and the export read again; the largest difference of a log-probability, nats."""
    from gvpo_core.training import (
        Batch,
        Config,
        ModelConfig,
        ObjectiveConfig,
        OptimizerConfig,
        RolloutConfig,
        RunConfig,
        load_policy,
        train,
    )

    config = Config(
        run=RunConfig(folder=str(folder / "run"), backend=backend, steps=STEPS, checkpoint_every=1, show_every=0),
        model=ModelConfig(path=str(model), device="cpu"),
        rollout=RolloutConfig(prompts=2, responses=4, max_tokens=8),
        objective=ObjectiveConfig(beta=0.02),
        optimizer=OptimizerConfig(learning_rate=0.01, schedule="constant"),
    )
    draw = np.random.default_rng(0)
    texts = [tuple(draw.integers(1, 96, 12).tolist()) for _ in range(3)]
    batch = Batch([text[:5] for text in texts], [text[5:] for text in texts], [0, 1, 2])
    policy = load_policy(config)
    before = policy.logprobs(batch)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            train(config, policy, train_rows=[{"prompt": "say a:"}, {"prompt": "say bee:"}], rewards={"vowels": vowels})
    except Exception:
        print(said.getvalue())
        raise
    after = policy.logprobs(batch)
    assert np.abs(after - before).max() > 1e-3, "training changed nothing"
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [row for row in map(json.loads, lines) if row.get("kind") == "train"]
    assert len(steps) == STEPS, f"{len(steps)} steps stand in metrics.jsonl; expected {STEPS}"
    policy.export(folder / "export")
    reload = by_transformers if backend == "torch" else by_backend(backend)
    return float(np.abs(reload(folder / "export", batch) - after).max())


def by_transformers(folder: Path, batch: Any) -> np.ndarray:
    """Log-probabilities of a batch by transformers alone, nats."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(folder)
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sums = []
    for prompt, response in zip(batch.prompts, batch.responses, strict=True):
        with torch.no_grad():
            logits = lm(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        sums.append(float(logits.gather(1, torch.tensor(response)[:, None]).sum()))
    return np.asarray(sums)


def by_backend(backend: str) -> Callable[[Path, Any], np.ndarray]:
    """The same by a new policy, where transformers has no PyTorch to compute with."""

    def logprobs(folder: Path, batch: Any) -> np.ndarray:
        from transformers import AutoConfig, AutoTokenizer

        from gvpo_core.training import Config, ModelConfig, RunConfig, load_policy

        AutoConfig.from_pretrained(folder)
        AutoTokenizer.from_pretrained(folder)
        config = Config(run=RunConfig(backend=backend), model=ModelConfig(path=str(folder), device="cpu"))
        return load_policy(config).logprobs(batch)

    return logprobs


def command(backend: str, model: Path, folder: Path) -> None:
    """One run and its export by the command `gvpo`."""
    folder.mkdir(parents=True)
    (folder / "reward.py").write_text(
        "def length(completions, **_):\n    return [float(len(c)) for c in completions]\n"
    )
    (folder / "train.jsonl").write_text('{"prompt": "say a:"}\n{"prompt": "say bee:"}\n')
    (folder / "config.toml").write_text(
        f"""
run = {{ folder = "{folder / "run"}", backend = "{backend}", steps = {STEPS}, checkpoint_every = 1 }}
model = {{ path = "{model}", device = "cpu" }}
data = {{ train = "{folder / "train.jsonl"}" }}
rollout = {{ prompts = 2, responses = 4, max_tokens = 8 }}
rewards.length = {{ function = "{folder / "reward.py"}:length" }}
"""
    )
    gvpo = Path(sys.executable).parent / "gvpo"
    for arguments in (("train", folder / "config.toml"), ("export", folder / "run", folder / "export")):
        done = subprocess.run([gvpo, *arguments], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, f"gvpo {arguments[0]} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    assert list((folder / "export").glob("*.safetensors")), "gvpo export wrote no weights"


def main() -> None:
    backend, count = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None
    families = FAMILIES[backend][:count]
    started = time.monotonic()
    check_installed(backend)
    make = tiny_models.make_model if backend == "torch" else tiny_models.write_model
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for family in families:
            model = make(family, folder / family / "model")
            difference = run(backend, model, folder / family)
            print(f"  {family}: trained, exported, reloaded; log-probabilities within {difference:.1g} nat")
            assert difference < 1e-3, f"{family}: the export scores {difference:.3g} nat away from the policy"
        command(backend, folder / families[0] / "model", folder / "command")
    print(f"{len(families)} families and the command gvpo in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    main()
