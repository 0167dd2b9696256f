"""Checkpoints of sharded runs: each rank writes its shard, any number of ranks restores it, no rank holds the model."""

import json

import pytest
import tiny_models
from required import require

require(subject="torch")

import numpy as np
import torch
from fake_ranks import fake_ranks
from gvpo_torch import checkpoint, model, sharding
from gvpo_torch.deferred import own_rows
from gvpo_torch.update import make_optimizer
from live_bytes import LiveBytes
from safetensors.torch import load_file, save_file
from torch_policies import policy

from gvpo_core.training.config import ConfigError, ModelConfig, OptimizerConfig

CPU = torch.device("cpu")
SIZES = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 96}  # 96 rows on 5 ranks: uneven, as 3 on 4
KINDS = {"full": {}, "lora": {"lora_rank": 3}}
HEADER = {"step": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.make_model("llama-tied-bias", tmp_path_factory.mktemp("llama"), **SIZES)


class Rank:
    """The policy's state on one rank of `size`, after a step with gradients that depend on the row alone."""

    def __init__(self, folder, kind: str, seed: int = 0) -> None:
        config = ModelConfig(path=str(folder), device="cpu", **KINDS[kind])
        scorer = model.load_scorer(config, CPU, seed, deferred=True)
        sharding.cut(scorer, CPU)
        assert sharding.is_sharded(scorer)
        self.optimizer = make_optimizer(scorer, OptimizerConfig(learning_rate=0.1))
        self.named = {name.removeprefix("lm."): p for name, p in scorer.named_parameters() if p.requires_grad}

    def step(self) -> None:
        for p in self.named.values():
            first, end = own_rows(p)
            rows = torch.arange(first, end).view(-1, *[1] * (p.ndim - 1)).expand(p.to_local().shape)
            p.grad = torch.zeros_like(p)
            p.grad.to_local().copy_(rows + 1)
        self.optimizer.step()

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"{kind}.{name}": tensor.to_local()
            for name, p in self.named.items()
            for kind, tensor in checkpoint._tensors(p, self.optimizer).items()
        }


def save(folder, kind: str, size: int, out) -> dict[str, torch.Tensor]:
    """Saves as `size` ranks do; the whole tensors."""
    parts: dict[str, list[torch.Tensor]] = {}
    for rank in range(size):
        with fake_ranks(size, rank):
            of = Rank(folder, kind)
            of.step()
            written = checkpoint.saving(out, of.named, of.optimizer, HEADER, rank, size)()
            (name,) = written
            assert written[name].bytes == (out / name).stat().st_size
            for key, tensor in of.tensors().items():
                parts.setdefault(key, []).append(tensor.clone())
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


@pytest.mark.slow_on("2-5-lora")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("saved", "restored"), [(2, 1), (1, 4), (4, 2), (2, 5)])
def test_any_number_of_ranks_restores_what_another_saved(kind, saved, restored, folder, tmp_path) -> None:
    whole = save(folder, kind, saved, tmp_path)
    assert len(list(tmp_path.glob("state-*.safetensors"))) == saved
    header = json.loads((tmp_path / "state.json").read_text())
    assert len(whole) == 3 * len(header["steps"])
    seen = dict.fromkeys(whole, 0)
    for rank in range(restored):
        with fake_ranks(restored, rank):
            of = Rank(folder, kind, seed=7)
            checkpoint.restore(tmp_path, of.named, of.optimizer, header)
            for key, tensor in of.tensors().items():
                first, end = own_rows(of.named[key.partition(".")[2]])
                assert torch.equal(tensor, whole[key][first:end]), key
                seen[key] += len(tensor)
            assert {float(s["step"]) for s in of.optimizer.state.values()} == {1.0}
    assert seen == {key: len(tensor) for key, tensor in whole.items()}


def test_one_process_restores_what_ranks_saved_and_steps_on(folder, tmp_path) -> None:
    whole = save(folder, "full", 4, tmp_path)
    header = {**json.loads((tmp_path / "state.json").read_text()), "architecture": "LlamaForCausalLM", "lora_rank": 0}
    (tmp_path / "state.json").write_text(json.dumps(header))
    of_policy = policy(folder)
    of_policy.restore(tmp_path)
    for name, p in of_policy._named.items():
        assert torch.equal(p, whole[f"parameter.{name}"])
        assert torch.equal(of_policy._optimizer.state[p]["exp_avg_sq"], whole[f"exp_avg_sq.{name}"])


def test_saving_and_restoring_hold_a_tensor_and_not_the_model(folder, tmp_path) -> None:
    with fake_ranks(2, 0):
        of = Rank(folder, "full")
        of.step()
        shard = sum(t.nbytes for t in of.tensors().values())
        largest = max(p.to_local().nbytes for p in of.named.values())
        write = checkpoint.saving(tmp_path, of.named, of.optimizer, HEADER, 0, 2)
        with LiveBytes() as live:
            write()
        assert shard > 20 * largest
        assert live.most <= shard + 2 * largest
    with fake_ranks(2, 1):
        of = Rank(folder, "full")
        of.step()
        checkpoint.saving(tmp_path, of.named, of.optimizer, HEADER, 1, 2)()
        with LiveBytes() as live:
            checkpoint.restore(tmp_path, of.named, of.optimizer, json.loads((tmp_path / "state.json").read_text()))
        assert live.most <= shard + 4 * largest + sum(p.to_local().nbytes for p in of.named.values())


def test_rows_that_are_missing_or_there_twice_are_named(folder, tmp_path) -> None:
    save(folder, "full", 2, tmp_path)
    header = json.loads((tmp_path / "state.json").read_text())
    name = "parameter.model.norm.weight"
    first, second = (tmp_path / file for file in header["files"])
    of_policy = policy(folder)
    restore = lambda: checkpoint.restore(tmp_path, of_policy._named, of_policy._optimizer, header)
    before = {key: p.detach().clone() for key, p in of_policy._named.items()}
    kept, tensors = second.read_bytes(), load_file(second)
    key = next(key for key in tensors if key.endswith("norm.weight"))
    save_file({k: v for k, v in tensors.items() if k != key}, second, {"rows": _rows(kept)})
    with pytest.raises(ConfigError, match=rf"lacks rows of {key}: it has 32 of 64"):
        restore()
    second.write_bytes(first.read_bytes())
    with pytest.raises(ConfigError, match=r"lacks rows of .*, or has them twice: after row"):
        restore()
    for key, p in of_policy._named.items():
        np.testing.assert_array_equal(p.detach(), before[key])
    assert not of_policy._optimizer.state and name


def _rows(content: bytes) -> str:
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["rows"]
