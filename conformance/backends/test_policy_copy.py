"""rollout.ahead without a sampler: a copy of the policy, in a process of its own, draws what the policy would draw."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import trainer_backends
from batches import batch, train
from killing import Forked, events, lasting, trained
from places import DEVICE
from trainer_backends import Backend
from trainer_runs import write_run

from gvpo_core.training.config import Config, ConfigError, ModelConfig, OptimizerConfig, RolloutConfig, RunConfig
from gvpo_core.training.policy import Batch
from gvpo_core.training.policy.load import load_policy
from gvpo_core.training.samplers import SamplerError
from gvpo_core.training.samplers.copied import PolicyCopy
from gvpo_core.training.sampling import Sampling

PRESENT = trainer_backends.present()
if not PRESENT:
    pytest.skip("no backend of a language model is among the subjects", allow_module_level=True)

PROMPTS, SEEDS = [(5, 6, 7), (8, 9)], [[1, 2, 3, 4], [5, 6]]
SAMPLING = Sampling(12)
SETTINGS = pytest.mark.parametrize(
    "settings", [{}, {"lora_rank": 3}, {"dtype": "bfloat16"}], ids=["full", "lora", "bfloat16"]
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_models.write_model("llama", tmp_path_factory.mktemp("model"), tie_word_embeddings=True)


@pytest.mark.slow
@SETTINGS
def test_a_policy_that_is_not_trained_draws_with_the_parameters_of_one_that_is(settings, backend, model, tmp_path):
    """Nothing but what is trained is on disk, and the copy holds it in the dtype of its products."""
    trained = backend.policies.policy(model, learning_rate=0.05, **settings)
    copy = backend.policies.policy(model, updates=0, **settings)
    train(trained, range(2))
    before = copy.logprobs(batch())
    trained.save_parameters(tmp_path)
    copy.load_parameters(tmp_path)
    written = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    count = sum(p.size for p in backend.policies.parameters(trained).values())
    assert "lora_rank" in settings or written < (3 if "dtype" in settings else 5) * count + 2**14
    gap = np.abs(copy.logprobs(batch()) - trained.logprobs(batch())).max()
    moved = np.abs(before - trained.logprobs(batch())).max()
    assert moved > 1 and gap < (0.1 * moved if "dtype" in settings else 1e-5)
    if "dtype" not in settings:
        assert copy.generate(PROMPTS, SEEDS, SAMPLING) == trained.generate(PROMPTS, SEEDS, SAMPLING)
    other = tiny_models.write_model("llama", tmp_path / "other", num_hidden_layers=1)
    with pytest.raises(ConfigError, match="does not fit the model"):
        backend.policies.policy(other, updates=0, **settings).load_parameters(tmp_path)


def copied(backend: Backend, model: Path) -> tuple[object, PolicyCopy]:
    config = Config(
        run=RunConfig(backend=backend.name),
        model=ModelConfig(path=str(model), device=DEVICE, dtype="float32"),
        rollout=RolloutConfig(ahead=2),  # three versions may wait
        optimizer=OptimizerConfig(learning_rate=0.05),
    )
    policy = load_policy(config)
    return policy, PolicyCopy(config, policy)


def tokens(drawn):
    return [[(r.tokens, r.finished) for r in many] for many in drawn]


@pytest.mark.slow_on("jax", "torch")
def test_the_copy_draws_the_policys_own_responses_of_each_version(backend, model):
    """Asked for before the parameters are renewed, and waited for afterwards; then the process dies."""
    policy, copy = copied(backend, model)
    try:
        assert copy.dtype == "float32" and os.getpid() != copy._process._process.pid
        waiting, wanted = [], []
        for version in range(3):
            copy.refresh(policy, version)
            waiting.append(copy.ask(PROMPTS, SEEDS, SAMPLING))
            wanted.append(tokens(policy.generate(PROMPTS, SEEDS, SAMPLING)))
            if version < 2:
                train(policy, [version])
        assert [tokens(get()) for get in waiting] == wanted and wanted[0] != wanted[1] != wanted[2]
        assert [{r.version for many in get() for r in many} for get in waiting] == [{0}, {1}, {2}]
        probed = copy.probe(PROMPTS, SEEDS, SAMPLING)
        rows = [(p, r) for p, many in zip(PROMPTS, probed, strict=True) for r in many]
        ours = policy.logprobs(Batch([p for p, _ in rows], [r.tokens for _, r in rows], list(range(len(rows)))))
        np.testing.assert_allclose([r.logprob for _, r in rows], ours, atol=1e-4)
        assert not list(copy._folder.iterdir()), "parameters that were taken are still in memory"
        copy._process._process.send_signal(signal.SIGKILL)
        with pytest.raises(SamplerError, match="copy of the policy that draws ahead failed: its process was killed by"):
            copy.generate(PROMPTS, SEEDS, SAMPLING)
    finally:
        copy.close()
    assert not copy._folder.exists()


def made(folder: Path, backend: Backend, model: Path) -> Path:
    config = write_run(folder, backend, model, steps=5, extra="", model_extra="")
    text = config.read_text().replace("[rollout]", "[rollout]\nahead = 2").replace("every = 5", "")
    config.write_text(text.replace(f'evaluation = "{folder / "train.jsonl"}"', ""))
    return config


def started(config: Path, backend: Backend) -> Forked:
    return Forked.of(backend.preload)(config, config.with_suffix(".log"))


@pytest.mark.slow
def test_a_killed_run_repeats_its_steps(backend, model, tmp_path):
    """SIGKILL after three of five steps, with a checkpoint after each second one, and two steps drawn ahead."""
    whole, killed = (made(tmp_path / name, backend, model) for name in ("whole", "killed"))
    started(whole, backend).finish()
    process = started(killed, backend)
    process.wait_for_steps(tmp_path / "killed" / "run", 3)
    process.kill()
    started(killed, backend).finish()
    assert "resume" in events(tmp_path / "killed" / "run")
    assert lasting(tmp_path / "killed" / "run") == lasting(tmp_path / "whole" / "run")
    assert [record["sampler/staleness"] for record in trained(tmp_path / "killed" / "run")] == [0, 1, 2, 2, 2]
    assert min(record["gradient_norm"] for record in trained(tmp_path / "killed" / "run")) > 0


@pytest.mark.slow
def test_two_processes_with_a_copy_each_draw_what_one_does(backend, model, tmp_path):
    if backend.name == "jax":
        pytest.skip("refused by name: conformance/training/test_ahead_copy.py")
    for sharding in ("one", *backend.shardings):
        config = made(tmp_path / sharding, backend, model)
        if sharding == "one":
            started(config, backend).finish()
            continue
        if len(backend.shardings) > 1:
            config.write_text(config.read_text().replace("[model]", f'[model]\nsharding = "{sharding}"'))
        status, output = backend.two_processes(config)
        assert status == 0, output
        responses = [[c["response"] for c in completions(tmp_path / name)] for name in ("one", sharding)]
        assert responses[0] == responses[1] and len(responses[0]) == 5 * 12
        assert [record["sampler/staleness"] for record in trained(tmp_path / sharding / "run")] == [0, 1, 2, 2, 2]
        norms = [[record["gradient_norm"] for record in trained(tmp_path / name / "run")] for name in ("one", sharding)]
        np.testing.assert_allclose(norms[1], norms[0], rtol=1e-4)


def completions(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "completions.jsonl").read_text().splitlines()]
