"""A sharded run on two processes, one of them killed again and again while a thread of each writes its shard."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import killing
import pytest
import tiny_models
import trainer_backends
from ports import free_port
from required import require
from trainer_runs import write_run

require(subject="torch")
from safetensors.torch import load_file

STEPS, KILLS = 6, 6


class TwoRanks:
    """`gvpo train` in two processes; `kill` kills one of them, in turns, and the other must end by itself."""

    turns = itertools.cycle((0, 1))

    def __init__(self, config: Path, log: Path) -> None:
        self.log = log
        shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "gvpo_core.training.cli", "train", str(config)]
        self.processes = []
        for rank in range(2):
            with (log if rank == 0 else log.with_name("rank1.txt")).open("w") as f:
                env = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                self.processes.append(subprocess.Popen(command, env=env, stdout=f, stderr=subprocess.STDOUT))

    def has_spoken(self) -> bool:
        return "left state" in self.log.read_text()

    def exit_status(self) -> int | None:
        statuses = [process.poll() for process in self.processes]
        if None in statuses:
            return None
        return min(statuses) or max(statuses)

    def kill(self) -> None:
        victim = next(self.turns)
        self.processes[victim].kill()
        try:
            self.processes[1 - victim].wait(120)  # it waits for no dead process
        finally:
            for process in self.processes:
                process.kill()
                process.wait()


def shards(folder: Path) -> dict[str, object]:
    """The tensors of the last checkpoint, by rank."""
    files = sorted((folder / "run" / "checkpoints" / f"step-{STEPS:08d}" / "policy").glob("*.safetensors"))
    assert [file.name for file in files] == [f"state-0000{n}-of-00002.safetensors" for n in (1, 2)]
    return {f"{n} {name}": tensor for n, file in enumerate(files) for name, tensor in load_file(file).items()}


@pytest.mark.slow
def test_a_rank_killed_beside_a_save_loses_nothing_that_counts(tmp_path) -> None:
    """The run ends with the shards, records and responses of one that nothing stopped, to the bit."""
    model = tiny_models.make_model("llama", tmp_path / "model")
    for name in ("whole", "killed"):
        extra = 'sharding = "fsdp"'
        config = write_run(
            tmp_path / name, trainer_backends.BACKENDS["torch"], model, steps=STEPS, extra="", model_extra=extra
        )
        config.write_text(config.read_text().replace("checkpoint_every = 2", "checkpoint_every = 1"))
    whole = TwoRanks(tmp_path / "whole" / "config.toml", tmp_path / "whole" / "output.txt")
    assert [process.wait(300) for process in whole.processes] == [0, 0], whole.log.read_text()
    run = tmp_path / "killed" / "run"
    hit = killing.kill_and_resume(tmp_path / "killed" / "config.toml", run, TwoRanks, kills=KILLS, seed=3, longest=1.0)
    assert hit["saving"] >= 2, f"too few kills fell into a save: {hit}"
    one, two = shards(tmp_path / "whole"), shards(tmp_path / "killed")
    assert one.keys() == two.keys() and all(tensor.equal(two[name]) for name, tensor in one.items())
    assert killing.lasting(run) == killing.lasting(tmp_path / "whole" / "run")
