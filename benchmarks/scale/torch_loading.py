"""Peak host bytes of a rank while it loads a sharded model.

Loads a model of a few megabytes as each of 4 ranks does. Loading needs no collectives, so they are fake.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from gvpo_torch import deferred, model, sharding

from benchmarks.scale.table import Count
from gvpo_core.training.config import ModelConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "conformance" / "support"))
import tiny_models
from fake_ranks import fake_ranks
from live_bytes import LiveBytes

RANKS = 4
SIZES = {"num_hidden_layers": 12, "hidden_size": 128, "intermediate_size": 512}
CPU = torch.device("cpu")
BEFORE = {"llama": 1.496, "qwen3_moe": 1.173, "reference": 1.007}  # the same ratios at commit 8a31fac


def counts() -> Iterator[Count]:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("llama", "qwen3_moe"):
            made = tiny_models.make_model(name, Path(folder) / name, **SIZES)
            config = ModelConfig(path=str(made), device="cpu", dtype="bfloat16")
            peaks = [_load(config, rank, model.load_scorer, 0) for rank in range(RANKS)]
            on = f"tiny {name}, {RANKS} ranks"
            ratio = "peak host bytes of a rank loading the model / bytes of the model in float32"
            yield Count(ratio, on, "", BEFORE[name], max(peaks), 1.2 / RANKS)
        peaks = [_load(config, rank, model.load_reference) for rank in range(RANKS)]
        ratio = "peak host bytes of a rank loading the reference / bytes of the model in float32"
        yield Count(ratio, on, "", BEFORE["reference"], max(peaks), 1.2 / RANKS)


def _load(config: ModelConfig, rank: int, load: object, *arguments: int) -> float:
    """Returns peak bytes / bytes of the model in float32."""
    with fake_ranks(RANKS, rank), LiveBytes() as live:
        scorer = load(config, CPU, *arguments, deferred=True)  # type: ignore[operator]
        assert deferred.unread(scorer), "the whole model was read"
        sharding.cut(scorer, CPU)
        assert sharding.is_sharded(scorer)
    return live.most / sum(4 * p.numel() for p in scorer.parameters())
