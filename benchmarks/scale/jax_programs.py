"""Programs that JAX compiles in a run of 15 steps with ragged prompts and responses, from the run's own metric.

The metric counts all programs for sampling, scoring and updates, and the score that checks the layout at load. With
hidden size 256 a group is one row, as in J3. With hidden size 32 attention dominates the cost, so groups are cut into
rows of different lengths.
"""

import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.scale.table import Count
from gvpo_core.training.config import Config, ModelConfig, OptimizerConfig, RolloutConfig, RunConfig
from gvpo_core.training.loop import train
from gvpo_core.training.policy.load import load_policy
from gvpo_core.training.watch.console import Console

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # programs are counted, and run once or twice
sys.path.insert(0, str(Path(__file__).parents[2] / "conformance" / "support"))
import tiny_models

STEPS, PROMPTS, K = 15, 4, 4
LONGEST, TOKENS = 60, 48
METRIC = "policy/compiled_programs"


def prompts() -> list[dict[str, str]]:
    """Returns prompts of log-normal lengths, at most `LONGEST` letters."""
    draw = np.random.default_rng(0)
    lengths = np.minimum(LONGEST, np.exp(draw.normal(np.log(LONGEST / 3), 0.6, STEPS * PROMPTS)).astype(int) + 1)
    return [{"prompt": "".join(draw.choice(list("abcdefgh"), int(n)))} for n in lengths]


def counts() -> Iterator[Count]:
    for hidden, before, bound in ((256, 23, 12), (32, 30, 18)):
        on = f"tiny llama, hidden size {hidden}, ragged lengths"
        yield Count("programs compiled in 15 steps", on, "", before, compiled(hidden), bound)


def compiled(hidden: int) -> float:
    """Returns the number of compiled programs after the last step."""
    with tempfile.TemporaryDirectory() as name:
        sizes = {"max_position_embeddings": 256, "num_hidden_layers": 1, "hidden_size": hidden}
        folder = tiny_models.make_model("llama", Path(name) / "model", **sizes)
        run = Path(name) / "run"
        config = Config(
            run=RunConfig(folder=str(run), backend="jax", steps=STEPS, checkpoint_every=0, show_every=0),
            model=ModelConfig(path=str(folder), device="cpu"),
            rollout=RolloutConfig(prompts=PROMPTS, responses=K, max_tokens=TOKENS),
            optimizer=OptimizerConfig(micro_batch_tokens=512),
        )
        rewards = {"length": lambda completions, **_: [float(len(text) % 5) for text in completions]}
        train(
            config,
            load_policy(config),
            train_rows=prompts(),
            rewards=rewards,
            console=Console(STEPS, stream=io.StringIO()),
        )
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    values = [record[METRIC] for record in records if METRIC in record]
    if len(values) != STEPS:
        raise RuntimeError(f"{len(values)} of {STEPS} steps have {METRIC}")
    return float(values[-1])
