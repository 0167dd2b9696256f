"""What stands beside the trainer, on a CUDA device: reward models, and weights for a server. nox -s gpu runs these."""

import base64
import os
import pickle
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import tiny_models
from required import require

require(subject="torch")
import torch

if not torch.cuda.is_available():
    if "gpu" in os.environ.get("GVPO_SUBJECTS", "").split(","):
        raise RuntimeError("no CUDA device on this machine")
    pytest.skip("no CUDA device: nox -s gpu runs these", allow_module_level=True)

import torch.distributed as dist
from gvpo_torch import transfer
from gvpo_torch.reward_model import Pair, RewardModel, train
from transformers import AutoConfig, AutoModelForSequenceClassification

from gvpo_core.training.config import ModelConfig, OptimizerConfig
from gvpo_core.training.rewards.worker.reward_model import Classifier

CUDA = torch.device("cuda", 0)
PAIRS = [
    Pair((5, 6, 7, 0), (5, 6, 8, 9, 10, 0)),
    Pair((20, 21, 0), (20, 0), 0.5),
    Pair((30, 31, 32, 33, 34, 35, 0), (30, 36, 0), 1.5),
]
NAMED = [("a", torch.arange(6.0).reshape(2, 3)), ("b", torch.arange(4.0)), ("c", torch.arange(40.0))]
# Another process: a device's memory is not opened by the process that shares it.
OPENS = """
import pickle, sys
import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor
(arguments,) = pickle.load(sys.stdin.buffer).values()
sys.stdout.buffer.write(rebuild_cuda_tensor(*arguments).cpu().numpy().tobytes())
"""


def test_the_built_in_reward_scores_as_on_the_cpu(tmp_path):
    config = AutoConfig.for_model("llama", **tiny_models.SMALL, num_labels=1, initializer_range=0.3)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tiny_models.make_tokenizer().save_pretrained(tmp_path)
    rows = [[5, 6, 7, 0], [8, 9, 10, 11]]
    on_cpu, on_cuda = (Classifier(str(tmp_path), device, "float32") for device in ("cpu", "cuda"))
    assert next(on_cuda.model.parameters()).is_cuda
    assert on_cuda.score(rows) == pytest.approx(on_cpu.score(rows), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_reward_model_learns_as_on_the_cpu(dtype, tmp_path):
    folder = tiny_models.write_model("llama", tmp_path, spread=0.2)
    losses = {}
    for device in ("cpu", "cuda"):
        model = RewardModel(ModelConfig(path=str(folder), device=device, dtype=dtype))
        torch.manual_seed(3)
        model.model.score.weight.data.copy_(torch.randn(model.model.score.weight.shape))
        assert next(model.model.parameters()).device.type == device
        if dtype == "float32":
            model.check([pair.chosen for pair in PAIRS])
        optimizer = OptimizerConfig(learning_rate=1e-3)
        losses[device] = [loss for _, loss, _ in train(model, PAIRS, optimizer, batch=3, epochs=5)]
    assert losses["cpu"][-1] < losses["cpu"][0]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3 if dtype == "float32" else 0.1)


def test_another_process_reads_the_tensors_of_cuda_ipc(monkeypatch):
    monkeypatch.setattr(transfer, "PART_BYTES", 64)
    channel = transfer.channel("ipc", CUDA, 1)
    assert channel.open("127.0.0.1", 0, 1) == {"packed": True}
    names = []
    for part in channel.parts((name, tensor.to(CUDA)) for name, tensor in NAMED):
        info = SimpleNamespace(**part.info)
        handle = base64.b64decode(info.ipc_handles_pickled)
        assert list(pickle.loads(handle)) == [str(torch.cuda.get_device_properties(CUDA).uuid)]  # noqa: S301 - made here
        done = subprocess.run([sys.executable, "-c", OPENS], input=handle, capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        content = torch.frombuffer(bytearray(done.stdout), dtype=torch.uint8)[: sum(info.tensor_sizes)]
        for name, piece in zip(info.names, content.split(info.tensor_sizes), strict=True):
            wanted = dict(NAMED)[name]
            assert torch.equal(piece.clone().view(wanted.dtype).reshape(wanted.shape), wanted), name
            names.append(name)
    assert names == [name for name, _ in NAMED]
    channel.close()


def test_nccl_broadcasts_and_says_when_it_has_ended():
    """On a communicator of this process alone: NCCL refuses two ranks on one device."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    sent = []

    class OfTorch:
        def broadcast(self, tensor, src, stream):
            with torch.cuda.stream(stream):
                dist.broadcast(tensor, src)
            sent.append(tensor)

        def destroy(self):
            sent.append(None)

    try:
        channel = transfer.NCCL(CUDA, lambda host, port, rank, size, device: OfTorch())
        channel.open("127.0.0.1", 0, 1)
        channel.join(time.monotonic() + 60)
        given = [(name, tensor.to(CUDA)) for name, tensor in NAMED]
        for part in channel.parts(iter(given)):
            part.carry(lambda: None)
        assert len(sent) == len(given)
        for tensor, (_, wanted) in zip(sent, NAMED, strict=True):
            assert tensor.is_cuda and torch.equal(tensor.cpu(), wanted)
        channel.close()
        assert sent[-1] is None
    finally:
        dist.destroy_process_group()
