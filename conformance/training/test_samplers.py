"""Samplers: weights of each step, smaller groups, log-probabilities that are compared, and an engine that fails."""

import json
import math
import time
from dataclasses import replace

import numpy as np
import pytest
from echo_server import EchoServer
from engine_server import Sent, Server
from sampler_runs import Copy, lines, run, short, whole_and_resumed
from table_problem import PROMPTS, REFERENCE, settings, table

from gvpo_core.training.config import ConfigError
from gvpo_core.training.policy.table import TablePolicy
from gvpo_core.training.samplers import Drawn, Engine, SamplerError, http
from gvpo_core.training.samplers.gaps import MOST
from gvpo_core.training.sampling import Sampling

pytestmark = pytest.mark.core


def test_a_sampler_is_refreshed_before_each_step_and_closed_at_the_end(tmp_path, capsys):
    config, sampler = short(tmp_path, 3), Copy(tolerance=1e-9)
    run(config, sampler)
    assert sampler.versions == [0, 1, 2] and sampler.closed == 1
    metrics = [m for m in lines(config, "metrics") if m["kind"] == "train"]
    assert [m["sampler/gap/max"] < 1e-9 for m in metrics] == [True] * 3
    drawn = [c for c in lines(config, "completions") if c["kind"] == "train"]
    assert {(c["step"], c["version"]) for c in drawn} == {(1, 0), (2, 1), (3, 2)}


def test_old_weights_in_the_sampler_stop_the_run_by_name(tmp_path, capsys):
    sampler = Copy(refreshed=False, tolerance=1e-6)
    with pytest.raises(SamplerError, match=r"log-probabilities differ from the policy's by up to .* nats a token"):
        run(short(tmp_path, 3), sampler)
    assert sampler.versions == [0, 1] and sampler.closed == 1  # the first step's weights are equal


def test_old_weights_under_the_present_version_stop_the_run_without_a_tolerance(tmp_path, capsys):
    """In float64 the first step's gap is 0, and more than 0.001 nats a token is a sign of other weights."""
    config = short(tmp_path, 10)
    with pytest.raises(SamplerError, match=r"at most 0.001 is expected \([\d.e-]+ in the first step compared\)"):
        run(config, Copy(refreshed=False))
    gaps = [m["sampler/gap"] for m in lines(config, "metrics") if m["kind"] == "train"]
    assert gaps[0] < 1e-9 and len(gaps) < 9 and max(gaps) <= 1e-3


def test_a_wide_tolerance_shows_the_gap_of_old_weights_as_a_metric(tmp_path, capsys):
    config = short(tmp_path, 3)
    run(config, Copy(refreshed=False, tolerance=9.0))
    gaps = [m["sampler/gap/max"] for m in lines(config, "metrics") if m["kind"] == "train"]
    assert gaps[0] < 1e-9 and min(gaps[1:]) > 1e-4


@pytest.mark.parametrize("weights", ["adapters", "model"])
def test_a_server_that_goes_back_to_its_first_weights_is_found_without_a_tolerance(weights, tmp_path, capsys):
    """Every command succeeds, the version that it tells is right, and the staleness is 0."""

    class Back(Server):
        def arrives(self):
            self.policy = TablePolicy(table(REFERENCE))
            self.adapters = dict.fromkeys(self.adapters, self.policy)

    config = short(tmp_path, 10)
    with Back() as server, pytest.raises(SamplerError, match="says that it has the policy's weights"):
        run(
            config,
            engine(server, weights=weights, folder=tmp_path / "weights"),
            Sent(table(REFERENCE), config.optimizer),
        )
    metrics = [m for m in lines(config, "metrics") if m["kind"] == "train"]
    assert metrics and [m["sampler/staleness"] for m in metrics] == [0] * len(metrics)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_server_that_was_left_with_other_weights_is_found_in_the_first_step(dtype, tmp_path, capsys):
    """It keeps what an earlier run sent, whatever this one sends: the first gap is no measure of the precision."""

    class Keeps(Server):
        def read(self, path):
            return self.policy

    config = short(tmp_path, 1)
    with Keeps(TablePolicy(table(REFERENCE**0.9 / (REFERENCE**0.9).sum(axis=1, keepdims=True)))) as server:
        sampler = engine(server, weights="model", folder=tmp_path / "weights", dtype=dtype)
        policy = Sent(table(REFERENCE), config.optimizer)
        if dtype == "auto":
            with pytest.raises(
                SamplerError, match=r"at most 0.001 is expected \(both compute in float64; else set eng"
            ):
                run(config, sampler, policy)
        else:  # said to compute in 16 bits: the first gap is what they explain
            run(config, sampler, policy)


def test_every_nth_step_alone_is_compared(tmp_path, capsys):
    config, sampler = short(tmp_path, 8), Copy(refreshed=False, tolerance=1e-6)
    sampler.gap_every = 5
    with pytest.raises(SamplerError, match="differ from the policy's by up to"):
        run(config, sampler)
    assert sampler.versions[-1] == 5, "steps 1 and 6 are compared"


class Other(Copy):
    """Has another model than it says, or says nothing of its weights."""

    def __init__(self, *, version=True, **options):
        super().__init__(refreshed=False, **options)
        self.version, self.copy = version, TablePolicy(table(np.full((3, 5), 0.01) + np.eye(3, 5) * 0.95))

    def told(self, prompt, response):
        told = super().told(prompt, response)
        return told if self.version else replace(told, version=None)


def test_another_model_under_the_present_version_stops_the_run(tmp_path, capsys):
    with pytest.raises(
        SamplerError, match=r"says that it has the policy's weights, .* by [\d.]+ nats a token on average"
    ):
        run(short(tmp_path, 3), Other())
    assert not [m for m in lines(short(tmp_path, 3), "metrics") if m["kind"] == "train"]


@pytest.mark.parametrize("options", [{"version": False}, {"tolerance": 100.0}], ids=["no version", "own tolerance"])
def test_weights_of_no_known_version_or_a_wide_tolerance_go_on(options, tmp_path, capsys):
    config = short(tmp_path, 2)
    run(config, Other(**options))
    metrics = [m for m in lines(config, "metrics") if m["kind"] == "train"]
    assert len(metrics) == 2 and metrics[0]["sampler/gap"] > MOST


def test_a_group_keeps_the_responses_that_come(tmp_path, capsys):
    config = short(tmp_path, 2)
    run(config, Copy(drop=3))
    prompts, responses = config.rollout.prompts, config.rollout.responses
    metrics = [m for m in lines(config, "metrics") if m["kind"] == "train"]
    assert [m["responses/total"] for m in metrics] == [prompts * (responses - 3)] * 2
    assert [m["responses/lost"] for m in metrics] == [prompts * 3] * 2


def test_a_sampler_that_gives_nothing_ends_the_run_by_name(tmp_path, capsys):
    with pytest.raises(SamplerError, match=r"the sampler gave none of \d+ responses"):
        run(short(tmp_path, 1), Copy(drop=10**6))


def engine(server, **options):
    return Engine(server.url, "tiny", **{"pause": 0.001, "concurrency": 1, **options})


ASKED = ([TablePolicy(table(REFERENCE)).encode(PROMPTS[0])], [[11, 12, 13]], Sampling(2))


@pytest.mark.parametrize("fault", [429, 500, 503, "cut", "garbage", "reset", "wrong model"])
def test_a_request_that_fails_is_repeated_and_gives_the_same_responses(fault):
    with Server() as server:
        expected = engine(server).generate(*ASKED)
        server.faults = [fault, fault]
        again = engine(server)
        assert again.generate(*ASKED) == expected and len(expected[0]) == 3
        assert not again.failures and len(server.asked) == 4 and server.asked[1] == server.asked[3]


@pytest.mark.parametrize(
    ("fault", "left", "why"),
    [
        (500, 0, "answers 500"),
        (404, 0, "answers 404"),
        ("cut", 0, "IncompleteRead"),
        ("wrong model", 0, "answers as the model 'other'; asked for 'tiny'"),
        ("abort", 2, "with 'abort'"),
        ("one less", 2, None),
    ],
)
def test_what_fails_for_good_costs_responses(fault, left, why):
    with Server(faults=[fault] * 4) as server:
        sampler = engine(server)
        (drawn,) = sampler.generate(*ASKED)
        assert len(drawn) == left
        assert why in sampler.failures[0] if why else not sampler.failures
        assert len(server.asked) == (4 if fault in (500, "cut", "wrong model") else 1)


def test_a_refused_request_leaves_no_connection_open():
    with EchoServer(None, "tiny", faults=[500]) as server:
        asked = http.Server(server.url, tries=1, pause=0.01)
        body = {"prompt": [*range(200)], "echo": False}  # echoed: a long answer, whose end is not read
        with pytest.raises(http.Failed) as failed:
            asked.request("/v1/completions", body, time.monotonic() + 10, bytes)
    assert failed.value.__cause__.code == 500
    assert failed.value.__cause__.fp.isclosed(), "the connection waits for the garbage collector"


def test_a_request_past_the_deadline_costs_its_responses_alone():
    prompts = ASKED[0] * 2
    with Server(faults=["slow"]) as server:
        drawn = engine(server, deadline=0.8, concurrency=2).generate(prompts, [[1, 2], [3, 4]], Sampling(2))
    assert sorted(map(len, drawn)) == [0, 2]


def test_a_request_that_fails_for_good_costs_the_run_nothing_but_its_responses(tmp_path, capsys):
    """The first one of step 1, of three."""
    config = replace(short(tmp_path, 2), rollout=replace(settings(tmp_path).rollout, responses=8))
    with Server(faults=[500] * 4) as server:
        run(config, engine(server))
    metrics = [m for m in lines(config, "metrics") if m["kind"] == "train"]
    assert [m["responses/lost"] for m in metrics] == [8, 0]


def test_an_engine_that_refuses_every_request_ends_the_run_with_the_reason(tmp_path, capsys):
    with Server() as server:
        url = server.url
    with pytest.raises(SamplerError, match=r"the sampler gave none of \d+ responses; http://127.0.0.1:\d+: URLError"):
        run(short(tmp_path, 1), Engine(url, "tiny", pause=0.001, deadline=1.0))


def test_an_engine_without_token_ids_is_refused():
    with Server(faults=["no ids"]) as server, pytest.raises(SamplerError, match="gives no token ids"):
        engine(server).generate(*ASKED)


def test_a_response_without_its_end_token_is_refused(tmp_path, capsys):
    sampler = Copy()
    sampler.told = lambda prompt, response: Drawn(response.tokens[:-1], True)
    with pytest.raises(
        SamplerError, match=r"gave the tokens \[\d\] as a response: finished is true, and its last token"
    ):
        run(short(tmp_path, 1), sampler)


def test_every_sampling_field_is_sent():
    with Server() as server:
        engine(server).generate(ASKED[0], [[2**63 + 5]], Sampling(7, 0.5, 0.9, 0, 0.1))
        (body,) = server.asked
    sent = {"max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": -1, "min_p": 0.1, "n": 1, "seed": 5}
    assert body.items() >= (sent | {"repetition_penalty": 1.0, "return_token_ids": True}).items()


def test_the_key_is_sent_and_reaches_no_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ENGINE_KEY", "hush-93")
    config = short(tmp_path, 1)
    with Server() as server:
        run(config, engine(server, api_key="$ENGINE_KEY"))
        assert set(server.keys) == {"Bearer hush-93"}
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"hush-93" not in path.read_bytes(), path
    with pytest.raises(
        ConfigError, match=r"engine.api_key = '\$NO_SUCH_KEY': the environment has no variable NO_SUCH_KEY"
    ):
        Engine("http://localhost:1", "tiny", api_key="$NO_SUCH_KEY")


def test_a_run_with_an_engine_resumes_bit_for_bit(tmp_path, capsys):
    with Server() as server:
        tables = whole_and_resumed(tmp_path, lambda: engine(server))
    assert np.array_equal(*tables)
    assert math.isfinite(tables[0].sum())


def sends(tmp_path, server, weights, steps=4, **options):
    """A run whose engine must have the weights of each step, to rounding."""
    config = short(tmp_path, steps)
    given = {"weights": weights, "folder": tmp_path / "weights", "gap_tolerance": 1e-9, **options}
    run(config, engine(server, **given), Sent(table(REFERENCE), config.optimizer))
    return config


@pytest.mark.parametrize("weights", ["adapters", "model"])
def test_the_engine_has_the_weights_of_each_step(weights, tmp_path, capsys):
    with Server() as server:
        config = sends(tmp_path, server, weights)
        assert {line["version"] for line in lines(config, "completions")} == {0, 1, 2, 3}
        assert len(list((tmp_path / "weights").iterdir())) == 2, "older versions stay on disk"
        if weights == "adapters":
            assert len({body["model"] for body in server.asked}) == 4 and len(server.adapters) == 2
        else:
            assert server.commands == ["/update_weight_version", "/collective_rpc", "/reset_prefix_cache"] * 4


def test_an_engine_that_is_busy_gets_the_weights_again(tmp_path, capsys):
    with Server(faults=[503, 429]) as server:
        sends(tmp_path, server, "adapters", steps=1)
        assert server.commands == ["/v1/load_lora_adapter"] * 3


@pytest.mark.parametrize("fault", [404, 500])
def test_weights_that_do_not_load_end_the_run_by_name(fault, tmp_path, capsys):
    with Server(faults=[fault] * 99) as server, pytest.raises(SamplerError, match=f"weights were not loaded.*{fault}"):
        server.version = None
        sends(tmp_path, server, "model", deadline=1.0)


class OwnHead(Sent):
    """A tied model that can be written with a head of its own."""

    tied = True

    def export(self, directory, *, own_head=False):
        super().export(directory)
        (directory / "config.json").write_text(json.dumps({"tie_word_embeddings": not own_head}))


def test_a_tied_model_is_sent_with_a_head_of_its_own(tmp_path, capsys):
    config = short(tmp_path, 3)
    with Server() as server:
        sampler = engine(server, weights="model", folder=tmp_path / "weights", gap_tolerance=1e-9)
        run(config, sampler, OwnHead(table(REFERENCE), config.optimizer))
        assert server.commands.count("/collective_rpc") == 3
    written = [json.loads(path.read_text()) for path in (tmp_path / "weights").glob("*/config.json")]
    assert written == [{"tie_word_embeddings": False}] * 2


def test_a_tied_model_that_cannot_be_written_so_is_not_sent_whole(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Sent, "tied", True)
    with Server() as server, pytest.raises(ConfigError, match="tie_word_embeddings"):
        sends(tmp_path, server, "model")
    assert server.commands == []


@pytest.mark.parametrize("options", [{"weights": "adapters"}, {"folder": "there"}, {"weights": "all", "folder": "x"}])
def test_weights_need_a_folder(options):
    with pytest.raises(ConfigError, match="expected adapters or model, and a folder"):
        Engine("http://localhost", "tiny", **options)


def test_a_tolerance_without_log_probabilities_is_an_error(tmp_path, capsys):
    sampler = Copy(tolerance=0.1)
    sampler.told = lambda prompt, response: response
    with pytest.raises(SamplerError, match="nothing was compared"):
        run(short(tmp_path, 1), sampler)


def test_a_server_that_was_started_again_gets_the_weights_of_the_next_step(tmp_path, capsys):
    """It has lost the versions before, which the run would unload."""
    config = short(tmp_path, 5)
    with Server() as server:

        class Restarted(Engine):
            def refresh(self, policy, version):
                if version == 3:
                    server.adapters.clear()
                super().refresh(policy, version)

        sampler = Restarted(server.url, "tiny", weights="adapters", folder=tmp_path / "weights", gap_tolerance=1e-9)
        run(config, sampler, Sent(table(REFERENCE), config.optimizer))
        assert server.commands.count("/v1/load_lora_adapter") == 5
    assert [m["responses/lost"] for m in lines(config, "metrics") if m["kind"] == "train"] == [0] * 5
