"""The step: the same however the batch is split, in any order, and what it must refuse."""

import logging

import numpy as np
import pytest
import tiny_models
from torch_policies import batch, coefficients_of, parameters, policy, require, step_difference

require()

import torch

from gvpo_core.training.config import OptimizerConfig
from gvpo_core.training.step import learning_rate

# With these AdamW's step is lr * g / (|g| + 1), smooth in the gradient: no sign of a rounding error decides it.
SMOOTH = {"learning_rate": 0.5, "betas": (0.0, 0.0), "eps": 1.0}
OF = batch((4, 3, 1, 5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.make_model("llama-tied-bias", tmp_path_factory.mktemp("llama"))


def moved(folder, of=OF, scored=None, rewards=None, **settings) -> tuple[dict[str, np.ndarray], object]:
    """The step's change of every parameter."""
    of_policy = policy(folder, **(SMOOTH | settings))
    before = parameters(of_policy)
    update = of_policy.update(of, coefficients_of(of, rewards=rewards), scored=scored)
    after = parameters(of_policy)
    return {name: after[name] - before[name] for name in after}, update


SPLITS = {
    "one": {"micro_batch_responses": 1},
    "three": {"micro_batch_responses": 3},
    "eight": {"micro_batch_responses": 8},
    "all": {"micro_batch_responses": len(OF)},
    "tokens-30": {"micro_batch_tokens": 30},
    "tokens-60": {"micro_batch_tokens": 60},
    "less than a response": {"micro_batch_tokens": 1},
    "score": {"strategy": "score"},
    "score-three": {"strategy": "score", "micro_batch_responses": 3},
    "plain-three": {"layout": "plain", "micro_batch_responses": 3},
    "checkpointing": {"gradient_checkpointing": True},
}


@pytest.fixture(scope="module", params=["full", "lora"])
def whole_step(request, folder):
    kind = {} if request.param == "full" else {"lora_rank": 3, "learning_rate": 3.0}
    return kind, moved(folder, **kind)


@pytest.mark.parametrize("split", SPLITS)
def test_the_step_does_not_depend_on_the_split(split: str, folder, whole_step) -> None:
    kind, (step, update) = whole_step
    found, other = moved(folder, **(kind | SPLITS[split]))
    assert max(float(np.abs(d).max()) for d in step.values()) > 1e-3
    assert step_difference(step, found) < 1e-5
    np.testing.assert_allclose(other.logprobs, update.logprobs, rtol=0, atol=1e-4)
    assert other.gradient_norm == pytest.approx(update.gradient_norm, rel=1e-5)


def test_nor_on_the_order_of_rows(folder, whole_step) -> None:
    kind, (step, update) = whole_step
    order = np.random.default_rng(3).permutation(len(OF))
    rewards = np.random.default_rng(5).normal(size=len(OF))[order]
    found, other = moved(folder, OF.take(order.tolist()), rewards=rewards, **kind)
    assert step_difference(step, found) < 1e-5
    np.testing.assert_allclose(other.logprobs, update.logprobs[order], rtol=0, atol=1e-4)


def test_nor_on_scores_that_are_known(folder, whole_step) -> None:
    kind, (step, update) = whole_step
    found, other = moved(folder, scored=update.logprobs, **kind)
    assert step_difference(step, found) < 1e-5
    assert other.tokens == update.tokens  # no scoring pass


def test_strategy_group_scores_nothing_that_fits(folder) -> None:
    together, apart = moved(folder)[1], moved(folder, strategy="score")[1]
    assert apart.tokens == 2 * together.tokens


def test_adamw_itself_to_rounding(folder) -> None:
    found = [parameters_after(folder, **split) for split in (SPLITS["all"], SPLITS["three"], SPLITS["tokens-30"])]
    for other in found[1:]:
        assert step_difference(found[0], other) < 1e-5


def parameters_after(folder, **settings):
    of_policy = policy(folder, learning_rate=1e-5, **settings)
    of_policy.update(OF, coefficients_of(OF))
    return parameters(of_policy)


def test_logprobs_are_those_before_the_step(folder) -> None:
    of_policy = policy(folder, **SMOOTH)
    before = of_policy.logprobs(OF)
    update = of_policy.update(OF, coefficients_of(OF))
    np.testing.assert_allclose(update.logprobs, before, rtol=0, atol=1e-4)
    assert np.abs(of_policy.logprobs(OF) - before).max() > 1e-2


def test_the_step_raises_what_has_positive_coefficients(folder) -> None:
    of_policy = policy(folder, learning_rate=1e-3)
    signs = np.where(np.arange(len(OF)) % 2, 1.0, -1.0)
    before = of_policy.logprobs(OF)
    for _ in range(5):
        of_policy.update(OF, lambda logprobs, rows: signs[rows])
    assert ((of_policy.logprobs(OF) - before) * signs).mean() > 0.1


def test_weights_are_constants(folder) -> None:
    # The gradient for coefficients that depend on the log-probs is the one for the same numbers given as constants.
    step, update = moved(folder)
    constant = coefficients_of(OF)(update.logprobs, np.arange(len(OF)))
    of_policy = policy(folder, **SMOOTH)
    before = parameters(of_policy)
    of_policy.update(OF, lambda logprobs, rows: constant[rows])
    after = parameters(of_policy)
    assert step_difference(step, {name: after[name] - before[name] for name in after}) < 1e-5


def test_reference_is_the_initial_model(folder) -> None:
    for settings in ({}, {"lora_rank": 2}):
        of_policy = policy(folder, reference=True, **(SMOOTH | settings))
        first = of_policy.logprobs(OF, reference=True)
        np.testing.assert_allclose(first, of_policy.logprobs(OF), rtol=0, atol=1e-5)
        of_policy.update(OF, coefficients_of(OF))
        np.testing.assert_array_equal(of_policy.logprobs(OF, reference=True), first)
        assert np.abs(of_policy.logprobs(OF) - first).max() > 1e-4


def test_a_reference_not_asked_for_is_an_error(folder) -> None:
    with pytest.raises(RuntimeError, match=r"load\(..., reference=True\)"):
        policy(folder).logprobs(OF, reference=True)


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 4}], ids=["full", "lora"])
def test_bfloat16_runs_and_is_close(folder, settings) -> None:
    step, update = moved(folder, **settings)
    found, other = moved(folder, dtype="bfloat16", **settings)
    assert np.abs(other.logprobs - update.logprobs).mean() < 0.05 * np.abs(update.logprobs).mean()
    assert step_difference(step, found) < 0.2
    assert other.gradient_norm == pytest.approx(update.gradient_norm, rel=0.1)


def test_bfloat16_keeps_float32_parameters_and_small_steps(folder) -> None:
    of_policy = policy(folder, dtype="bfloat16", learning_rate=1e-6)
    before = parameters(of_policy)
    assert {p.dtype for p in of_policy._named.values()} == {torch.float32}
    of_policy.update(OF, coefficients_of(OF))
    after = parameters(of_policy)
    changed = [np.mean(after[name] != before[name]) for name in after if "proj.weight" in name]
    assert min(changed) > 0.5  # a bfloat16 parameter of 0.3 cannot move by 1e-6


def test_bfloat16_reference_equals_the_policy_at_the_start(folder) -> None:
    of_policy = policy(folder, dtype="bfloat16", reference=True)
    np.testing.assert_allclose(of_policy.logprobs(OF, reference=True), of_policy.logprobs(OF), rtol=0, atol=1e-5)


def test_dropout_is_off(tmp_path) -> None:
    made = tiny_models.make_model("gpt2", tmp_path, attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    of_policy = policy(made, gradient_checkpointing=True, **SMOOTH)
    before = of_policy.logprobs(OF)
    update = of_policy.update(OF, coefficients_of(OF))
    np.testing.assert_allclose(update.logprobs, before, rtol=0, atol=1e-4)


def test_weight_decay_is_of_matrices_only(folder) -> None:
    of_policy = policy(folder, learning_rate=0.1, weight_decay=0.5)
    before = parameters(of_policy)
    of_policy.update(OF, lambda logprobs, rows: np.zeros(len(rows)))
    for name, value in parameters(of_policy).items():
        factor = 0.95 if value.ndim >= 2 else 1.0
        np.testing.assert_allclose(value, factor * before[name], rtol=1e-6)


def test_clipping(folder) -> None:
    settings = {"learning_rate": 1.0, "betas": (0.0, 0.0), "eps": 1e8}  # step = 1e-8 g
    free = policy(folder, **settings)
    norm = free.update(OF, coefficients_of(OF)).gradient_norm
    assert norm > 1.0
    clipped = policy(folder, max_gradient_norm=norm / 4, **settings)
    assert clipped.update(OF, coefficients_of(OF)).gradient_norm == pytest.approx(norm)  # before clipping
    seen = {}
    for name, of_policy in (("free", free), ("clipped", clipped)):
        state = of_policy._optimizer.state
        seen[name] = sum(float(state[p]["exp_avg"].square().sum()) for p in of_policy._named.values()) ** 0.5
    assert seen["clipped"] == pytest.approx(seen["free"] / 4, rel=1e-4)


def test_schedules() -> None:
    def rates(**settings) -> list[float]:
        config = OptimizerConfig(learning_rate=8.0, **settings)
        return [learning_rate(config, step, 6) for step in range(6)]

    assert rates() == [8.0] * 6
    assert rates(warmup=4) == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0]
    assert rates(warmup=2, schedule="linear") == [4.0, 8.0, 8.0, 6.0, 4.0, 2.0]
    assert rates(schedule="cosine")[3] == pytest.approx(4.0)
    assert learning_rate(OptimizerConfig(schedule="cosine"), 6, 6) == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_coefficients_that_are_not_finite_leave_everything_as_it_was(folder, bad: float) -> None:
    of_policy = policy(folder)
    before = parameters(of_policy)
    with pytest.raises(FloatingPointError, match=r"coefficients of 1 of .* responses are not finite.*no step"):
        of_policy.update(OF, lambda logprobs, rows: np.where(np.arange(len(rows)) == 1, bad, 0.0))
    assert step_difference(before, parameters(of_policy)) == 0.0


def test_gradients_that_are_not_finite_name_their_parameter(folder) -> None:
    of_policy = policy(folder)
    before = parameters(of_policy)
    name, p = next((n, p) for n, p in of_policy._named.items() if "layers.1.mlp.up_proj" in n)
    p.register_hook(lambda g: g * float("nan"))
    with pytest.raises(FloatingPointError, match=f"gradients of 1 of .* the first {name}; no step was taken"):
        of_policy.update(OF, coefficients_of(OF))
    assert step_difference(before, parameters(of_policy)) == 0.0
    assert not of_policy._optimizer.state


def test_logprobs_that_are_not_finite(folder) -> None:
    of_policy = policy(folder)
    with torch.no_grad():
        of_policy._named["model.norm.weight"].fill_(float("inf"))
    with pytest.raises(FloatingPointError, match=r"log-probabilities of .* responses are not finite"):
        of_policy.update(OF, coefficients_of(OF))


def test_results_of_the_wrong_shape_are_named(folder) -> None:
    of_policy = policy(folder)
    with pytest.raises(ValueError, match=r"coefficients returned shape \(2,\); expected \(13,\)"):
        of_policy.update(OF, lambda logprobs, rows: np.zeros(2))
    with pytest.raises(ValueError, match=r"scored has shape \(2,\); expected \(13,\)"):
        of_policy.update(OF, coefficients_of(OF), scored=np.zeros(2))


def test_loading_changes_no_global_setting(folder, caplog) -> None:
    def settings() -> tuple[object, ...]:
        return (
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.get_float32_matmul_precision(),
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.initial_seed(),
            torch.random.get_rng_state().sum().item(),
            torch.is_grad_enabled(),
        )

    before = settings()
    with caplog.at_level(logging.INFO, "gvpo.torch"):
        of_policy = policy(folder, lora_rank=2, seed=9)
        of_policy.update(OF, coefficients_of(OF))
    assert settings() == before
    assert "LlamaForCausalLM: packed rows (every layer of llama is full attention)" in caplog.text


def test_adapters_follow_the_seed(folder) -> None:
    a, b, c = (parameters(policy(folder, lora_rank=2, seed=seed)) for seed in (1, 1, 2))
    assert step_difference(a, b) == 0.0
    assert step_difference(a, c) > 0.1


def test_peak_memory_is_reported(folder) -> None:
    assert moved(folder)[1].peak_memory > 50e6
