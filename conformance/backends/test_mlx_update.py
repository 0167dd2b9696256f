"""What only gvpo_mlx's step has: compiled passes, buckets of shapes, and an AdamW of its own."""

import batches
import mlx_policies
import numpy as np
import pytest
import tiny_models
from batches import batch, coefficients_of, step_difference
from mlx_policies import policy
from required import require

require(subject="mlx")

import mlx.core as mx
from gvpo_mlx import update as mlx_update
from gvpo_mlx.buckets import bucket, padded
from gvpo_mlx.model import inputs
from gvpo_mlx.update import AdamW

from gvpo_core.training.config import OptimizerConfig
from gvpo_core.training.policy import layout

OF = batch((4, 3, 1, 5))
KINDS = {
    "full": {},
    "lora": {"lora_rank": 3, "learning_rate": 3.0},
    "dora": {"lora_rank": 3, "learning_rate": 3.0, "lora_kind": "dora"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.write_model("llama-tied", tmp_path_factory.mktemp("llama"))


@pytest.mark.slow_on("dora", "lora")
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_step_is_the_same(kind: str, folder) -> None:
    (step, update), (found, other) = (
        batches.moved(mlx_policies, folder, OF, **(KINDS[kind] | settings))
        for settings in ({}, {"compiled": True, "strategy": "score"})
    )
    assert max(float(np.abs(d).max()) for d in step.values()) > 1e-3
    assert step_difference(step, found) < 1e-5
    np.testing.assert_allclose(other.logprobs, update.logprobs, rtol=0, atol=1e-4)
    assert other.gradient_norm == pytest.approx(update.gradient_norm, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_group_pass_is_the_same(kind: str, folder) -> None:
    """Whole groups in one forward and backward pass: the backward pass takes factors that the forward pass gives."""
    settings = batches.SMOOTH | {"strategy": "group"} | KINDS[kind]
    of_policy = policy(folder, compiled=True, **settings)
    programs = []
    plain, of_policy._passes._backward = of_policy._passes._backward, lambda *a: programs.append(a) or plain(*a)
    before = mlx_policies.parameters(of_policy)
    other = of_policy.update(OF, coefficients_of(OF))
    found = {name: value - before[name] for name, value in mlx_policies.parameters(of_policy).items()}
    assert programs and list(of_policy._passes.separable.values()) == [True] * len(programs)
    step, update = batches.moved(mlx_policies, folder, OF, **settings)
    assert max(float(np.abs(d).max()) for d in step.values()) > 1e-3
    assert step_difference(step, found) < 1e-5
    np.testing.assert_allclose(other.logprobs, update.logprobs, rtol=0, atol=1e-4)


def test_a_group_pass_that_compilation_mixes_is_not_compiled(folder, monkeypatch) -> None:
    monkeypatch.setattr(mlx_update, "depends_on", lambda *arrays: True)
    step, _ = batches.moved(mlx_policies, folder, OF)
    found, _ = batches.moved(mlx_policies, folder, OF, compiled=True)
    assert step_difference(step, found) < 1e-5


@pytest.mark.parametrize("compiled", [False, True])
def test_an_array_that_is_computed_from_another_is_found(compiled: bool) -> None:
    def pair(a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
        return mx.exp(a) * 2, mx.exp(a) * b

    a, b = mx.zeros(3), mx.ones(3)
    mx.eval(a, b)
    one, both = (mx.compile(pair) if compiled else pair)(a, b)
    assert not mlx_update.depends_on(one, b) and mlx_update.depends_on(both, b)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_is_the_written_one(decay: float) -> None:
    """Ten steps of Loshchilov and Hutter's algorithm in float64, as PyTorch has it; decay on matrices alone."""
    config = OptimizerConfig(learning_rate=0.01, weight_decay=decay, betas=(0.9, 0.999), eps=1e-8)
    draw = np.random.default_rng(0)
    values = [draw.normal(size=(4, 3)), draw.normal(size=5)]
    optimizer = AdamW(config, compiled=False)
    found = [mx.array(v.astype(np.float32)) for v in values]
    m, v = [np.zeros_like(x) for x in values], [np.zeros_like(x) for x in values]
    for t in range(1, 11):
        gradients = [draw.normal(size=x.shape).astype(np.float32) for x in values]
        found = optimizer.step(found, [mx.array(g) for g in gradients], 0.01)
        for i, g in enumerate(gradients):
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.999 * v[i] + 0.001 * g.astype(np.float64) ** 2
            corrected = np.sqrt(v[i] / (1 - 0.999**t)) + 1e-8
            kept = 1 - 0.01 * decay * (values[i].ndim >= 2)
            values[i] = values[i] * kept - 0.01 * m[i] / (1 - 0.9**t) / corrected
    for one, other in zip(found, values, strict=True):
        np.testing.assert_allclose(np.array(one), other, rtol=1e-5, atol=1e-6)


def test_buckets_are_few_and_near() -> None:
    sizes = {bucket(n) for n in range(1, 4097)}
    assert len(sizes) <= 40
    assert all(n <= bucket(n) <= n + max(7, n / 4) for n in range(1, 4097))


def test_padding_to_a_bucket_changes_no_value(folder) -> None:
    of_policy = policy(folder)
    arrays = layout.arrays(OF, layout.plan_rows(OF, packed=True, tokens=1 << 20))
    wide = padded(arrays, 1 << 20)
    assert wide.ids.shape != arrays.ids.shape
    score = lambda a: np.array(of_policy.scorer.score(of_policy.scorer.parameters, **inputs(a), packed=True))
    np.testing.assert_allclose(score(wide)[: len(arrays.targets)], score(arrays), rtol=0, atol=1e-4)
    assert padded(arrays, arrays.ids.size).ids.shape == arrays.ids.shape  # the budget is kept


def test_like_batches_share_a_program(folder) -> None:
    of_policy = policy(folder, compiled=True, strategy="score", learning_rate=1e-5)
    for seed in range(6):
        of = batch((3, 3), seed=seed)
        of_policy.update(of, coefficients_of(of))
    assert len(of_policy._passes.shapes) <= 2 * 4
