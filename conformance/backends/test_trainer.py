"""The whole trainer on tiny real language models, over every backend: it learns, it repeats itself, and kills change
nothing."""

import json
import shutil
from pathlib import Path

import killing
import numpy as np
import pytest
import tiny_models
import trainer_backends
from places import DEVICE
from trainer_runs import write_run

from gvpo_core.training import cli

PRESENT = trainer_backends.present()
if not PRESENT:
    pytest.skip("no backend of a language model is among the subjects", allow_module_level=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_models.write_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def make(backend, model):
    def make(folder: Path, *, steps: int, extra: str = "", model_extra: str = "") -> Path:
        return write_run(folder, backend, model, steps=steps, extra=extra, model_extra=model_extra)

    return make


@pytest.fixture
def final_state(backend):
    def final_state(folder: Path) -> dict[str, np.ndarray]:
        newest = max((folder / "run" / "checkpoints").glob("step-*"))
        arrays = backend.state(newest / "policy")
        assert arrays
        return arrays

    return final_state


def records(folder: Path, kind: str = "train") -> list[dict]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [r for line in lines if (r := json.loads(line))["kind"] == kind]


@pytest.mark.slow_on("jax", "mlx")
@pytest.mark.parametrize(
    ("extra", "model_extra"),
    [
        ("", ""),
        pytest.param("", 'lora_rank = 4\nlayout = "plain"', marks=pytest.mark.slow),
        pytest.param('name = "grpo"\nepochs = 2\nminibatches = 2', "", marks=pytest.mark.slow),
        pytest.param('reference = "rollout"\nepochs = 2', 'dtype = "bfloat16"', marks=pytest.mark.slow),
    ],
    ids=["gvpo", "gvpo-lora-plain", "grpo-minibatches", "rollout-reference-bfloat16"],
)
def test_the_reward_rises(extra, model_extra, tmp_path, make, capfd):
    config = make(tmp_path, steps=30, extra=extra, model_extra=model_extra)
    assert cli.main(["train", str(config)]) == 0
    rewards = [r["reward/mean"] for r in records(tmp_path)]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.15
    assert records(tmp_path, "eval")[-1]["eval/reward"] > records(tmp_path, "eval")[0]["eval/reward"]
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


@pytest.mark.slow_on("jax")
def test_the_same_run_twice_is_the_same_bit_for_bit(tmp_path, make, final_state, capfd):
    for name in ("one", "two"):
        assert cli.main(["train", str(make(tmp_path / name, steps=4))]) == 0
    one, two = final_state(tmp_path / "one"), final_state(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert killing.lasting(tmp_path / "one" / "run") == killing.lasting(tmp_path / "two" / "run")
    assert cli.main(["train", str(make(tmp_path / "other", steps=4)), "--run.seed", "1"]) == 0
    other = final_state(tmp_path / "other")
    assert any(not np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("model_extra", ["", "lora_rank = 4"], ids=["full", "lora"])
def test_kills_change_nothing(model_extra, tmp_path, make, final_state, backend, capfd, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    for name in ("whole", "killed"):
        make(tmp_path / name, steps=60, model_extra=model_extra)
    launch = killing.Forked.of(backend.preload)
    whole = launch(tmp_path / "whole" / "config.toml", tmp_path / "whole.txt")
    whole.process.join(300)
    assert whole.exit_status() == 0, whole.log.read_text()
    run = tmp_path / "killed" / "run"
    config = tmp_path / "killed" / "config.toml"
    hit = killing.kill_and_resume(config, run, launch, kills=backend.kills, seed=1, longest=1.0)
    assert hit["saving"] >= 3, hit
    assert hit["running"] >= 3, hit
    one, two = final_state(tmp_path / "whole"), final_state(tmp_path / "killed")
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(two[name], one[name], err_msg=name)
    assert killing.lasting(run) == killing.lasting(tmp_path / "whole" / "run")
    assert (run / "completions.jsonl").read_bytes() == (tmp_path / "whole/run/completions.jsonl").read_bytes()
    assert "resume" in killing.events(run)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["data_parallel", "fsdp"])
def test_two_processes_end_where_one_does(sharding, tmp_path, make, final_state, backend, capfd, monkeypatch):
    """One group of six over two processes, by the command line; parameters relative 1e-4 after three Adam steps."""
    if sharding not in backend.shardings:
        pytest.skip(f"{backend.name} does not take model.sharding = {sharding}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("one", "two"):
        config = make(tmp_path / name, steps=3, model_extra=f'sharding = "{sharding}"')
        config.write_text(config.read_text().replace("prompts = 2", "prompts = 1"))
    assert cli.main(["train", str(tmp_path / "one" / "config.toml")]) == 0
    status, output = backend.two_processes(tmp_path / "two" / "config.toml")
    assert status == 0, output
    one, two = final_state(tmp_path / "one"), final_state(tmp_path / "two")
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-4, atol=1e-4 * np.abs(one[name]).max(), err_msg=name)
    first, second = (
        json.loads((tmp_path / n / "run/metrics.jsonl").read_text().splitlines()[1]) for n in ("one", "two")
    )
    for key in ("reward/mean", "loss", "kl", "regret/series", "gradient_norm", "responses/total"):
        assert second[key] == pytest.approx(first[key], rel=1e-5, abs=1e-5), key  # kl is 0 but for rounding


@pytest.mark.slow_on("jax")
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(tmp_path, make, final_state, capfd, caplog):
    config = make(tmp_path, steps=4)
    assert cli.main(["train", str(config)]) == 0
    shutil.copytree(tmp_path / "run", tmp_path / "kept")
    whole = final_state(tmp_path)
    shutil.rmtree(tmp_path / "run")
    assert cli.main(["train", str(config), "--run.steps", "4"]) == 0
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    victim = max((p for p in (newest / "policy").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-10])
    assert cli.main(["train", str(config)]) == 0
    assert str(victim) in caplog.text
    again = final_state(tmp_path)
    assert all(np.array_equal(again[name], whole[name]) for name in whole)


def test_export_and_eval_of_a_run(tmp_path, make, model, backend, capfd):
    config = make(tmp_path, steps=2)
    assert cli.main(["train", str(config)]) == 0
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    if backend.name == "torch":  # what the others export is read by transformers where both are installed
        from transformers import AutoModelForCausalLM

        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    again = make(tmp_path / "again", steps=1).read_text().replace(str(model), str(tmp_path / "out"))
    (tmp_path / "again" / "config.toml").write_text(again)
    assert cli.main(["train", str(tmp_path / "again" / "config.toml")]) == 0
    assert records(tmp_path / "again", "eval")[0]["eval/reward"] == records(tmp_path, "eval")[-1]["eval/reward"]
    assert "rope_theta" in json.loads((tmp_path / "out" / "config.json").read_text())
    capfd.readouterr()
    assert cli.main(["eval", str(tmp_path / "run"), "--json"]) == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed["eval/reward"] == records(tmp_path, "eval")[-1]["eval/reward"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tokenizer", None, "has no tokenizer"),
        ("config.json", None, "has no config.json"),
        (f'device = "{DEVICE}"', 'device = "abacus"', "abacus"),
        ("max_tokens = 8", "max_tokens = 8\ntop_p = 0.9", "allow_truncated_support"),
        ('path = "', 'path = "/nowhere', "nowhere"),
    ],
)
def test_bad_models_are_answered_in_one_line(old, new, message, tmp_path, make, model, capfd):
    config = make(tmp_path, steps=1)
    if new is None:
        shutil.copytree(model, tmp_path / "model")
        for path in (tmp_path / "model").glob(f"{old}*"):
            path.unlink()
        config.write_text(config.read_text().replace(str(model), str(tmp_path / "model")))
    else:
        config.write_text(config.read_text().replace(old, new))
    assert cli.main(["train", str(config)]) == 2
    err = capfd.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()
