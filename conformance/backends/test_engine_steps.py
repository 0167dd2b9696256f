"""An engine as the sampler of every backend: a server process that draws with what the run sends it.

The server has a second policy of the same backend, which it loads from the folders and adapters that are exported. So
what the engine draws is what the exported folder says, and the step compares it with the trainer's policy.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import policy_server
import pytest
import tiny_models
import trainer_backends
from killing import Forked, events, lasting, trained
from ports import free_port
from trainer_backends import Backend
from trainer_runs import write_run

from gvpo_core.training import cli

PRESENT = trainer_backends.present()
if not PRESENT:
    pytest.skip("no backend of a language model is among the subjects", allow_module_level=True)

GAP = 1e-4  # nats a token: the same framework, another layout of rows
ENGINE = """
[engine]
url = "http://127.0.0.1:{port}"
model = "tiny"
weights = "{weights}"
folder = "{folder}"
gap_tolerance = {gap}
pause = 0.05
"""


@pytest.fixture
def served(tmp_path, backend):
    """Starts servers, and ends them."""
    processes = []

    def serve(config: Path, port: int) -> Path:
        log = config.with_name("server.txt")
        processes.append(policy_server.start(config, port, log, backend.preload))
        return log

    yield serve
    for process in processes:
        process.kill()
        process.join(60)


def made(folder: Path, backend: Backend, *, port: int, weights: str, steps: int, ahead: int = 0, lora: int = 0) -> Path:
    """Settings of a run whose engine is at this port. The model has no head of its own."""
    model = folder.parent / "model"
    if not model.exists():
        tiny_models.write_model("llama", model, tie_word_embeddings=True)
    extra = ENGINE.format(port=port, weights=weights, folder=folder / "weights", gap=GAP)
    lora_settings = f"lora_rank = {lora}\nlora_alpha = {4 * lora}" if lora else ""
    config = write_run(folder, backend, model, steps=steps, extra=extra, model_extra=lora_settings)
    text = config.read_text().replace("[rollout]", f'[rollout]\nsampler = "engine"\nahead = {ahead}')
    text = text.replace(f'evaluation = "{folder / "train.jsonl"}"', "").replace("every = 5", "")
    config.write_text(text)
    return config


def assert_weights_of_each_step(folder: Path, ages: list[int]) -> None:
    records = trained(folder / "run")
    assert [record["sampler/staleness"] for record in records] == ages
    assert [record["responses/lost"] for record in records] == [0] * len(ages)
    if not any(ages):  # else the updates between are part of the gap
        assert 0 <= max(record["sampler/gap/max"] for record in records) < GAP


@pytest.mark.slow_on("torch", "jax")
def test_the_engine_draws_with_the_model_of_each_step(backend, served, tmp_path, capsys):
    """Exported with a head of its own; the run begins before its server is there."""
    port = free_port()
    config = made(tmp_path / "a", backend, port=port, weights="model", steps=2)
    log = served(config, port)
    assert cli.main(["train", str(config)]) == 0, log.read_text()
    assert_weights_of_each_step(tmp_path / "a", [0, 0])
    moved = [record["gradient_norm"] for record in trained(tmp_path / "a" / "run")]
    assert min(moved) > 0, "the second step's weights would be the first one's"
    kept = sorted((tmp_path / "a" / "weights").iterdir())
    assert len(kept) == 2 and json.loads((kept[1] / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.slow
def test_the_engine_draws_with_the_adapters_of_each_step(backend, served, tmp_path, capsys):
    port = free_port()
    if backend.name == "mlx":
        config = made(tmp_path / "a", backend, port=port, weights="adapters", steps=1, lora=4)
        assert cli.main(["train", str(config)]) == 2
        assert "the mlx backend writes adapters for mlx-lm" in capsys.readouterr().err
        return
    config = made(tmp_path / "a", backend, port=port, weights="adapters", steps=3, lora=4)
    log = served(config, port)
    assert cli.main(["train", str(config)]) == 0, log.read_text()
    assert_weights_of_each_step(tmp_path / "a", [0, 0, 0])


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [0, 1])
def test_a_killed_run_with_an_engine_repeats_its_steps(backend, ahead, served, tmp_path):
    """SIGKILL after two of five steps, with a checkpoint after each second one, and requests in flight."""
    for name in ("whole", "killed"):
        made(tmp_path / name, backend, port=free_port(), weights="model", steps=5, ahead=ahead)
    whole, killed = (tmp_path / name / "config.toml" for name in ("whole", "killed"))
    for config in (whole, killed):
        port = int(config.read_text().split("127.0.0.1:")[1].split('"')[0])
        served(config, port)
    launch = Forked.of(backend.preload)
    launch(whole, tmp_path / "whole.txt").finish()
    process = launch(killed, tmp_path / "killed.txt")
    process.wait_for_steps(tmp_path / "killed" / "run", 3)
    process.kill()
    launch(killed, tmp_path / "killed.txt").finish()
    assert "resume" in events(tmp_path / "killed" / "run")
    assert lasting(tmp_path / "killed" / "run") == lasting(tmp_path / "whole" / "run")
    assert_weights_of_each_step(tmp_path / "killed", [0, *[ahead] * 4])


TWIN = """
from dataclasses import replace
from pathlib import Path
from gvpo_core.training.policy.load import load_policy

class Twin:
    def __init__(self, config):
        self.config = config

    def refresh(self, policy, version):
        folder = Path("{folder}") / f"twin-{{version}}"
        policy.export(folder, own_head=True)
        self.twin = load_policy(replace(self.config, model=replace(self.config.model, path=str(folder))))

    def generate(self, prompts, seeds, sampling):
        return self.twin.generate(prompts, seeds, sampling)
"""


@pytest.mark.slow
def test_a_second_policy_from_the_exported_folder_takes_the_steps_of_the_policy_itself(backend, tmp_path, capsys):
    """With the seeds of the policy's own sampling."""
    model = tiny_models.write_model("llama", tmp_path / "model", tie_word_embeddings=True)
    for name in ("own", "twin"):
        config = write_run(tmp_path / name, backend, model, steps=3, extra="", model_extra="")
        text = config.read_text().replace(f'evaluation = "{tmp_path / name / "train.jsonl"}"', "")
        if name == "twin":
            (tmp_path / name / "twin.py").write_text(TWIN.format(folder=tmp_path))
            text = text.replace("[rollout]", f'[rollout]\nsampler = "{tmp_path / name / "twin.py"}:Twin"')
        config.write_text(text.replace("every = 5", ""))
        assert cli.main(["train", str(config)]) == 0
    drawn = [
        [
            json.loads(line)["response"]
            for line in (tmp_path / name / "run" / "completions.jsonl").read_text().splitlines()
        ]
        for name in ("own", "twin")
    ]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 36
    norms = [[record["gradient_norm"] for record in trained(tmp_path / name / "run")] for name in ("own", "twin")]
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-5)
    shutil.rmtree(tmp_path / "model")
