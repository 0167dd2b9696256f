"""What a checkpoint of a sharded run costs a rank: bytes written, bytes read to hash, and host memory.

The ranks' parts are saved and restored one after another in one process, since no collective is needed.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from gvpo_torch import checkpoint, model, sharding
from gvpo_torch.deferred import own_rows
from gvpo_torch.update import make_optimizer

from benchmarks.scale.table import Count
from gvpo_core.training.config import ModelConfig, OptimizerConfig
from gvpo_core.training.run import checkpoint as run_checkpoint

sys.path.insert(0, str(Path(__file__).parents[2] / "conformance" / "support"))
import tiny_models
from fake_ranks import fake_ranks
from live_bytes import LiveBytes

SAVED, RESTORED = 4, 2
SIZES = {"num_hidden_layers": 12, "hidden_size": 128, "intermediate_size": 512}
CPU = torch.device("cpu")


def counts() -> Iterator[Count]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = tiny_models.make_model("llama", folder / "model", **SIZES)
        partial = run_checkpoint.begin_checkpoint(folder, 1)
        written, held, shards = {}, [], []
        for rank in range(SAVED):
            with fake_ranks(SAVED, rank):
                _, named, optimizer = _rank(made, step=True)
                write = checkpoint.saving(partial.policy, named, optimizer, {}, rank, SAVED)
                with LiveBytes() as live:
                    written |= write()
                shards.append(_bytes(named, optimizer))
                held.append(live.most / shards[-1])
        tensors = [digest.bytes for name, digest in written.items()]
        read: list[int] = []
        sha256 = run_checkpoint._sha256
        run_checkpoint._sha256 = lambda path: read.append(path.stat().st_size) or sha256(path)  # type: ignore[func-returns-value]
        run_checkpoint.read_back(partial.policy, written)
        known = {f"policy/{name}": digest for name, digest in written.items()}
        final = run_checkpoint.commit_checkpoint(folder, 1, 1, written=known)
        run_checkpoint._sha256 = sha256
        on = f"tiny llama, {SAVED} ranks"
        busiest = max(tensors) / sum(tensors)
        yield Count("bytes written by the busiest rank / bytes of the checkpoint", on, "", 1.0, busiest, 0.26)
        hashed = sum(read) / sum(tensors)
        yield Count("bytes read to hash a checkpoint / bytes of the checkpoint", on, "", 2.0, hashed, 1.01)
        yield Count("peak host bytes to write a shard / bytes of the shard", on, "", None, max(held), 1.05)
        header, peaks = json.loads((final.policy / "state.json").read_text()), []
        for rank in range(RESTORED):
            with fake_ranks(RESTORED, rank):
                _scorer, named, optimizer = _rank(made)
                with LiveBytes() as live:
                    checkpoint.restore(final.policy, named, optimizer, header)
                assert len(optimizer.state) == len(named)
                peaks.append(live.most / _bytes(named, optimizer))
        on = f"tiny llama, saved by {SAVED} ranks, restored by {RESTORED}"
        yield Count("peak host bytes to restore a shard / bytes of the shard", on, "", None, max(peaks), 1.2)


def _rank(folder: Path, step: bool = False) -> tuple[object, dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
    """Returns a rank's model, its parameters, and its optimizer after a step."""
    scorer = model.load_scorer(ModelConfig(path=str(folder), device="cpu"), CPU, 0, deferred=True)
    sharding.cut(scorer, CPU)
    assert sharding.is_sharded(scorer)
    optimizer = make_optimizer(scorer, OptimizerConfig())
    named = dict(scorer.named_parameters())
    for p in named.values() if step else ():
        first, end = own_rows(p)
        p.grad = torch.ones_like(p) if first < end else torch.zeros_like(p)
    optimizer.step()
    return scorer, named, optimizer


def _bytes(named: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    tensors = [t for p in named.values() for t in checkpoint._tensors(p, optimizer).values()]
    return sum(checkpoint._local(t).nbytes for t in tensors)
