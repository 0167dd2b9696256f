"""The step in MLX: the same however the batch is split, packed, compiled or scored, and what it must refuse."""

import numpy as np
import pytest
import tiny_models
from mlx_policies import parameters, policy, require
from torch_policies import batch, coefficients_of, step_difference

require()

import mlx.core as mx
from gvpo_mlx.buckets import bucket, padded
from gvpo_mlx.model import inputs
from gvpo_mlx.update import AdamW

from gvpo_core.training import layout
from gvpo_core.training.config import OptimizerConfig

# With these AdamW's step is lr * g / (|g| + 1), smooth in the gradient: no sign of a rounding error decides it.
SMOOTH = {"learning_rate": 0.5, "betas": (0.0, 0.0), "eps": 1.0}
OF = batch((4, 3, 1, 5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.write_model("llama-tied", tmp_path_factory.mktemp("llama"))


def moved(folder, of=OF, scored=None, rewards=None, **settings):
    """The step's change of every parameter."""
    of_policy = policy(folder, **(SMOOTH | settings))
    before = parameters(of_policy)
    update = of_policy.update(of, coefficients_of(of, rewards=rewards), scored=scored)
    after = parameters(of_policy)
    return {name: after[name] - before[name] for name in after}, update


SPLITS = {
    "one": {"micro_batch_responses": 1},
    "three": {"micro_batch_responses": 3},
    "tokens-30": {"micro_batch_tokens": 30},
    "less than a response": {"micro_batch_tokens": 1},
    "score-three": {"strategy": "score", "micro_batch_responses": 3},
    "plain": {"layout": "plain"},
    "plain-three": {"layout": "plain", "micro_batch_responses": 3},
    "checkpointing": {"gradient_checkpointing": True},
    "checkpointing-packed-score": {"gradient_checkpointing": True, "strategy": "score", "micro_batch_tokens": 60},
    "compiled": {"compiled": True, "strategy": "score"},
}


KINDS = {
    "full": {},
    "lora": {"lora_rank": 3, "learning_rate": 3.0},
    "dora": {"lora_rank": 3, "learning_rate": 3.0, "lora_kind": "dora"},
}


@pytest.fixture(scope="module", params=list(KINDS))
def whole_step(request, folder):
    return KINDS[request.param], moved(folder, **KINDS[request.param])


@pytest.mark.parametrize("split", SPLITS)
def test_the_step_does_not_depend_on_the_split(split: str, folder, whole_step) -> None:
    kind, (step, update) = whole_step
    found, other = moved(folder, **(kind | SPLITS[split]))
    assert max(float(np.abs(d).max()) for d in step.values()) > 1e-3
    assert step_difference(step, found) < 1e-5
    np.testing.assert_allclose(other.logprobs, update.logprobs, rtol=0, atol=1e-4)
    assert other.gradient_norm == pytest.approx(update.gradient_norm, rel=1e-5)


def test_nor_on_the_order_of_rows(folder) -> None:
    step, update = moved(folder)
    order = np.random.default_rng(3).permutation(len(OF))
    rewards = np.random.default_rng(5).normal(size=len(OF))[order]
    found, other = moved(folder, OF.take(order.tolist()), rewards=rewards)
    assert step_difference(step, found) < 1e-5
    np.testing.assert_allclose(other.logprobs, update.logprobs[order], rtol=0, atol=1e-4)


def test_nor_on_scores_that_are_known(folder) -> None:
    step, update = moved(folder)
    found, other = moved(folder, scored=update.logprobs)
    assert step_difference(step, found) < 1e-5
    assert other.tokens == update.tokens  # no scoring pass
    assert moved(folder, strategy="score")[1].tokens == 2 * update.tokens


def test_weights_are_constants(folder) -> None:
    # The gradient for coefficients that depend on the log-probs is the one for the same numbers given as constants.
    step, update = moved(folder)
    constant = coefficients_of(OF)(update.logprobs, np.arange(len(OF)))
    of_policy = policy(folder, **SMOOTH)
    before = parameters(of_policy)
    of_policy.update(OF, lambda logprobs, rows: constant[rows])
    after = parameters(of_policy)
    assert step_difference(step, {name: after[name] - before[name] for name in after}) < 1e-5


def test_packed_rows_save_the_prompt(folder) -> None:
    tokens = {name: moved(folder, layout=name)[1].tokens for name in ("packed", "plain")}
    assert tokens["packed"] < 0.8 * tokens["plain"]


@pytest.mark.parametrize("kind", KINDS)
def test_reference_is_the_initial_model(kind: str, folder) -> None:
    of_policy = policy(folder, reference=True, **(SMOOTH | KINDS[kind]))
    first = of_policy.logprobs(OF, reference=True)
    np.testing.assert_allclose(first, of_policy.logprobs(OF), rtol=0, atol=1e-4)
    of_policy.update(OF, coefficients_of(OF))
    np.testing.assert_array_equal(of_policy.logprobs(OF, reference=True), first)
    assert np.abs(of_policy.logprobs(OF) - first).max() > 1e-3


def test_a_reference_not_asked_for_is_an_error(folder) -> None:
    with pytest.raises(RuntimeError, match=r"load\(..., reference=True\)"):
        policy(folder).logprobs(OF, reference=True)


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 4}], ids=["full", "lora"])
def test_bfloat16_runs_and_is_close(folder, settings) -> None:
    step, update = moved(folder, **settings)
    found, other = moved(folder, dtype="bfloat16", **settings)
    assert np.abs(other.logprobs - update.logprobs).mean() < 0.05 * np.abs(update.logprobs).mean()
    assert step_difference(step, found) < 0.2


def test_bfloat16_keeps_float32_parameters_and_an_equal_reference(folder) -> None:
    of_policy = policy(folder, dtype="bfloat16", learning_rate=1e-6, reference=True)
    np.testing.assert_allclose(of_policy.logprobs(OF, reference=True), of_policy.logprobs(OF), rtol=0, atol=1e-5)
    before = parameters(of_policy)
    assert {p.dtype for p in of_policy.scorer.parameters} == {mx.float32}
    of_policy.update(OF, coefficients_of(OF))
    after = parameters(of_policy)
    changed = [np.mean(after[name] != before[name]) for name in after if "proj.weight" in name]
    assert min(changed) > 0.5  # a bfloat16 parameter of 0.3 cannot move by 1e-6


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


def test_clipping(folder) -> None:
    settings = {"learning_rate": 1.0, "betas": (0.0, 0.0), "eps": 1e8}  # step = 1e-8 g
    free = policy(folder, **settings)
    norm = free.update(OF, coefficients_of(OF)).gradient_norm
    assert norm > 1.0
    clipped = policy(folder, max_gradient_norm=norm / 4, **settings)
    assert clipped.update(OF, coefficients_of(OF)).gradient_norm == pytest.approx(norm)  # before clipping
    seen = {}
    for name, of_policy in (("free", free), ("clipped", clipped)):
        seen[name] = sum(float(mx.square(m).sum()) for m, _ in of_policy._optimizer.moments) ** 0.5
    assert seen["clipped"] == pytest.approx(seen["free"] / 4, rel=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_coefficients_that_are_not_finite_leave_everything_as_it_was(folder, bad: float) -> None:
    of_policy = policy(folder)
    before = parameters(of_policy)
    with pytest.raises(FloatingPointError, match=r"coefficients of 1 of .* responses are not finite.*no step"):
        of_policy.update(OF, lambda logprobs, rows: np.where(np.arange(len(rows)) == 1, bad, 0.0))
    assert step_difference(before, parameters(of_policy)) == 0.0


def test_gradients_that_are_not_finite_name_their_parameter(folder, monkeypatch) -> None:
    of_policy = policy(folder)
    before = parameters(of_policy)
    place = next(i for i, n in enumerate(of_policy.scorer.names) if "layers.1.mlp.up_proj" in n)
    plain = of_policy._passes._plain_backward

    def spoiled(*arguments):
        values, gradients = plain(*arguments)
        gradients[place] = gradients[place] * float("nan")
        return values, gradients

    monkeypatch.setattr(of_policy._passes, "_plain_backward", spoiled)
    name = of_policy.scorer.names[place]
    with pytest.raises(FloatingPointError, match=f"gradients of 1 of .* the first {name}; no step was taken"):
        of_policy.update(OF, coefficients_of(OF))
    assert step_difference(before, parameters(of_policy)) == 0.0
    assert not of_policy._optimizer.moments and of_policy._optimizer.steps == 0


def test_results_of_the_wrong_shape_are_named(folder) -> None:
    of_policy = policy(folder)
    with pytest.raises(ValueError, match=r"coefficients returned shape \(2,\); expected \(13,\)"):
        of_policy.update(OF, lambda logprobs, rows: np.zeros(2))
    with pytest.raises(ValueError, match=r"scored has shape \(2,\); expected \(13,\)"):
        of_policy.update(OF, coefficients_of(OF), scored=np.zeros(2))


def test_loading_changes_no_global_setting(folder) -> None:
    import resource

    def settings():
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        return limit, np.array(mx.random.state[0]).tolist(), mx.default_device(), mx.default_stream(mx.cpu)

    before = settings()
    of_policy = policy(folder, lora_rank=2, seed=9)
    of_policy.update(OF, coefficients_of(OF))
    assert settings() == before


def test_adapters_follow_the_seed(folder) -> None:
    a, b, c = (parameters(policy(folder, lora_rank=2, seed=seed)) for seed in (1, 1, 2))
    assert step_difference(a, b) == 0.0
    assert step_difference(a, c) > 0.1


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
