"""Tensors of the PyTorch policy for a server: gathered from ranks, and the trainer's ends of TCP, NCCL and CUDA IPC."""

import base64
import json
import pickle
import sys
import time
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import tiny_models
from required import require
from torch_processes import run_processes

from gvpo_core.training.config import ConfigError
from gvpo_core.training.samplers import channels
from gvpo_core.training.samplers.http import Failed

require(subject="torch")

import torch
from gvpo_torch import transfer
from safetensors.torch import load_file
from torch_policies import policy

GROUP = "vllm.distributed.weight_transfer.nccl_common"
NAMED = [("a", torch.arange(6.0).reshape(2, 3)), ("b", torch.arange(4, dtype=torch.bfloat16)), ("c", torch.tensor(5.0))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.make_model("llama-tied-bias", tmp_path_factory.mktemp("llama"))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"lora_rank": 2}], ids=["full", "lora"])
@pytest.mark.parametrize("sharding", ["fsdp", "data_parallel"])
def test_ranks_gather_what_one_process_exports(settings, sharding, folder, tmp_path):
    settings = settings | {"sharding": sharding}
    run_processes(2, "torch_transfer_worker.py", [str(folder), str(tmp_path), json.dumps(settings)], tmp_path)
    found, one = load_file(tmp_path / "tensors.safetensors"), policy(folder, seed=3, **settings)
    one.export(tmp_path / "exported")
    assert found.keys() == load_file(tmp_path / "exported" / "model.safetensors").keys()
    for name, tensor in load_file(tmp_path / "exported" / "model.safetensors").items():
        assert torch.equal(found[name], tensor), name


def test_the_bytes_of_a_tensor_are_its_rows():
    for _, tensor in [*NAMED, ("view", torch.arange(6.0).reshape(2, 3).t())]:
        content = torch.frombuffer(bytearray(transfer.as_bytes(tensor)), dtype=tensor.dtype)
        assert torch.equal(content, tensor.contiguous().reshape(-1))


def test_a_policy_sends_its_tensors_over_tcp(folder):
    of = policy(folder)
    parts = list(of.weight_channel("tcp").parts(of.tensors()))
    named = dict(of.tensors())
    assert [name for part in parts for name in part.info["names"]] == list(named)
    assert [shape for part in parts for shape in part.info["shapes"]] == [list(t.shape) for t in named.values()]
    assert {name for part in parts for name in part.info["dtype_names"]} == {"float32"}


@pytest.mark.parametrize("kind", ["nccl", "ipc"])
def test_a_cpu_has_neither_nccl_nor_ipc(kind):
    with pytest.raises(ConfigError, match=f"'{kind}' sends from an NVIDIA GPU, and the policy is on cpu"):
        transfer.channel(kind, torch.device("cpu"), 1)


def test_ipc_is_for_one_process_and_one_worker():
    with pytest.raises(ConfigError, match="shares the GPU of one process, and the run has 2"):
        transfer.channel("ipc", torch.device("cuda", 0), 2)
    channel = transfer.channel("ipc", torch.device("cuda", 0), 1)
    assert channel.open("", 0, 1) == {"packed": True}
    with pytest.raises(Failed, match="the server has 2 workers"):
        channel.open("", 0, 2)


def test_nccl_needs_vllm_beside_the_trainer(monkeypatch):
    monkeypatch.setitem(sys.modules, GROUP, None)
    with pytest.raises(ConfigError, match=r"needs vLLM 0\.32 or later beside the trainer"):
        transfer.channel("nccl", torch.device("cuda", 0), 1)


class Group:
    """As vLLM's communicator: tells what was broadcast."""

    def __init__(self, *place):
        self.place, self.sent, self.destroyed, self.disabled = place, [], 0, False

    def destroy(self):
        self.destroyed += 1


def nccl(monkeypatch, done=lambda: True, **facts):
    """A channel, made where a fake vLLM is installed, whose broadcasts end when `done` says so."""
    module, made = ModuleType(GROUP), []

    def make(*place):
        made.append(Group(*place))
        vars(made[-1]).update(facts)
        return made[-1]

    module.stateless_init_process_group = make
    for name in (GROUP, "vllm", "vllm.distributed", "vllm.distributed.weight_transfer"):
        monkeypatch.setitem(sys.modules, name, module if name == GROUP else ModuleType(name))

    def enqueue(channel, tensor):
        made[0].sent.append(tensor)
        return done

    monkeypatch.setattr(transfer.NCCL, "_enqueue", enqueue)
    channel = transfer.channel("nccl", torch.device("cuda", 1), 1)
    assert isinstance(channel, transfer.NCCL)
    return channel, made


def test_nccl_broadcasts_each_tensor_to_ranks_after_the_trainer(monkeypatch):
    channel, made = nccl(monkeypatch)
    info = channel.open("127.0.0.1", 0, 3)
    assert info.pop("master_port") > 0
    assert info == {"master_address": "127.0.0.1", "rank_offset": 1, "world_size": 4}
    channel.join(time.monotonic() + 10)
    assert made[0].place[2:] == (0, 4, torch.device("cuda", 1))
    turned = torch.arange(6.0).reshape(2, 3).t()
    (part,) = channel.parts(iter([*NAMED, ("turned", turned)]))
    part.carry(lambda: None)
    assert part.info["dtype_names"] == ["float32", "bfloat16", "float32", "float32"]
    assert part.info["shapes"] == [[2, 3], [4], [], [3, 2]]
    assert all(t.is_contiguous() for t in made[0].sent) and torch.equal(made[0].sent[3], turned)
    channel.close()
    assert made[0].destroyed == 1


def test_a_broadcast_that_no_worker_answers_is_ended(monkeypatch):
    channel, _ = nccl(monkeypatch, done=lambda: False)
    channel.open("127.0.0.1", 5, 1)
    channel.join(time.monotonic() + 10)
    (part,) = channel.parts(iter(NAMED))
    looks = iter([None, None, Failed("refused", again=True)])

    def watch():
        if error := next(looks):
            raise error

    with pytest.raises(Failed, match="refused"):
        part.carry(watch)


def test_a_disabled_communicator_is_named(monkeypatch):
    channel, _ = nccl(monkeypatch, disabled=True)
    channel.open("127.0.0.1", 5, 1)
    with pytest.raises(Failed, match="NCCL communicator is disabled"):
        channel.join(time.monotonic() + 10)


def test_ipc_packs_tensors_of_one_type_into_its_buffer(monkeypatch):
    monkeypatch.setattr(transfer, "PART_BYTES", 32)
    shared = []

    def share(channel, buffer):
        shared.append(buffer)
        return {"gpu": ("handle", len(shared))}

    monkeypatch.setattr(transfer.IPC, "_shared", share)
    monkeypatch.setattr(transfer.IPC, "_synchronize", lambda channel: None)
    channel, given = transfer.IPC(torch.device("cpu")), [*NAMED, ("large", torch.arange(20.0)), ("d", torch.ones(4))]
    found = {}
    for part in channel.parts(iter(given)):
        info = SimpleNamespace(**part.info)
        handle = pickle.loads(base64.b64decode(info.ipc_handles_pickled))  # noqa: S301 - made here
        assert len(set(info.dtype_names)) == 1
        content = shared[handle["gpu"][1] - 1][: sum(info.tensor_sizes)].clone()
        for name, dtype, shape, piece in zip(
            info.names, info.dtype_names, info.shapes, content.split(info.tensor_sizes), strict=True
        ):
            found[name] = piece.view(getattr(torch, dtype)).reshape(shape)
    assert list(found) == [name for name, _ in given] and len(shared) == 2
    assert all(torch.equal(found[name], tensor) for name, tensor in given)
    channel.finished()
    assert channel._buffer.numel() == 0


def test_parts_hold_little_more_than_their_size(monkeypatch):
    monkeypatch.setattr(channels, "PART_BYTES", 40)
    sizes = [len(part) for part in channels.collected(((str(i), np.zeros(2)) for i in range(7)), lambda a: a.nbytes)]
    assert sizes == [2, 2, 2, 1]
