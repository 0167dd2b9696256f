"""A server that goes away and comes back, with or without what was sent: it costs the run time, and no response."""

import json
import logging
import os
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import ranks
from engine_server import Sent, Server
from sampler_runs import lines, run, short
from table_problem import PROMPTS, REFERENCE, reward, table
from transfer_server import SendingTable, TransferServer

from gvpo_core.training import loop
from gvpo_core.training.cli import main
from gvpo_core.training.loop import train
from gvpo_core.training.policy.table import TablePolicy
from gvpo_core.training.samplers import Engine, SamplerError

pytestmark = pytest.mark.core
WAYS = ["kept", "adapters", "model", "tcp", "sglang adapters", "sglang model"]
ROWS = [{"prompt": p} for p in PROMPTS]


class Way:
    """How weights reach a fake server, and what is done to it before the weights of step 2 are sent."""

    def __init__(self, way, tmp_path, steps=4, **config):
        self.way, self.kind, self.weights = way, "sglang" if "sglang" in way else "server", way.split()[-1]
        self.folder, self.config = tmp_path / "weights", short(tmp_path / "run", steps)
        self.config = replace(self.config, rollout=replace(self.config.rollout, **config))

    def server(self):
        return TransferServer() if self.way == "tcp" else Server()

    def policy(self):
        kinds = {"tcp": SendingTable, "kept": TablePolicy}
        return kinds.get(self.way, Sent)(table(REFERENCE), self.config.optimizer)

    def engine(self, server, before=lambda server: None, **options):
        given = {"weights": self.weights, "folder": self.folder, "kind": self.kind}
        if self.way in ("tcp", "kept"):
            given = {"weights": "model", "transfer": "tcp"} if self.way == "tcp" else {}
        if self.way != "kept":
            given["gap_tolerance"] = 1e-9  # the weights of each step, to rounding

        class Before(Engine):
            def refresh(self, policy, version):
                if version == 1 and not getattr(self, "once", False):
                    self.once = True
                    before(server)
                super().refresh(policy, version)

        return Before(server.url, "tiny", **{"pause": 0.001, "tries": 1, "deadline": 60.0} | given | options)

    def trained(self, before=lambda server: None, **options):
        """The table after the run."""
        policy = self.policy()
        with self.server() as server:
            run(self.config, self.engine(server, before, **options), policy)
        return policy.log_table()

    def lost(self):
        return [m["responses/lost"] for m in lines(self.config, "metrics") if m["kind"] == "train"]


@pytest.mark.slow_on("sglang adapters", "sglang model")
@pytest.mark.parametrize("way", WAYS)
def test_a_server_that_is_away_for_a_while_is_waited_for(way, tmp_path, capsys, caplog):
    expected = Way(way, tmp_path / "whole").trained()
    caplog.clear()
    parts = Way(way, tmp_path / "away")
    assert np.array_equal(parts.trained(lambda server: server.away(1.0)), expected)
    assert parts.lost() == [0] * 4
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    waits = [line for line in said if "waiting for the server for up to" in line]
    assert len(waits) == 1 and "refused" in waits[0], said
    assert sum("answers again, after" in line for line in said) == 1, said


def restarts(way, at):
    """A server that is started again before it answers the request of this number that asks for responses."""

    class Restarts(TransferServer if way == "tcp" else Server):
        number = 0

        def arrives(self):
            self.number += 1
            if self.number == at:
                self.restart()

    return Restarts()


@pytest.mark.parametrize("way", ["adapters", "model", "tcp"])
@pytest.mark.parametrize("request_number", [4, 5, 6])
def test_what_a_server_drew_without_the_weights_of_the_step_is_drawn_again(way, request_number, tmp_path, capsys):
    """Three requests a step: it is started again before the first, the second or the third one of step 2."""
    expected = Way(way, tmp_path / "whole").trained()
    parts, policy = Way(way, tmp_path / "parts"), None
    policy = parts.policy()
    with restarts(way, request_number) as server:
        run(parts.config, parts.engine(server), policy)
        assert server.number > 4 * 3, "nothing was drawn again"
    assert np.array_equal(policy.log_table(), expected) and parts.lost() == [0] * 4


def test_a_restart_of_sglang_within_a_step_is_seen_in_its_answers(tmp_path, capsys):
    parts = Way("sglang model", tmp_path)
    asked = parts.config.rollout.prompts * parts.config.rollout.responses

    class Restarts(Server):
        def arrives(self):
            if len(self.asked) == asked + 5 and self.version != "default":
                self.restart()

    with Restarts() as server:
        run(parts.config, parts.engine(server, concurrency=1), parts.policy())
        assert server.commands.count("/update_weights_from_disk") == 5 and len(server.asked) > 4 * asked
    assert parts.lost() == [0] * 4


def test_a_restart_while_the_weights_are_loaded_is_seen(tmp_path, capsys):
    """After the reload, before the cache is emptied: every command succeeds, and the weights are not there."""
    parts = Way("model", tmp_path)

    class Restarts(Server):
        once = False

        def process_request(self, request, address):
            if self.commands[-1:] == ["/collective_rpc"] and not self.once:
                self.once = True
                self.restart()
            super().process_request(request, address)

    with Restarts() as server:
        run(parts.config, parts.engine(server), parts.policy())
        assert server.once and server.commands.count("/collective_rpc") == 5
    assert parts.lost() == [0] * 4


def test_a_server_that_tells_no_version_takes_weights_all_the_same(tmp_path, capsys):
    parts = Way("model", tmp_path)
    with parts.server() as server:
        server.version = None
        run(parts.config, parts.engine(server), parts.policy())
        assert server.commands.count("/collective_rpc") == 4


@pytest.mark.parametrize("fault", [500, 429, 503])
def test_a_server_that_answers_with_errors_alone_is_asked_again_until_the_deadline(fault, tmp_path, capsys):
    """As an engine that has died does until its process ends."""
    expected = Way("kept", tmp_path / "whole").trained()
    parts = Way("kept", tmp_path / "parts")
    with parts.server() as server:
        server.faults = [fault] * 9
        policy = parts.policy()
        run(parts.config, parts.engine(server, concurrency=3), policy)
    assert np.array_equal(policy.log_table(), expected) and parts.lost() == [0] * 4


@pytest.mark.slow_on("kept")
@pytest.mark.parametrize("way", ["kept", "adapters", "model", "tcp"])
def test_after_the_deadline_the_run_ends_by_name(way, tmp_path, capsys):
    wanted = {"kept": r"the sampler gave none of \d+ responses; .*refused", "tcp": "not sent by tcp.*refused"}
    start = time.monotonic()
    with pytest.raises(SamplerError, match=wanted.get(way, "the weights were not loaded .*refused")):
        Way(way, tmp_path).trained(lambda server: server.away(30), deadline=1.5)
    assert 1 < time.monotonic() - start < 15


@pytest.mark.parametrize("way", ["model", "tcp"])
def test_a_server_that_loses_the_weights_again_and_again_ends_the_run_by_name(way, tmp_path, capsys):
    parts = Way(way, tmp_path)

    class Restarts(TransferServer if way == "tcp" else Server):
        def arrives(self):
            self.restart()

    with (
        Restarts() as server,
        pytest.raises(SamplerError, match=r"of the weights that were sent; .* has the weights 'default'; sent were '"),
    ):
        run(parts.config, parts.engine(server, deadline=1.5), parts.policy())


def signalled(config, sampler, policy, server):
    """Trains, and sends SIGTERM once the server is away. Returns: the result."""

    def send():
        server.gone.wait(60)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)

    server.gone = threading.Event()
    thread = threading.Thread(target=send)
    thread.start()
    result = train(config, policy, train_rows=ROWS, rewards={"value": reward}, sampler=sampler)
    thread.join()
    return result


def goes(server):
    server.away(3600)
    server.gone.set()


@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize("way", ["kept", "adapters", "model", "tcp"])
def test_a_signal_while_the_server_is_away_saves_and_leaves(way, ahead, tmp_path, capsys):
    whole = Way(way, tmp_path / "whole", ahead=ahead)
    expected = whole.trained()
    parts = Way(way, tmp_path / "parts", ahead=ahead)
    start = time.monotonic()
    with parts.server() as server:
        result = signalled(parts.config, parts.engine(server, goes, deadline=600.0), parts.policy(), server)
    done = {1, 2, 3} if way == "kept" and ahead else {1}  # what was drawn before the server went away is used
    assert result.exit_status == 143 and result.step in done and time.monotonic() - start < 30
    assert [m["event"] for m in lines(parts.config, "metrics") if m["kind"] == "event"] == ["stop"]
    with parts.server() as server:
        policy = parts.policy()
        sampler = parts.engine(server)
        result = train(parts.config, policy, train_rows=ROWS, rewards={"value": reward}, sampler=sampler)
    assert (result.exit_status, result.step) == (0, 4) and parts.lost() == [0] * 4
    if not ahead or way == "kept":  # else the weights of the responses that did not come are gone
        assert np.array_equal(policy.log_table(), expected)


@pytest.mark.parametrize("weights", ["kept", "adapters"])
def test_a_signal_ends_both_ranks_after_the_same_step(weights, tmp_path, capsys, monkeypatch):
    """Both wait for the server to draw, or the main rank to send the weights."""

    def export_adapters(policy, directory):
        if policy.rank == 0:
            Sent.export_adapters(policy, directory)

    monkeypatch.setattr(ranks.RankedTable, "export_adapters", export_adapters, raising=False)
    heard, results = threading.Event(), []
    monkeypatch.setattr(loop, "StopRequest", lambda: ranks.Stops(heard))
    config = Way("kept", tmp_path).config
    config = replace(config, rollout=replace(config.rollout, prompts=2))
    with Server() as server:

        class Goes(Engine):
            def refresh(self, policy, version):
                if version == 1 and policy.rank == 0:
                    server.away(3600)
                    threading.Timer(1.0, heard.set).start()
                policy.gather(np.zeros(1))  # both know that it is gone
                super().refresh(policy, version)

        def work(policy):
            place = {} if weights == "kept" else {"weights": weights, "folder": tmp_path / "weights"}
            sampler = Goes(server.url, "tiny", pause=0.001, deadline=60.0, **place)
            results.append(train(config, policy, train_rows=ROWS, rewards={"value": reward}, sampler=sampler))

        ranks.run_ranks(2, work, table(REFERENCE), config.optimizer)
    assert [(result.exit_status, result.step) for result in results] == [(143, 1)] * 2
    assert (tmp_path / "run" / "checkpoints" / "step-00000001").is_dir()


def test_a_signal_during_an_evaluation_without_a_server_keeps_the_step(tmp_path, capsys):
    parts = Way("adapters", tmp_path)
    config = replace(parts.config, evaluation=replace(parts.config.evaluation, sampler="rollout", every=1))
    with parts.server() as server:
        sampler, policy = parts.engine(server, goes), parts.policy()
        sampler_rows = {"train_rows": ROWS, "evaluation_rows": ROWS, "rewards": {"value": reward}}

        def send():
            server.gone.wait(60)
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGTERM)

        server.gone = threading.Event()
        threading.Thread(target=send).start()
        result = train(config, policy, sampler=sampler, **sampler_rows)
    assert (result.exit_status, result.step) == (143, 1)
    kinds = [(m["kind"], m["step"]) for m in lines(config, "metrics")]
    assert kinds == [("eval", 0), ("train", 1), ("event", 1)]


def test_a_collection_that_is_stopped_without_its_server_keeps_its_steps(tmp_path, capsys):
    import table_run

    from gvpo_core.training.config.file import read_config
    from gvpo_core.training.policy.load import load_policy

    with Server() as server:
        extra = f'[engine]\nurl = "{server.url}"\nmodel = "tiny"\npause = 0.001\n'
        config = table_run.make(tmp_path, steps=4, extra=extra)
        config.write_text(config.read_text().replace("[rollout]", '[rollout]\nsampler = "engine"'))
        server.policy = load_policy(read_config(config))

        def ends():
            while len(server.asked) < 2:
                time.sleep(0.01)
            server.away(3600)
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGTERM)

        server.delay = 0.2
        threading.Thread(target=ends).start()
        out = tmp_path / "out.jsonl"
        assert main(["collect", str(config), str(out)]) == 143
    kept = [json.loads(line) for line in (tmp_path / "out.jsonl.partial").read_text().splitlines()]
    assert {row["step"] for row in kept} <= {1, 2} and "the same command continues" in capsys.readouterr().out
