"""Two and four processes (gloo, CPU) take the step of one, with groups across ranks and with idle ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from batches import step_difference
from ports import free_port
from required import require
from torch_policies import parameters, policy
from torch_processes import run_processes

require(subject="torch")

import torch_rank_worker as worker

SMOOTH = {"learning_rate": 0.02, "betas": [0.0, 0.0], "eps": 1.0, "micro_batch_responses": 2, "strategy": "score"}


def run(size: int, folder: Path, out: Path, settings: dict[str, object]) -> dict[str, object]:
    """Starts `size` workers and waits; what rank 0 wrote."""
    out.mkdir()
    run_processes(size, "torch_rank_worker.py", [str(folder), str(out), json.dumps(settings)], out)
    read = lambda name: dict(np.load(out / f"{name}.npz"))
    return {
        "out": out,
        "one": read("one"),
        "two": read("two"),
        "three": read("three"),
        "found": read("found"),
    } | json.loads((out / "facts.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_models.make_model("llama-tied-bias", tmp_path_factory.mktemp("llama"))


LAYERS = 2
KINDS = {
    "full": {},
    "lora": {"lora_rank": 2, "learning_rate": 0.2},
    "checkpointing": {"gradient_checkpointing": True, "max_gradient_norm": 0.5},
}


@pytest.fixture(scope="module")
def one(folder, tmp_path_factory):
    made: dict[str, dict[str, object]] = {}

    def get(kind: str):
        if kind not in made:
            made[kind] = run(1, folder, tmp_path_factory.mktemp(kind) / "one", SMOOTH | KINDS[kind])
        return made[kind]

    return get


@pytest.mark.parametrize(
    ("size", "sharding", "kind"),
    [
        (2, "fsdp", "full"),
        pytest.param(2, "data_parallel", "full", marks=pytest.mark.slow),
        pytest.param(2, "fsdp", "checkpointing", marks=pytest.mark.slow),
        pytest.param(2, "fsdp", "lora", marks=pytest.mark.slow),
        pytest.param(2, "data_parallel", "lora", marks=pytest.mark.slow),
        pytest.param(4, "fsdp", "full", marks=pytest.mark.slow),
        pytest.param(4, "fsdp", "lora", marks=pytest.mark.slow),
    ],
)
def test_several_processes_take_the_step_of_one(size: int, sharding: str, kind: str, folder, one, tmp_path) -> None:
    alone = one(kind)
    both = run(size, folder, tmp_path / "two", SMOOTH | KINDS[kind] | {"sharding": sharding})
    assert both["ranks"] == size
    gathers = sum(both["collectives"].values())  # of a whole rollout
    assert gathers == 0 if sharding == "data_parallel" else 0 < gathers <= 2 * LAYERS + 1
    assert both["sharding"] == sharding
    assert both["parameters"] == alone["parameters"]
    start = parameters(policy(folder, **(KINDS[kind])))
    for name in ("one", "two", "three"):
        moved = [{p: values[name][p] - start[p] for p in start} for values in (alone, both)]
        assert step_difference(alone[name], both[name]) < 1e-5
        assert step_difference(*moved) < 1e-4
    for name, value in alone["found"].items():
        np.testing.assert_allclose(both["found"][name], value, rtol=1e-4, atol=1e-4, err_msg=name)
    assert both["tokens"] == alone["tokens"]
    # A checkpoint is of no number of ranks: one process goes on from theirs.
    of_policy = policy(folder, **(SMOOTH | KINDS[kind]))
    of_policy.restore(both["out"] / "checkpoint")
    worker.step(of_policy, [list(range(len(worker.OF)))])
    assert step_difference(both["three"], parameters(of_policy)) < 1e-5
    scored = policy(both["out"] / "export").logprobs(worker.OF)
    np.testing.assert_allclose(scored, both["found"]["scoredFalse"], rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "kind"), [(4, {}), (2, {"lora_rank": 2, "learning_rate": 0.2})], ids=["full-4", "lora-2"]
)
def test_shards_in_bfloat16_take_the_step_of_copies(size: int, kind: dict[str, object], folder, tmp_path) -> None:
    """Gathered in bfloat16 is cast by autocast: the same split of a batch gives the same step, shards or copies."""
    settings = SMOOTH | kind | {"dtype": "bfloat16"}
    copies, shards = (
        run(size, folder, tmp_path / sharding, settings | {"sharding": sharding})
        for sharding in ("data_parallel", "fsdp")
    )
    for name in ("one", "two", "three"):
        assert step_difference(copies[name], shards[name]) < 1e-5
    for name, value in copies["found"].items():
        np.testing.assert_allclose(shards["found"][name], value, rtol=1e-4, atol=1e-4, err_msg=name)
    # No comparison of samples: copies compute some products of a decoding step transposed, and 16-bit rounding differs.


ENDS = """
import os, signal, sys
import numpy as np
import torch
from gvpo_core.training.config import ModelConfig
from gvpo_torch.ranks import Ranks

sys.setswitchinterval(100)  # other threads get Python's lock only while the main thread waits

def pair(port):
    os.environ["MASTER_PORT"] = port
    started = []
    for rank in ("0", "1"):
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
        started.append(os.fork())
        if not started[-1]:
            signal.alarm(60)  # a process that hangs ends with -14
            return None
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in started]

how, *ports = sys.argv[1:]
for port in ports:
    statuses = pair(port)
    if statuses is None:
        ranks = Ranks(ModelConfig(device="cpu"))
        if how == "destroyed":
            model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
        for _ in range(50):
            ranks.gather(np.arange(3.0))
        if how == "destroyed":
            torch.distributed.destroy_process_group()
            del model  # holds the last reference to the process group
        break
    print(*statuses, flush=True)
"""


@pytest.mark.parametrize(
    ("how", "pairs"),
    [pytest.param(how, 5, marks=pytest.mark.slow) for how in ("left", "destroyed")],
)
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cannot put two processes on one core")
def test_processes_end(how: str, pairs: int, tmp_path) -> None:
    """pytorch/pytorch#190489: a thread of gloo that still holds a tensor aborts the process at its end, or hangs it."""
    (tmp_path / "ends.py").write_text(ENDS)
    cores = os.sched_getaffinity(0)
    env = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, str(tmp_path / "ends.py"), how, *(str(free_port()) for _ in range(pairs))]
    with subprocess.Popen(
        command, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as started:
        os.sched_setaffinity(started.pid, [min(cores)])
        out, error = started.communicate(timeout=900)
    assert out.split() == ["0"] * (2 * pairs), f"{out}\n{error}"


WAITS = """
import datetime, os, sys, time
import numpy as np
import torch.distributed as dist
from gvpo_core.training.config import ModelConfig
from gvpo_torch.ranks import Ranks

dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=2))
ranks = Ranks(ModelConfig(device="cpu"))
if ranks.rank == 1:
    time.sleep(4)
print(*ranks.gather(np.arange(ranks.rank + 1)))
"""


@pytest.mark.slow
def test_a_rank_waits_for_another_longer_than_the_default_group(tmp_path) -> None:
    (tmp_path / "waits.py").write_text(WAITS)
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    env |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    pair = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "waits.py")],
            env=os.environ | env | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    ended = [process.communicate(timeout=300) for process in pair]
    assert [out.split() for out, _ in ended] == [["0", "0", "1"]] * 2, ended
