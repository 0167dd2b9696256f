"""SGLang's own endpoint as the sampler, against a fake of it: requests, answers, weights by version, and faults."""

import math
from dataclasses import replace

import numpy as np
import pytest
from engine_server import Sent, Server
from sampler_runs import lines, run, short, whole_and_resumed
from table_problem import PROMPTS, REFERENCE, reward, settings, table

from gvpo_core.training.config import ConfigError, EngineConfig
from gvpo_core.training.loop import train
from gvpo_core.training.policy.table import TablePolicy
from gvpo_core.training.samplers import Engine, SamplerError
from gvpo_core.training.sampling import Sampling

pytestmark = pytest.mark.core

PROMPT = TablePolicy(table(REFERENCE)).encode(PROMPTS[0])
SEEDS = [11, 12, 13]


def engine(server, **options):
    return Engine(server.url, "tiny", kind="sglang", **{"pause": 0.001, "concurrency": 1, **options})


def test_a_request_for_each_response_sends_every_field_and_its_own_seed() -> None:
    with Server() as server:
        sampling = Sampling(2, temperature=0.7, top_p=0.9, top_k=3, min_p=0.01)
        ((first, *_),) = engine(server).generate([PROMPT], [[2**40 + 5, 6]], sampling)
        given = {"temperature": 0.7, "top_p": 0.9, "top_k": 3, "min_p": 0.01, "max_new_tokens": 2, "n": 1}
        given |= {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "sampling_seed": 5}
        whole = {"input_ids": list(PROMPT), "sampling_params": given, "return_logprob": True, "stream": False}
        assert server.asked[0] == whole and server.asked[1]["sampling_params"]["sampling_seed"] == 6
        assert math.isnan(first.logprob), "at another temperature than 1 the log-probability is another one"
        server.asked.clear()
        engine(server, omit=["min_p"], fields={"ignore_eos": False}).generate([PROMPT], [[1]], Sampling(2))
        (body,) = server.asked
        assert "min_p" not in body["sampling_params"] and body["sampling_params"]["ignore_eos"] is False
        assert body["sampling_params"]["top_k"] == -1


def test_answers_are_the_tokens_and_log_probabilities_that_were_drawn() -> None:
    policy = TablePolicy(table(REFERENCE))
    with Server() as server:
        (drawn,) = engine(server).generate([PROMPT], [SEEDS], Sampling(2))
    (expected,) = policy.generate([PROMPT], [SEEDS], Sampling(2))
    assert [(r.tokens, r.finished) for r in drawn] == [(r.tokens, r.finished) for r in expected]
    assert all(math.isfinite(r.logprob) for r in drawn)


@pytest.mark.parametrize("fault", [429, 503, "garbage", "empty"])
def test_a_request_that_fails_is_repeated(fault) -> None:
    with Server() as server:
        expected = engine(server).generate([PROMPT], [SEEDS], Sampling(2))
        server.faults = [fault, fault]
        sampler = engine(server)
        assert sampler.generate([PROMPT], [SEEDS], Sampling(2)) == expected
        assert not sampler.failures and len(server.asked) == 2 * 3 + 2


@pytest.mark.parametrize(("fault", "why"), [("abort", "with 'abort'"), (400, "answers 400")])
def test_what_fails_for_good_costs_its_response(fault, why) -> None:
    with Server(faults=[fault]) as server:
        sampler = engine(server)
        (drawn,) = sampler.generate([PROMPT], [SEEDS], Sampling(2))
    assert len(drawn) == 2 and why in sampler.failures[0]


@pytest.mark.parametrize("served", ["tiny", "/models/tiny/", "org/tiny", None])
def test_the_model_of_the_server_may_be_named_by_its_path(served) -> None:
    with Server() as server:
        server.told = served and {"model_path": served}
        assert engine(server).generate([PROMPT], [[1]], Sampling(2))


def test_a_server_of_another_model_is_refused() -> None:
    with Server() as server:
        server.told = {"model_path": "/models/other"}
        with pytest.raises(SamplerError, match=r"engine.model = 'tiny', and the server at .* has '/models/other'"):
            engine(server).generate([PROMPT], [[1]], Sampling(2))
        assert not server.asked


def test_another_server_is_refused() -> None:
    with Server(faults=["no ids"]) as server, pytest.raises(SamplerError, match=r"no token ids \(output_ids\)"):
        engine(server).generate([PROMPT], [[1]], Sampling(2))


def sends(tmp_path, server, weights, steps=4, **options):
    """A run whose engine must have the weights of each step, to rounding."""
    config = short(tmp_path, steps)
    sampler = engine(server, weights=weights, folder=tmp_path / "weights", gap_tolerance=1e-9, **options)
    run(config, sampler, Sent(table(REFERENCE), config.optimizer))
    return config


@pytest.mark.parametrize("weights", ["adapters", "model"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_engine_has_the_weights_of_each_step(tied, weights, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(Sent, "tied", tied)
    with Server() as server:
        config = sends(tmp_path, server, weights)
        assert {line["version"] for line in lines(config, "completions")} == {0, 1, 2, 3}
        assert len(list((tmp_path / "weights").iterdir())) == 2, "older versions stay on disk"
        if weights == "adapters":
            assert len({body["lora_path"] for body in server.asked}) == 4 and len(server.adapters) == 2
        else:
            assert server.commands == ["/update_weights_from_disk"] * 4 and server.version != "default"


def test_an_answer_with_other_weights_is_not_taken_and_the_weights_are_sent_again(tmp_path, capsys, caplog) -> None:
    with Server() as server:
        config = short(tmp_path, 1)
        total = config.rollout.prompts * config.rollout.responses
        server.faults = [200, *["wrong version"] * 4]  # the first is the command's
        sampler = engine(server, weights="model", folder=tmp_path / "weights")
        run(config, sampler, Sent(table(REFERENCE), config.optimizer))
        assert len(server.asked) == 2 * total + 3  # after four tries
        assert server.commands == ["/update_weights_from_disk"] * 2
    (metrics,) = [m for m in lines(config, "metrics") if m["kind"] == "train"]
    assert metrics["responses/lost"] == 0
    said = [record.getMessage() for record in caplog.records]
    assert any("answers with the weights 'of yesterday'" in line and "sent again" in line for line in said)


@pytest.mark.parametrize("fault", [400, 500])
def test_weights_that_do_not_load_end_the_run_by_name(fault, tmp_path, capsys) -> None:
    with Server(faults=[fault] * 99) as server, pytest.raises(SamplerError, match=f"weights were not loaded.*{fault}"):
        sends(tmp_path, server, "model", deadline=1.0)


def test_a_run_resumes_bit_for_bit(tmp_path, capsys) -> None:
    with Server() as server:
        tables = whole_and_resumed(tmp_path, lambda: engine(server))
    assert np.array_equal(*tables) and math.isfinite(tables[0].sum())


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"tokens": "text"}, "tokens = 'text' and kind = 'sglang': its own endpoint takes token ids"),
        ({"omit": ["max_tokens"]}, "omit = 'max_tokens'; expected names among top_p, top_k"),
        ({"fields": {"sampling_seed": 3}}, "fields.sampling_seed is set by the run itself"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, wanted) -> None:
    with pytest.raises(ConfigError, match=wanted.replace(".", r"\.")):
        Engine("http://h", "tiny", kind="sglang", **options)


def test_the_settings_name_it(tmp_path, capsys) -> None:
    """As `gvpo train` reads them, with the engine made by the run."""
    with Server() as server:
        config = settings(tmp_path)
        config = replace(
            config,
            run=replace(config.run, steps=2),
            rollout=replace(config.rollout, sampler="engine"),
            engine=EngineConfig(url=server.url, model="tiny", kind="sglang", pause=0.001),
        )
        train(
            config,
            TablePolicy(table(REFERENCE), config.optimizer),
            train_rows=[{"prompt": p} for p in PROMPTS],
            rewards={"value": reward},
        )
        assert server.asked and all("input_ids" in body for body in server.asked)
    assert f"tiny at {server.url}, SGLang, its own weights" in " ".join(capsys.readouterr().out.split())
