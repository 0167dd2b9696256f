"""A sharded run on two processes, one of them killed again and again while a thread of each writes its shard."""

import itertools
import time
from pathlib import Path

import forks
import killing
import pytest
import tiny_models
import trainer_backends
from required import require
from torch_processes import PRELOAD, environments
from trainer_runs import write_run

require(subject="torch")
from safetensors.torch import load_file

from gvpo_core.training.run.checkpoint import newest_checkpoint, steps_saved

STEPS, KILLS = 6, 6


class TwoRanks:
    """`gvpo train` in two processes; `kill` kills one of them, in turns, and the other must end by itself."""

    turns = itertools.cycle((0, 1))

    def __init__(self, config: Path, log: Path) -> None:
        self.log = log
        self.processes = []
        for path, environment in zip((log, log.with_name("rank1.txt")), environments(2), strict=True):
            path.write_text("")
            run = forks.start(killing.train, (str(config),), path, environment=environment, preload=PRELOAD)
            self.processes.append(run)

    def has_spoken(self) -> bool:
        return "left state" in self.log.read_text()

    def exit_status(self) -> int | None:
        statuses = [process.exitcode for process in self.processes]
        if None in statuses:
            return None
        return min(statuses) or max(statuses)

    def kill(self) -> None:
        victim = next(self.turns)
        self.processes[victim].kill()
        try:
            self.processes[1 - victim].join(120)  # it waits for no dead process
            assert self.processes[1 - victim].exitcode is not None, "a rank waits for one that was killed"
        finally:
            for process in self.processes:
                process.kill()
                process.join()


def shards(folder: Path) -> dict[str, object]:
    """The tensors of the last checkpoint, by rank."""
    files = sorted((folder / "run" / "checkpoints" / f"step-{STEPS:08d}" / "policy").glob("*.safetensors"))
    assert [file.name for file in files] == [f"state-0000{n}-of-00002.safetensors" for n in (1, 2)]
    return {f"{n} {name}": tensor for n, file in enumerate(files) for name, tensor in load_file(file).items()}


def two_ranks(folder: Path, model: Path, steps: int) -> Path:
    """The config of a run that saves after each step."""
    backend = trainer_backends.BACKENDS["torch"]
    config = write_run(folder, backend, model, steps=steps, extra="", model_extra='sharding = "fsdp"')
    config.write_text(config.read_text().replace("checkpoint_every = 2", "checkpoint_every = 1"))
    return config


def test_a_rank_whose_peer_is_killed_ends_by_itself_and_leaves_a_checkpoint(tmp_path) -> None:
    model = tiny_models.make_model("llama", tmp_path / "model")
    run = TwoRanks(two_ranks(tmp_path, model, 10_000), tmp_path / "output.txt")
    checkpoints, end = tmp_path / "run" / "checkpoints", time.monotonic() + 120
    while not steps_saved(checkpoints) and run.exit_status() is None and time.monotonic() < end:
        time.sleep(0.01)
    assert run.exit_status() is None, run.log.read_text()
    run.kill()  # asserts that the other one ends
    saved = newest_checkpoint(checkpoints)
    assert saved is not None and saved.step >= 1
    shards_of = sorted(saved.policy.glob("state-*.safetensors"))
    assert len(shards_of) == 2 and all(load_file(file) for file in shards_of)


@pytest.mark.slow
def test_a_rank_killed_beside_a_save_loses_nothing_that_counts(tmp_path) -> None:
    """The run ends with the shards, records and responses of one that nothing stopped, to the bit."""
    model = tiny_models.make_model("llama", tmp_path / "model")
    configs = {name: two_ranks(tmp_path / name, model, STEPS) for name in ("whole", "killed")}
    whole = TwoRanks(configs["whole"], tmp_path / "whole" / "output.txt")
    for process in whole.processes:
        process.join(300)
    assert whole.exit_status() == 0, whole.log.read_text()
    run = tmp_path / "killed" / "run"
    hit = killing.kill_and_resume(configs["killed"], run, TwoRanks, kills=KILLS, seed=3, longest=1.0)
    assert hit["saving"] >= 2, f"too few kills fell into a save: {hit}"
    one, two = shards(tmp_path / "whole"), shards(tmp_path / "killed")
    assert one.keys() == two.keys() and all(tensor.equal(two[name]) for name, tensor in one.items())
    assert killing.lasting(run) == killing.lasting(tmp_path / "whole" / "run")
