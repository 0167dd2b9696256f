"""An engine and several ranks, and runs that are killed while it draws."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ranks
import table_run
from engine_server import Sent, Server
from killing import Forked, lasting
from sampler_runs import lines
from table_problem import PROMPTS, REFERENCE, reward, settings, table

from gvpo_core.training.config.file import read_config
from gvpo_core.training.loop import train
from gvpo_core.training.policy.load import load_policy
from gvpo_core.training.policy.table import TablePolicy
from gvpo_core.training.samplers import Engine

pytestmark = pytest.mark.core

ENGINE = '[engine]\nurl = "{url}"\nmodel = "tiny"\npause = 0.001\n'
SAMPLER = '[rollout]\nsampler = "engine"'


def ranked(place: Path, size: int, server: Server, **options) -> np.ndarray:
    """The table after two steps of two prompts on `size` ranks, each with an engine at one server."""
    config = settings(place)
    config = replace(config, run=replace(config.run, steps=2), rollout=replace(config.rollout, prompts=2))

    def work(policy):
        engine = Engine(server.url, "tiny", pause=0.001, **options)
        rows = [{"prompt": p} for p in PROMPTS]
        train(config, policy, train_rows=rows, rewards={"value": reward}, sampler=engine)

    policies = ranks.run_ranks(size, work, table(REFERENCE), config.optimizer)
    tables = [policy.log_table() for policy in policies]
    assert all(np.array_equal(tables[0], other) for other in tables)
    return tables[0]


def test_two_ranks_with_one_server_take_the_steps_of_one(tmp_path, capsys):
    with Server() as server:
        one, two = (ranked(tmp_path / str(size), size, server) for size in (1, 2))
        asked = sorted((body["prompt"], body["seed"], body["n"]) for body in server.asked)
    assert len(asked) == 8 and asked[::2] == asked[1::2], "a rank draws a whole group here: the requests are the same"
    np.testing.assert_allclose(one, two, rtol=1e-12)


def test_each_version_is_sent_once_for_any_number_of_ranks(tmp_path, capsys, monkeypatch):
    def export_adapters(policy, directory):
        if policy.rank == 0:
            Sent.export_adapters(policy, directory)

    monkeypatch.setattr(ranks.RankedTable, "export_adapters", export_adapters, raising=False)
    with Server() as server:
        ranked(tmp_path / "run", 2, server, weights="adapters", folder=tmp_path / "weights", gap_tolerance=1e-9)
        assert server.commands == ["/v1/load_lora_adapter"] * 2
        assert len({body["model"] for body in server.asked}) == 2 and len(server.asked) == 4


def test_weights_that_one_rank_cannot_write_end_all_by_name(tmp_path, capsys, monkeypatch):
    def export_adapters(policy, directory):
        if policy.rank == 1:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(ranks.RankedTable, "export_adapters", export_adapters, raising=False)
    with Server() as server, pytest.raises(Exception, match=r"the weights cannot be written to .*: No space left"):
        ranked(tmp_path / "run", 2, server, weights="adapters", folder=tmp_path / "weights")


def on_disk(folder: Path, server: Server) -> Path:
    config = table_run.make(folder, steps=8, extra=ENGINE.format(url=server.url))
    config.write_text(config.read_text().replace("[rollout]", SAMPLER))
    server.policy = load_policy(read_config(config))
    return config


@pytest.mark.parametrize("request_number", [1, 6, 9, 15])
def test_a_run_that_is_killed_with_requests_in_flight_resumes_bit_for_bit(request_number, tmp_path):
    """Two requests a step, of which the named one is under way at the SIGKILL; a checkpoint every two steps."""
    launch = Forked.of()
    with Server() as server:
        whole = launch(on_disk(tmp_path / "whole", server), tmp_path / "whole.txt")
        whole.process.join(120)
        assert whole.exit_status() == 0, (tmp_path / "whole.txt").read_text()
        server.asked, server.faults = [], [None] * (request_number - 1) + ["hold"]
        config = on_disk(tmp_path / "killed", server)
        killed = launch(config, tmp_path / "killed.txt")
        assert server.held.wait(60), (tmp_path / "killed.txt").read_text()
        killed.kill()
        assert killed.exit_status() == -9
        server.let_go.set()
        again = launch(config, tmp_path / "again.txt")
        again.process.join(120)
        assert again.exit_status() == 0, (tmp_path / "again.txt").read_text()
    assert lasting(tmp_path / "killed" / "run") == lasting(tmp_path / "whole" / "run")
    drawn = [
        [(c["step"], c["row"], c["response"]) for c in lines(settings(tmp_path / name / "run"), "completions")]
        for name in ("killed", "whole")
    ]
    assert drawn[0] == drawn[1] and len(drawn[0]) > 8
    tables = [load_policy(read_config(tmp_path / name / "config.toml")) for name in ("killed", "whole")]
    for policy, name in zip(tables, ("killed", "whole"), strict=True):
        policy.restore(tmp_path / name / "run" / "checkpoints" / "step-00000008" / "policy")
    assert np.array_equal(*(policy.log_table() for policy in tables)) and isinstance(tables[0], TablePolicy)
