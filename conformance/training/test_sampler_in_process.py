"""vLLM in the process as the sampler: its order of calls, what is asked for, and what is refused, with a fake vLLM."""

import importlib.util
import os
import sys

import fake_vllm
import pytest
import table_run
from fake_vllm import LLM, Policy, WithTensors
from sampler_runs import lines, run, short
from table_problem import PROMPTS, REFERENCE, table

from gvpo_core.training.cli import main
from gvpo_core.training.config import ConfigError
from gvpo_core.training.config.file import read_config
from gvpo_core.training.policy.table import TablePolicy
from gvpo_core.training.samplers import VLLM, SamplerError
from gvpo_core.training.sampling import Sampling

pytestmark = pytest.mark.core
LOAD = ["reload_weights", "apply_model", "reset_prefix_cache"]


@pytest.fixture
def vllm(monkeypatch):
    """Puts the fake in the place of vLLM; called with sleeps=True, that of a GPU."""

    def put(**how):
        for name, module in fake_vllm.modules(**how).items():
            monkeypatch.setitem(sys.modules, name, module)

    put()
    return put


def policy_of(config, kind=WithTensors):
    return kind(table(REFERENCE), config.optimizer)


@pytest.mark.parametrize("kind", [Policy, WithTensors])
def test_the_engine_has_the_weights_of_each_step(kind, vllm, tmp_path, capsys):
    config = short(tmp_path / "run", 3)
    sampler = VLLM("m", folder=tmp_path / "weights", gap_tolerance=1e-9)
    (tmp_path / "weights").mkdir()
    assert kind is Policy or not hasattr(Policy, "tensors")
    run(config, sampler, policy_of(config, kind))
    assert LLM.newest.calls == [*LOAD, "generate"] * 3 + ["shutdown", "clean"]
    assert {line["version"] for line in lines(config, "completions")} == {0, 1, 2}
    assert [line["sampler/staleness"] for line in lines(config, "metrics") if line["kind"] == "train"] == [0, 0, 0]
    assert not list((tmp_path / "weights").iterdir())
    assert "vLLM 0.0 in this process" in capsys.readouterr().out


def test_vllms_warning_about_chat_templates_is_not_shown(vllm, caplog):
    """It renders a chat to be ready for them, and has no tokenizer: a traceback that says nothing to a user."""
    VLLM("m")
    assert [record.message for record in caplog.records] == ["something else"]
    LLM("m")  # of the user's own
    assert "Chat template warmup failed" in caplog.text


def test_weights_that_were_not_loaded_stop_the_run(vllm, tmp_path, capsys):
    config = short(tmp_path, 3)
    sampler = VLLM("m", gap_tolerance=1e-9)
    LLM.newest.keep = True
    with pytest.raises(SamplerError, match="log-probabilities differ"):
        run(config, sampler, policy_of(config))
    assert len(lines(config, "metrics")) < 3  # the first step has the weights of the start


def test_the_engine_sleeps_between_the_draws_of_steps(vllm, tmp_path, capsys):
    vllm(sleeps=True)
    config = short(tmp_path, 2)
    run(config, VLLM("m"), policy_of(config))
    first, second = [*LOAD, "generate", "sleep"], ["empty_cache", "wake_up", *LOAD, "generate", "sleep"]
    assert LLM.newest.calls == [*first, *second, "shutdown", "clean"]
    assert LLM.newest.options["enable_sleep_mode"] is True and "enable_chunked_prefill" not in LLM.newest.options


def test_the_same_version_wakes_the_engine_and_loads_nothing(vllm):
    vllm(sleeps=True)
    policy, sampler = WithTensors(table(REFERENCE)), VLLM("m")
    for _ in range(2):
        sampler.refresh(policy, 4)
        ((response,),) = sampler.generate([policy.encode("p0")], [[3]], Sampling(2, 1.0))
        assert response.version == 4
    assert LLM.newest.calls == [*LOAD, "generate", "sleep", "empty_cache", "wake_up", "generate", "sleep"]


def test_every_sampling_field_is_given_and_each_response_has_its_seed(vllm):
    policy, sampler = WithTensors(table(REFERENCE)), VLLM("m")
    sampler.refresh(policy, 0)
    sampler.generate([policy.encode(p) for p in PROMPTS[:2]], [[5, 2**64 - 1], [7]], Sampling(2, 0.5))
    assert [asked.seed for asked in LLM.newest.asked] == [5, 2**63 - 1, 7]
    fields = {"max_tokens": 2, "temperature": 0.5, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "n": 1, "logprobs": 0}
    fields |= {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "detokenize": False}
    assert vars(LLM.newest.asked[0]) == fields | {"seed": 5, "stop_token_ids": [0], "ignore_eos": True}


def test_an_aborted_response_is_lost(vllm):
    policy, sampler = WithTensors(table(REFERENCE)), VLLM("m")
    sampler.refresh(policy, 0)
    LLM.newest.abort = True
    drawn = sampler.generate([policy.encode("p0")], [[1, 2, 3]], Sampling(2, 1.0))
    assert [len(many) for many in drawn] == [2]
    assert sampler.failures == ["vLLM ended a response of 2 tokens with 'abort'"]


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        ("collective_rpc", "vLLM did not load the weights: ValueError: no memory"),
        ("apply_model", "vLLM did not load the weights: ValueError: no memory"),
        ("generate", "vLLM drew nothing: ValueError: no memory"),
    ],
)
def test_what_vllm_raises_ends_the_run_by_name(method, wanted, vllm, tmp_path, capsys):
    config, sampler = short(tmp_path, 2), VLLM("m")

    def fails(*arguments, **options):
        raise ValueError("no\n memory")

    setattr(LLM.newest, method, fails)
    with pytest.raises(SamplerError, match=wanted):
        run(config, sampler, policy_of(config))


def test_weights_that_were_loaded_in_part_are_loaded_again(vllm):
    policy, sampler = WithTensors(table(REFERENCE)), VLLM("m")
    sampler.refresh(policy, 0)
    whole, LLM.newest.reset_prefix_cache = LLM.newest.reset_prefix_cache, lambda: False
    with pytest.raises(SamplerError, match="did not empty its prefix cache"):
        sampler.refresh(policy, 1)
    with pytest.raises(SamplerError, match="has no weights of the policy"):
        sampler.generate([policy.encode("p0")], [[1]], Sampling(2, 1.0))
    LLM.newest.reset_prefix_cache = whole
    sampler.refresh(policy, 1)
    assert sampler.version == 1 and LLM.newest.calls.count("reload_weights") == 3


def test_a_folder_that_cannot_be_written_is_named(vllm, tmp_path):
    (tmp_path / "file").write_text("")
    sampler = VLLM("m", folder=tmp_path / "file")
    with pytest.raises(SamplerError, match=r"weights cannot be written to .*file: Not a directory"):
        sampler.refresh(Policy(table(REFERENCE)), 0)


def test_the_environment_is_as_before(vllm, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    seen = []
    monkeypatch.setattr(LLM, "__init__", lambda *a, **b: seen.append(os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"]))
    VLLM("m")
    assert seen == ["0"] and os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1"


def test_what_cannot_be_is_refused_by_name(vllm, monkeypatch):
    with pytest.raises(ConfigError, match=r"options.tensor_parallel_size is set by the run itself"):
        VLLM("m", options={"tensor_parallel_size": 2})
    with pytest.raises(ConfigError, match="vLLM does not start with m: ValueError: Unknown dtype: float7"):
        VLLM("m", dtype="float7")
    sampler, policy = VLLM("m"), WithTensors(table(REFERENCE))
    monkeypatch.setattr(WithTensors, "end_tokens", ())
    with pytest.raises(ConfigError, match="WithTensors has no end_tokens"):
        sampler.refresh(policy, 0)
    policy.world_size = 2
    with pytest.raises(ConfigError, match="this one has 2 ranks: start a server"):
        sampler.refresh(policy, 0)
    assert LLM.newest.calls == []


SET = '[rollout]\nsampler = "engine"\n[engine]\nkind = "vllm"\n'


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (SET + 'url = "http://h"', "engine.url is set, and kind = 'vllm' has no server"),
        (SET + 'weights = "model"', "engine.weights is set, and kind = 'vllm' has no server"),
        (SET + "gap_tolerance = -1.0", "engine.gap_tolerance = -1.0; expected a number above 0"),
        (SET + 'options = { model = "x" }', "engine.options.model is set by the run itself"),
        (SET.replace("[engine]", "ahead = 1\n[engine]"), "rollout.ahead = 1 and engine.kind = 'vllm'"),
        (
            '[rollout]\nsampler = "engine"\n[engine]\nurl = "http://h"\nmodel = "m"\noptions = { seed = 1 }',
            "engine.options.seed is set, and kind = 'server' starts no vLLM",
        ),
        ('[engine]\nkind = "vllm"', "engine.kind is set, and rollout.sampler = 'policy' uses no engine"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(text, wanted, tmp_path):
    path = tmp_path / "config.toml"
    path.write_text('[data]\ntrain = "t"\n[model]\npath = "m"\n[rewards.r]\nfunction = "exact_match"\n' + text)
    with pytest.raises(ConfigError) as error:
        read_config(path)
    (line,) = str(error.value).split("\n")
    assert wanted in line


def test_the_settings_open_it_for_a_run_and_its_evaluation(vllm, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(TablePolicy, "end_tokens", (0,), raising=False)
    monkeypatch.setattr(TablePolicy, "tensors", WithTensors.tensors, raising=False)
    config = table_run.make(tmp_path, steps=3, extra='[engine]\nkind = "vllm"\noptions = { max_model_len = 64 }')
    text = config.read_text().replace("[rollout]", '[rollout]\nsampler = "engine"')
    config.write_text(text.replace("[evaluation]", '[evaluation]\nsampler = "rollout"'))
    monkeypatch.setattr("gvpo_core.training.samplers.load.check_installed", lambda: None)
    assert main(["train", str(config), "--engine.options.seed", "4"]) == 0
    assert LLM.newest.options["max_model_len"] == 64 and LLM.newest.options["seed"] == 4
    assert LLM.newest.model == str(tmp_path) and LLM.newest.calls.count("generate") == 3 + 2


def test_a_missing_vllm_is_named_before_the_model_loads(tmp_path, monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else real(name))
    config = table_run.make(tmp_path, steps=1, extra='[engine]\nkind = "vllm"')
    config.write_text(config.read_text().replace("[rollout]", '[rollout]\nsampler = "engine"'))
    assert main(["train", str(config)]) == 2
    assert 'engine.kind = "vllm" needs vLLM in this environment: pip install vllm' in capsys.readouterr().err
