"""docs/new_backend.md is enough: a backend written from it steps, samples, saves, resumes, exports and trains."""

import ast
import difflib
import io
import json
import re
from dataclasses import replace
from itertools import combinations, pairwise
from typing import Literal

import numpy as np
import pytest
from batches import coefficients_of
from places import ROOT
from toy_policy import ToyPolicy

from gvpo_core.training import Config, ConfigError, ModelConfig, OptimizerConfig, load_policy, train
from gvpo_core.training.config import DataConfig, EvaluationConfig, RolloutConfig, RunConfig
from gvpo_core.training.config.backends import BACKENDS, Backend
from gvpo_core.training.policy import Batch, Policy
from gvpo_core.training.policy.base import LanguageModelPolicy
from gvpo_core.training.sampling import Sampling, uniforms
from gvpo_core.training.watch.console import Console

pytestmark = pytest.mark.core

CHARACTERS = "|abcdefghijklmnopqrstuvwxyz"
OF = Batch([(1, 2), (1, 2), (1, 2), (3,), (3,)], [(4, 5, 0), (1,), (6, 6, 2, 0), (2, 0), (5, 4, 4)], [7, 7, 7, 9, 9])
SMOOTH = {"learning_rate": 0.5, "betas": (0.0, 0.0), "eps": 1.0, "max_gradient_norm": 0.0}
PAGE = (ROOT / "docs/new_backend.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    size = len(CHARACTERS)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps({"characters": CHARACTERS}))
    np.save(tmp_path / "model/weights.npy", np.random.default_rng(0).normal(size=(size, size)))
    return tmp_path / "model"


@pytest.fixture
def registered(monkeypatch):
    """The two lines that the page asks for."""
    monkeypatch.setitem(RunConfig.__annotations__, "backend", Literal["auto", "toy"])
    monkeypatch.setitem(BACKENDS, "toy", Backend("toy", "toy_policy", (), {}, "cpu", frozenset()))


def policy(folder, *, updates=10, reference=False, **settings) -> ToyPolicy:
    model, optimizer = ModelConfig(path=str(folder)), OptimizerConfig(**(SMOOTH | settings))
    return ToyPolicy(model, optimizer, updates=updates, reference=reference, seed=0)


def log_pi(weights: np.ndarray, prompt, response) -> float:
    total, before = 0.0, prompt[-1]
    for after in response:
        total += weights[before, after] - np.log(sum(np.exp(weights[before, v]) for v in range(len(weights))))
        before = after
    return total


def test_every_method_that_a_backend_writes_is_on_the_page() -> None:
    wanted = {*LanguageModelPolicy.__abstractmethods__, "_read_tokenizer", "_weights_for_sampling"}
    assert len(wanted) > 8
    assert [name for name in sorted(wanted) if f"`{name}" not in PAGE] == []


SPELLED = {"torch": "Torch", "jax": "Jax", "mlx": "MLX"}
SOURCES = {name: (ROOT / f"backends/gvpo_{name}/policy.py").read_text(encoding="utf-8") for name in SPELLED}
FIGURES = r"(\d+) added and removed lines for PyTorch and JAX, (\d+) for PyTorch and MLX, and (\d+) for JAX and MLX"


def test_the_diffs_of_policies_are_as_long_as_the_page_says() -> None:
    """To 15 lines; and of the toy's length, to 10."""
    lines = {
        name: source.replace(f"gvpo_{name}", "gvpo_NAME").replace(SPELLED[name], "Name").splitlines()
        for name, source in SOURCES.items()
    }
    (figures,) = re.findall(FIGURES, PAGE.replace("\n", " "))
    for (one, other), figure in zip(combinations(lines, 2), figures, strict=True):
        diff = list(difflib.unified_diff(lines[one], lines[other], lineterm="", n=0))[2:]
        changed = sum(line[0] in "+-" for line in diff)
        assert abs(changed - int(figure)) <= 15, (one, other, changed)
    (length,) = re.findall(r"about (\d+) lines, tested by", PAGE.replace("\n", " "))
    toy = (ROOT / "conformance/support/toy_policy.py").read_text(encoding="utf-8")
    assert abs(len(toy.splitlines()) - int(length)) <= 10


def test_members_that_two_policies_share_come_in_the_same_order() -> None:
    members = {}
    for name, source in SOURCES.items():
        (policy_class,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
        members[name] = [node.name for node in policy_class.body if isinstance(node, ast.FunctionDef)]
        assert len(members[name]) > 15
    for one, other in combinations(members.values(), 2):
        places = [other.index(name) for name in one if name in other]
        assert all(a < b for a, b in pairwise(places)), [other[i] for i in places]


def test_it_has_every_member_of_the_protocol(folder) -> None:
    of_policy = policy(folder)
    members = {name for name in (*dir(Policy), *Policy.__annotations__) if not name.startswith("_")}
    assert {"update", "export_adapters", "world_size"} <= members
    assert [name for name in sorted(members) if not hasattr(of_policy, name)] == []


def test_logprobs_are_those_of_the_model(folder) -> None:
    of_policy = policy(folder)
    right = [log_pi(of_policy.weights, p, r) for p, r in zip(OF.prompts, OF.responses, strict=True)]
    np.testing.assert_allclose(of_policy.logprobs(OF), right, rtol=0, atol=1e-12)


def test_the_step_is_that_of_finite_differences(folder) -> None:
    of_policy = policy(folder)
    before, c = of_policy.weights.copy(), np.random.default_rng(1).normal(size=len(OF))
    update = of_policy.update(OF, lambda logprobs, rows: c[rows])
    loss = lambda w: -sum(factor * log_pi(w, p, r) for factor, p, r in zip(c, OF.prompts, OF.responses, strict=True))
    gradient = np.zeros_like(before)
    for place in np.ndindex(before.shape):
        up, down = before.copy(), before.copy()
        up[place] += 1e-5
        down[place] -= 1e-5
        gradient[place] = (loss(up) - loss(down)) / 2e-5
    assert update.gradient_norm == pytest.approx(np.sqrt((gradient**2).sum()), rel=1e-8)
    expected = before - 0.5 * gradient / (np.abs(gradient) + 1.0)  # AdamW with SMOOTH
    np.testing.assert_allclose(of_policy.weights, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("settings", [{"micro_batch_responses": 1}, {"micro_batch_tokens": 8}, {"strategy": "score"}])
def test_the_step_does_not_depend_on_the_split(settings, folder) -> None:
    whole, split = policy(folder), policy(folder, **settings)
    one, other = (p.update(OF, coefficients_of(OF)) for p in (whole, split))
    assert np.abs(whole.weights - whole.reference).max() > 1e-2
    np.testing.assert_allclose(split.weights, whole.weights, rtol=0, atol=1e-12)
    np.testing.assert_allclose(other.logprobs, one.logprobs, rtol=0, atol=1e-12)


def test_a_step_that_is_not_finite_changes_nothing(folder) -> None:
    of_policy = policy(folder)
    with pytest.raises(FloatingPointError, match="coefficients of 1 of"):
        of_policy.update(OF, lambda logprobs, rows: np.where(rows == 1, np.nan, 0.0))
    np.testing.assert_array_equal(of_policy.weights, of_policy.reference)
    assert of_policy.steps_taken == 0


def test_the_reference_stays_where_it_was(folder) -> None:
    of_policy = policy(folder, reference=True)
    first = of_policy.logprobs(OF)
    of_policy.update(OF, coefficients_of(OF))
    np.testing.assert_array_equal(of_policy.logprobs(OF, reference=True), first)
    with pytest.raises(RuntimeError, match="the reference was not loaded"):
        policy(folder).logprobs(OF, reference=True)


def test_samples_are_the_inverse_of_the_distribution_and_keep_the_end_token(folder) -> None:
    of_policy = policy(folder)
    seeds = [[1, 2, 3, 4, 5, 6, 7, 8], [9]]
    found = of_policy.generate([(1, 2), (3,)], seeds, Sampling(6, temperature=0.7))
    assert {r.finished for r in found[0]} == {True, False}
    for prompt, row, row_seeds in zip([(1, 2), (3,)], found, seeds, strict=True):
        for response, seed in zip(row, row_seeds, strict=True):
            assert response.finished == (response.tokens[-1] == 0) and 0 not in response.tokens[:-1]
            assert response.finished or len(response.tokens) == 6
            before = prompt[-1]
            for token, u in zip(response.tokens, uniforms([seed], 0, 6)[0], strict=False):
                p = np.exp(of_policy.weights[before] / 0.7)
                p /= p.sum()
                assert p[:token].sum() <= u < p[: token + 1].sum()
                before = token
    assert of_policy.generate([(3,), (1, 2)], seeds[::-1], Sampling(6, temperature=0.7)) == found[::-1]


def test_text_goes_through_the_tokenizer_and_back(folder) -> None:
    of_policy = policy(folder)
    assert of_policy.encode("abc") == (1, 2, 3)
    assert of_policy.decode((1, 2, 0)) == "ab"


def test_two_and_two_steps_are_four(folder, tmp_path) -> None:
    settings = {"learning_rate": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "warmup": 2, "schedule": "cosine"}
    whole, first, second = (policy(folder, **settings) for _ in range(3))
    for of_policy, steps in ((whole, 4), (first, 2)):
        for _ in range(steps):
            of_policy.update(OF, coefficients_of(OF))
    first.save(tmp_path)
    second.restore(tmp_path)
    assert second.steps_taken == 2
    for _ in range(2):
        second.update(OF, coefficients_of(OF))
    np.testing.assert_array_equal(second.weights, whole.weights)
    second.reset()
    assert second.steps_taken == 0
    np.testing.assert_array_equal(second.weights, whole.reference)


def test_a_checkpoint_that_does_not_fit_is_named(folder, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"has no state\.json: not a checkpoint of this backend"):
        policy(folder).restore(tmp_path)
    policy(folder).save(tmp_path)
    np.save(folder / "weights.npy", np.zeros((4, 4)))
    with pytest.raises(ConfigError, match="another shape of 2 tensors, the first moments"):
        policy(folder).restore(tmp_path)
    (tmp_path / "arrays.npz").unlink()
    with pytest.raises(ConfigError, match=r"lacks its file arrays\.npz"):
        policy(folder).restore(tmp_path)


def test_an_export_is_the_trained_model(folder, tmp_path) -> None:
    of_policy = policy(folder)
    of_policy.update(OF, coefficients_of(OF))
    of_policy.export(tmp_path / "out")
    np.testing.assert_array_equal(policy(tmp_path / "out").logprobs(OF), of_policy.logprobs(OF))


def configured(folder, run, steps: int) -> Config:
    return Config(
        run=RunConfig(folder=str(run), backend="toy", steps=steps, checkpoint_every=4, show_every=0),  # type: ignore[arg-type]
        model=ModelConfig(path=str(folder)),
        data=DataConfig(train="rows"),
        rollout=RolloutConfig(prompts=2, responses=8, max_tokens=4),
        optimizer=OptimizerConfig(learning_rate=0.4),
        evaluation=EvaluationConfig(responses=4, temperature=1.0),
    )


def run(folder, place, steps: int):
    config = configured(folder, place, steps)
    made = load_policy(config)
    assert type(made).__name__ == "ToyPolicy"
    rows = [{"prompt": letter} for letter in "abcd"]
    rewards = {"vowels": lambda completions: [c.count("a") + c.count("e") - 0.1 * len(c) for c in completions]}
    given = {"train_rows": rows, "evaluation_rows": rows, "rewards": rewards}
    train(config, made, console=Console(steps, stream=io.StringIO()), **given)
    return made


def records(place, kind: str) -> list[dict]:
    lines = (place / "metrics.jsonl").read_text().splitlines()
    return [r for line in lines if (r := json.loads(line))["kind"] == kind]


def test_train_raises_the_held_out_reward_and_resumes_bit_for_bit(folder, tmp_path, registered) -> None:
    whole = run(folder, tmp_path / "whole", 8)
    first, *_, last = (r["eval/reward"] for r in records(tmp_path / "whole", "eval"))
    assert last > first + 0.3
    run(folder, tmp_path / "parts", 4)
    resumed = run(folder, tmp_path / "parts", 8)
    assert [r["step"] for r in records(tmp_path / "parts", "train")] == list(range(1, 9))
    np.testing.assert_array_equal(resumed.weights, whole.weights)
    environment = json.loads((tmp_path / "whole/environment.json").read_text())
    assert environment["policy"]["backend"] == "toy" and environment["policy"]["vocabulary"] == len(CHARACTERS)


def test_settings_that_it_does_not_have_are_refused(folder, tmp_path, registered) -> None:
    config = configured(folder, tmp_path / "run", 1)
    with pytest.raises(ConfigError, match=r"model\.lora_rank is 2, a setting of .* that toy does not have"):
        load_policy(replace(config, model=replace(config.model, lora_rank=2)))
