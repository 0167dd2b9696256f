"""Sharded runs read their weights in parts: to the bit those of from_pretrained, and no rank reads another's rows."""

import logging

import numpy as np
import pytest
import tiny_models
from required import require

require(subject="torch")

import torch
from fake_ranks import fake_ranks
from gvpo_torch import deferred, model, sharding
from gvpo_torch.weights import pretrained
from live_bytes import LiveBytes

from gvpo_core.training.config import ModelConfig

CPU = torch.device("cpu")
SPLIT = {"num_hidden_layers": 6, "hidden_size": 64, "intermediate_size": 256}  # the largest tensor is 1/23 of the model
# phi3 and gpt2 have fused and transposed weights, the others experts that transformers merges in ways of their own.
FAMILIES = ("llama-tied-bias", "phi3", "gpt2", "qwen3_moe", "mixtral", "dbrx", "gpt_oss", "minimax", "longrope")


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_read_alone_are_those_of_the_whole_model(name: str, tmp_path) -> None:
    made = tiny_models.make_model(name, tmp_path)
    config = ModelConfig(path=str(made))
    for dtype in (torch.float32, torch.bfloat16):
        whole, parts = pretrained(config, dtype), pretrained(config, dtype, deferred=True)
        named = dict(parts.named_parameters())
        assert named and all(hasattr(p, "deferred") for p in named.values())
        assert [*named] == [name for name, _ in whole.named_parameters()]
        for key, p in whole.named_parameters():
            values, cut = named[key].deferred, len(p) // 3
            assert (named[key].dtype, named[key].requires_grad) == (p.dtype, p.requires_grad)
            for rows in (slice(None), slice(0, cut), slice(cut, len(p))):
                read = values.rows(rows.start, rows.stop).to(p.dtype)
                assert torch.equal(read, p[rows]), f"{key} {rows}"
        buffers = dict(parts.named_buffers())
        assert all(torch.equal(b, buffers[key]) for key, b in whole.named_buffers())
        assert buffers.keys() == dict(whole.named_buffers()).keys()
        assert parts.config.to_dict() == whole.config.to_dict()
        assert parts.generation_config.to_dict() == whole.generation_config.to_dict()


def test_files_in_16_bits_become_float32_masters(tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    made = tiny_models.make_model("qwen3_moe", tmp_path / "float32")
    AutoModelForCausalLM.from_pretrained(made, dtype=torch.bfloat16).save_pretrained(tmp_path / "bfloat16")
    config = ModelConfig(path=str(tmp_path / "bfloat16"))
    parts = dict(pretrained(config, torch.float32, deferred=True).named_parameters())
    for name, p in pretrained(config, torch.float32).named_parameters():
        assert p.dtype == torch.float32 and torch.equal(parts[name].deferred.rows(), p)


def test_weights_changed_in_place_are_read_whole_and_logged(tmp_path, monkeypatch, caplog) -> None:
    from transformers.core_model_loading import MergeModulelist

    convert = MergeModulelist.convert

    def in_place(self, *args, **options):
        return {name: tensor.mul_(2.0) for name, tensor in convert(self, *args, **options).items()}

    monkeypatch.setattr(MergeModulelist, "convert", in_place)
    config = ModelConfig(path=str(tiny_models.make_model("qwen3_moe", tmp_path)))
    whole = dict(pretrained(config, torch.float32).named_parameters())
    with caplog.at_level(logging.WARNING, "gvpo.torch"):
        other = dict(pretrained(config, torch.float32, deferred=True).named_parameters())
    assert "each process reads the whole model before it keeps its part (" in caplog.text
    assert not any(hasattr(p, "deferred") for p in other.values())
    assert all(torch.equal(p, other[name]) for name, p in whole.items())


@pytest.mark.slow_on("4-qwen3_moe")
@pytest.mark.parametrize("kind", [{}, {"lora_rank": 2}], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_holds_its_part_of_the_model_and_reads_no_other(
    name: str, size: int, kind, tmp_path, monkeypatch
) -> None:
    made = tiny_models.make_model(name, tmp_path, **SPLIT)
    read: list[int] = []
    of_file = deferred._of_file

    def counted(*args):
        tensor = of_file(*args)
        made_by = tensor.made

        def rows(first, end):
            values = made_by(first, end)
            read.append(values.numel())
            return values

        tensor.made = rows
        return tensor

    monkeypatch.setattr(deferred, "_of_file", counted)
    config = ModelConfig(path=str(made), device="cpu", dtype="bfloat16", **kind)
    sizes, read_by_rank = set(), []
    for rank in range(size):
        with fake_ranks(size, rank), LiveBytes() as live:
            scorer = model.load_scorer(config, CPU, 0, deferred=True)
            assert deferred.unread(scorer)
            sharding.cut(scorer, CPU)
            assert sharding.is_sharded(scorer)
            whole = sum(p.nbytes for p in scorer.parameters())
            largest = max(p.nbytes for p in scorer.parameters())
            adapters = sum(p.nbytes for name, p in scorer.named_parameters() if ".lora_" in name)
            of_files = sum(p.numel() for name, p in scorer.named_parameters() if ".lora_" not in name)
            assert live.most <= 1.2 / size * whole + 2 * largest + adapters
            sizes.add(of_files)
            read_by_rank.append(sum(read))
            read.clear()
    assert {sum(read_by_rank)} == sizes, "the ranks together read the files more than once, or not whole"
    assert max(read_by_rank) <= 1.1 * min(sizes) / size


@pytest.mark.parametrize("left", ["all", "layers"])
def test_what_was_not_sharded_is_an_error(left: str, tmp_path, monkeypatch) -> None:
    """As a library would that leaves FSDP aside on this device: the ranks would train copies that drift apart."""
    made = tiny_models.make_model("llama", tmp_path)
    plain = sharding.fully_shard
    skipped = lambda module: left == "all" or isinstance(module, list) or module is not scorer
    monkeypatch.setattr(sharding, "fully_shard", lambda m, **o: m if skipped(m) else plain(m, **o))
    with fake_ranks(2):
        scorer = model.load_scorer(ModelConfig(path=str(made), device="cpu"), CPU, 0, deferred=True)
        what = "Scorer whole .3 of 3 modules" if left == "all" else "LlamaDecoderLayer whole .2 of 3 modules"
        with pytest.raises(RuntimeError, match=f"fully_shard left {what}.*expected FSDPModule"):
            sharding.cut(scorer, CPU)


def test_a_sharded_model_is_the_model_and_so_is_its_reference(tmp_path) -> None:
    """One rank of one: FSDP2 shards into one part, and its gathers are true."""
    import torch.distributed as dist

    made = tiny_models.make_model("llama-tied-bias", tmp_path / "m")
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        for load in (
            lambda **more: model.load_scorer(ModelConfig(path=str(made), device="cpu"), CPU, 0, **more),
            lambda **more: model.load_reference(ModelConfig(path=str(made), dtype="bfloat16"), CPU, **more),
        ):
            whole, shards = load(), load(deferred=True)
            sharding.shard(shards, CPU)
            assert sharding.is_sharded(shards) and shards.head_options == whole.head_options
            named = dict(shards.named_parameters())
            assert named.keys() == dict(whole.named_parameters()).keys()
            for name, p in whole.named_parameters():
                assert named[name].dtype == p.dtype and torch.equal(named[name].full_tensor(), p)
            ids = torch.tensor([[1, 2, 3, 4]])
            with torch.no_grad(), shards.autocast():
                own = shards.own_logits(ids)
                np.testing.assert_array_equal(own.float().numpy(), whole.own_logits(ids).float().numpy())
    finally:
        dist.destroy_process_group()
