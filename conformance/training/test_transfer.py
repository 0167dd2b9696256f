"""Weights into the memory of a server: each step has its own, and what fails is tried again or ends by name."""

import socket
import time
from dataclasses import replace

import numpy as np
import pytest
import ranks
from engine_server import Sent, Server
from sampler_runs import lines, run, short
from table_problem import PROMPTS, REFERENCE, reward, settings, table
from transfer_server import SendingTable, Sends, TransferServer

from gvpo_core.training.config import ConfigError
from gvpo_core.training.loop import train
from gvpo_core.training.policy.table import TablePolicy
from gvpo_core.training.samplers import Engine, SamplerError, channels
from gvpo_core.training.samplers.http import Failed

pytestmark = pytest.mark.core
UPDATE = ["/pause?mode=wait", "/update_weight_version", "/start_weight_update", "/update_weights"]
UPDATE += ["/finish_weight_update", "/reset_prefix_cache", "/resume"]
CONNECT = ["/shutdown_weight_transfer_engine", "/init_weight_transfer_engine"]


def engine(server, **options):
    given = {"weights": "model", "transfer": "tcp", "gap_tolerance": 1e-9, "pause": 0.001, "deadline": 20.0}
    return Engine(server.url, "tiny", **given | options)


def sends(tmp_path, server, steps=3, **options):
    config = short(tmp_path, steps)
    run(config, engine(server, **options), SendingTable(table(REFERENCE), config.optimizer))
    return config


@pytest.mark.parametrize("workers", [1, 2])
def test_the_engine_has_the_weights_of_each_step(workers, tmp_path, capsys):
    with TransferServer(workers) as server:
        config = sends(tmp_path, server)
        assert server.commands == [*CONNECT, *UPDATE * 3]
        assert server.version.endswith("-2") and server.parts == [[f"rows.{x}" for x in range(3)]] * 3
    assert {line["version"] for line in lines(config, "completions")} == {0, 1, 2}
    assert "model sent before each step by tcp" in " ".join(capsys.readouterr().out.split())


def test_tensors_come_in_parts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(channels, "PART_BYTES", 5 * 8)  # a row
    with TransferServer() as server:
        sends(tmp_path, server, steps=1)
        assert server.parts == [["rows.0"], ["rows.1"], ["rows.2"]]


def test_weights_that_were_not_sent_stop_the_run(tmp_path, capsys, monkeypatch):
    with TransferServer() as server:
        monkeypatch.setattr(server, "load", lambda rows: None)
        with pytest.raises(SamplerError, match="log-probabilities differ"):
            sends(tmp_path, server)


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("/update_weights", 500),
        ("/update_weights", "reset"),
        ("/update_weights", "cut"),
        ("/start_weight_update", 503),
        ("/finish_weight_update", 500),
        ("/init_weight_transfer_engine", 500),
        ("/reset_prefix_cache", "busy"),
        ("/pause?mode=wait", 500),
    ],
)
def test_an_update_that_fails_is_done_again(path, fault, tmp_path, capsys):
    with TransferServer() as server:
        server.faults_at[path] = [fault, fault]
        config = sends(tmp_path, server)
        assert server.faults_at[path] == [] and server.commands.count("/init_weight_transfer_engine") >= 2
        assert server.commands.count("/resume") == server.commands.count("/pause?mode=wait")
    assert max(m["sampler/gap/max"] for m in lines(config, "metrics") if m["kind"] == "train") < 1e-9


@pytest.mark.parametrize(
    ("path", "fault", "wanted"),
    [
        ("/update_weights", 500, r"not sent by tcp, tried 4 times: .* answers 500: refused \(/update_weights\)"),
        ("/update_weights", "cut", r"tried 4 times: .*no connection to the trainer"),
        ("/reset_prefix_cache", "busy", "tried 4 times: the prefix cache was not emptied"),
        (
            "/init_weight_transfer_engine",
            404,
            r"not sent by tcp: .*VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config",
        ),
        ("/update_weights", 400, r"not sent by tcp: .* answers 400"),
    ],
)
def test_an_update_that_fails_for_good_ends_the_run_by_name(path, fault, wanted, tmp_path, capsys):
    with TransferServer() as server:
        server.faults_at[path] = [fault] * 4
        with pytest.raises(SamplerError, match=wanted):
            sends(tmp_path, server)
        if path == "/update_weights":
            assert server.version == "incomplete" and server.commands[-1] == "/resume"


def test_a_server_without_the_interface_is_named(tmp_path, capsys):
    with Server() as server, pytest.raises(SamplerError, match=r"answers 404.*get_world_size.*VLLM_SERVER_DEV_MODE=1"):
        sends(tmp_path, server, tries=1)


def test_a_worker_that_does_not_read_ends_the_run_at_the_deadline(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(SendingTable, "log_table", lambda policy: np.zeros((3, 2**21)))  # more than sockets hold
    with TransferServer() as server:
        server.faults_at["/update_weights"] = ["deaf"]
        start = time.monotonic()
        try:
            with pytest.raises(SamplerError, match="did not take the weights within 2 s"):
                engine(server, deadline=2.0).refresh(SendingTable(table(REFERENCE)), 0)
            assert server.held.is_set() and time.monotonic() - start < 10
        finally:
            server.let_go.set()


def test_a_restarted_server_with_more_workers_gets_the_next_weights(tmp_path, capsys):
    class Restarted(Engine):
        def refresh(self, policy, version):
            if version == 2:
                server.restart(workers=3)
            super().refresh(policy, version)

    config = short(tmp_path, 4)
    with TransferServer() as server:
        sampler = Restarted(server.url, "tiny", weights="model", transfer="tcp", gap_tolerance=1e-9, pause=0.001)
        run(config, sampler, SendingTable(table(REFERENCE), config.optimizer))
        assert len(server.connections) == 3 and server.commands.count("/init_weight_transfer_engine") == 2


def test_what_a_killed_run_left_half_done_is_ended_first(tmp_path, capsys):
    with TransferServer() as server:
        server.take("/start_weight_update", {})
        server.version = "incomplete"
        sends(tmp_path, server, steps=1)
        first = ["/start_weight_update", "/finish_weight_update"]
        assert server.commands == [*first, *CONNECT, *UPDATE] and server.version.endswith("-0")


def test_a_run_that_stopped_in_an_update_resumes_bit_for_bit(tmp_path, capsys):
    tables = []
    for name, faults in (("whole", []), ("parts", [lambda: None, lambda: None, 400])):
        config = short(tmp_path / name, 4)
        config = replace(config, run=replace(config.run, checkpoint_every=1))
        with TransferServer() as server:
            server.faults_at["/update_weights"] = faults
            policy = SendingTable(table(REFERENCE), config.optimizer)
            if faults:
                with pytest.raises(SamplerError, match="answers 400"):
                    run(config, engine(server), policy)
                policy = SendingTable(table(REFERENCE), config.optimizer)
            run(config, engine(server), policy)
        tables.append(policy.log_table())
    assert np.array_equal(*tables)


class RankedSending(Sends, ranks.RankedTable):
    pass


def ranked(place, server, **options):
    config = settings(place)
    config = replace(config, run=replace(config.run, steps=2), rollout=replace(config.rollout, prompts=2))

    def work(policy):
        rows = [{"prompt": p} for p in PROMPTS]
        train(config, policy, train_rows=rows, rewards={"value": reward}, sampler=engine(server, **options))

    return ranks.run_ranks(2, work, table(REFERENCE), config.optimizer)


@pytest.fixture
def sending(monkeypatch):
    monkeypatch.setattr(ranks, "RankedTable", RankedSending)


def test_two_ranks_send_each_version_once_and_both_go_through_all_tensors(sending, tmp_path, capsys):
    with TransferServer() as server:
        server.faults_at["/update_weights"] = [500]  # within the first part: no rank stops early
        policies = ranked(tmp_path, server)
        assert server.commands.count("/finish_weight_update") == 3  # one ends what failed
        assert [policy.sent for policy in policies] == [9, 9]


def test_a_failure_ends_both_ranks_by_name(sending, tmp_path, capsys):
    with TransferServer() as server, pytest.raises(SamplerError, match=r"not sent by tcp: .*answers 400"):
        server.faults_at["/update_weights"] = [400]
        ranked(tmp_path, server)


def test_a_policy_that_gives_no_tensors_is_refused_by_name(tmp_path, capsys):
    config = short(tmp_path, 1)
    with TransferServer() as server, pytest.raises(ConfigError, match=r"sends tensors of gvpo_torch.*backend is table"):
        run(config, engine(server), TablePolicy(table(REFERENCE), config.optimizer))


def test_a_folder_whose_cache_was_not_emptied_is_refused(tmp_path, capsys):
    config = short(tmp_path, 2)
    with TransferServer() as server:
        server.faults_at["/reset_prefix_cache"] = ["busy"] * 99
        given = {"weights": "model", "folder": tmp_path / "weights", "pause": 0.001, "deadline": 1.0}
        sampler = Engine(server.url, "tiny", **given)
        server.take = lambda path, body: None
        with pytest.raises(SamplerError, match="the prefix cache was not emptied"):
            run(config, sampler, Sent(table(REFERENCE), config.optimizer))


def test_the_server_sleeps_while_the_policy_is_updated(tmp_path, capsys):
    released = []
    with TransferServer() as server:
        config = short(tmp_path, 2)
        policy = SendingTable(table(REFERENCE), config.optimizer)
        policy.release_memory = lambda: released.append(server.asleep)
        run(config, engine(server, sleep=True), policy)
        first = ["/wake_up", *CONNECT, *UPDATE, "/sleep?level=1"]
        assert server.commands == [*first, "/wake_up", *UPDATE, "/sleep?level=1", "/wake_up"]
        assert released == [False, True, True] and not server.asleep
    assert "asleep in updates" in " ".join(capsys.readouterr().out.split())


def test_several_ranks_do_not_put_the_server_to_sleep(sending, tmp_path, capsys):
    with TransferServer() as server, pytest.raises(ConfigError, match=r"engine\.sleep = true, and the run has 2 proc"):
        ranked(tmp_path, server, sleep=True)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"transfer": "http"}, "transfer = 'http'; expected folder, nccl, ipc or tcp"),
        ({"transfer": "tcp", "weights": "adapters"}, "transfer = 'tcp' sends the whole model: set weights = 'model'"),
        ({"transfer": "nccl", "weights": "kept"}, "transfer = 'nccl' sends the whole model"),
        ({"transfer": "ipc", "folder": "x"}, "folder is set, and transfer = 'ipc' writes no files"),
        ({"transfer": "ipc", "listen": "h"}, "listen is set, and transfer = 'ipc' waits for no worker"),
        ({"transfer": "tcp", "listen": "h:port"}, "listen = 'h:port'; expected HOST or HOST:PORT"),
        ({"transfer": "nccl", "kind": "sglang"}, "only vLLM takes it"),
        ({"transfer": "folder", "folder": "w", "kind": "sglang", "sleep": True}, "only vLLM's server is put to sleep"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, wanted):
    with pytest.raises(ConfigError, match=wanted):
        Engine("http://localhost", "tiny", **{"weights": "model"} | options)


def test_a_stranger_gets_no_weights():
    channel = channels.TCP(lambda row: memoryview(row).cast("B"))
    info = channel.open("127.0.0.1", 0, 1)
    with socket.create_connection((info["address"], info["port"])) as stranger:
        stranger.sendall(b"0" * len(info["token"]) + bytes(4))
        with socket.create_connection((info["address"], info["port"])) as worker:
            worker.sendall(info["token"].encode() + bytes(4))
            channel.join(time.monotonic() + 20)
            assert stranger.recv(1) == b""
            (part,) = channel.parts(iter([("a", np.arange(3.0))]))
            part.carry(lambda: None)
            assert np.array_equal(np.frombuffer(worker.recv(100)), np.arange(3.0))
            assert part.info == {"names": ["a"], "dtype_names": ["float64"], "shapes": [[3]]}
    channel.close()


def test_workers_that_do_not_come_are_counted():
    channel = channels.TCP(memoryview)
    channel.open("127.0.0.1", 0, 2)
    with pytest.raises(Failed, match="0 of 2 workers have connected"):
        channel.join(time.monotonic() - 1)
    channel.close()


def test_the_address_for_the_workers():
    assert channels.own_address("http://127.0.0.1:8000", "") == ("127.0.0.1", 0)
    assert channels.own_address("http://other:8000", "10.0.0.2:6000") == ("10.0.0.2", 6000)
    assert channels.own_address("http://other", "trainer") == ("trainer", 0)
    with pytest.raises(Failed, match=r"cannot listen at 192.0.2.1:5 .*set engine.listen"):
        channels.listening("192.0.2.1", 5)
