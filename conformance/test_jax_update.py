"""The step: the same however the batch is split, in any order, and what it must refuse."""

import numpy as np
import pytest
import tiny_models
from jax_policies import MODULES, parameters, policy
from torch_policies import batch, coefficients_of, require, step_difference

require(*MODULES, subject="jax")

import jax
from gvpo_jax import model, update
from test_jax_logprobs import arrays_with

from gvpo_core.training import layout

# With these AdamW's step is lr * g / (|g| + 1), smooth in the gradient: no sign of a rounding error decides it.
SMOOTH = {"learning_rate": 0.5, "betas": (0.0, 0.0), "eps": 1.0}
OF = batch((4, 3, 1, 5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("llama")
    return tiny_models.write_model("llama-tied", made, attention_bias=True)


def moved(folder, of=OF, scored=None, rewards=None, **settings):
    """The step's change of every parameter."""
    of_policy = policy(folder, **(SMOOTH | settings))
    before = parameters(of_policy)
    done = of_policy.update(of, coefficients_of(of, rewards=rewards), scored=scored)
    after = parameters(of_policy)
    return {name: after[name] - before[name] for name in after}, done


SPLITS = {
    "one": {"micro_batch_responses": 1},
    "three": {"micro_batch_responses": 3},
    "tokens-30": {"micro_batch_tokens": 30},
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
    kind, (step, done) = whole_step
    found, other = moved(folder, **(kind | SPLITS[split]))
    assert max(float(np.abs(d).max()) for d in step.values()) > 1e-3
    assert step_difference(step, found) < 1e-5
    np.testing.assert_allclose(other.logprobs, done.logprobs, rtol=0, atol=1e-4)
    assert other.gradient_norm == pytest.approx(done.gradient_norm, rel=1e-5)


def test_nor_on_the_order_of_rows_or_on_scores_that_are_known(folder, whole_step) -> None:
    kind, (step, done) = whole_step
    order = np.random.default_rng(3).permutation(len(OF))
    rewards = np.random.default_rng(5).normal(size=len(OF))[order]
    found, other = moved(folder, OF.take(order.tolist()), rewards=rewards, **kind)
    assert step_difference(step, found) < 1e-5
    np.testing.assert_allclose(other.logprobs, done.logprobs[order], rtol=0, atol=1e-4)
    found, other = moved(folder, scored=done.logprobs, **kind)
    assert step_difference(step, found) < 1e-5
    assert other.tokens == done.tokens  # no scoring pass


def test_weights_are_constants(folder, whole_step) -> None:
    # The gradient for coefficients that depend on the log-probs is the one for the same numbers given as constants.
    kind, (step, done) = whole_step
    constant = coefficients_of(OF)(done.logprobs, np.arange(len(OF)))
    of_policy = policy(folder, **(SMOOTH | kind))
    before = parameters(of_policy)
    of_policy.update(OF, lambda logprobs, rows: constant[rows])
    after = parameters(of_policy)
    assert step_difference(step, {name: after[name] - before[name] for name in after}) < 1e-5


def test_logprobs_are_those_before_the_step_and_the_step_raises_what_it_should(folder) -> None:
    of_policy = policy(folder)
    signs = np.where(np.arange(len(OF)) % 2, 1.0, -1.0)
    before = of_policy.logprobs(OF)
    done = of_policy.update(OF, lambda logprobs, rows: signs[rows])
    np.testing.assert_allclose(done.logprobs, before, rtol=0, atol=1e-4)
    for _ in range(4):
        of_policy.update(OF, lambda logprobs, rows: signs[rows])
    assert ((of_policy.logprobs(OF) - before) * signs).mean() > 0.1


def test_reference_is_the_initial_model(folder) -> None:
    for settings in ({}, {"lora_rank": 3}):
        of_policy = policy(folder, reference=True, **(SMOOTH | settings))
        first = of_policy.logprobs(OF, reference=True)
        np.testing.assert_allclose(first, of_policy.logprobs(OF), rtol=0, atol=1e-5)
        of_policy.update(OF, coefficients_of(OF))
        np.testing.assert_array_equal(of_policy.logprobs(OF, reference=True), first)
        assert np.abs(of_policy.logprobs(OF) - first).max() > 1e-4
    with pytest.raises(RuntimeError, match=r"load\(..., reference=True\)"):
        policy(folder).logprobs(OF, reference=True)


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 3}], ids=["full", "lora"])
def test_bfloat16_runs_and_is_close(folder, settings) -> None:
    step, done = moved(folder, **settings)
    found, other = moved(folder, dtype="bfloat16", **settings)
    assert np.abs(other.logprobs - done.logprobs).mean() < 0.05 * np.abs(done.logprobs).mean()
    assert step_difference(step, found) < 0.2
    assert other.gradient_norm == pytest.approx(done.gradient_norm, rel=0.1)


def test_bfloat16_keeps_float32_parameters_and_a_reference_equal_to_the_policy(folder) -> None:
    of_policy = policy(folder, dtype="bfloat16", learning_rate=1e-6, reference=True)
    np.testing.assert_allclose(of_policy.logprobs(OF, reference=True), of_policy.logprobs(OF), rtol=0, atol=1e-5)
    before = parameters(of_policy)
    assert {a.dtype for a in of_policy.learner.trained.values()} == {np.dtype(np.float32)}
    of_policy.update(OF, coefficients_of(OF))
    after = parameters(of_policy)
    changed = [np.mean(after[name] != before[name]) for name in after if "proj.weight" in name]
    assert min(changed) > 0.5  # a bfloat16 parameter of 0.3 cannot move by 1e-6


def test_weight_decay_is_of_matrices_only(folder) -> None:
    of_policy = policy(folder, learning_rate=0.1, weight_decay=0.5)
    before = parameters(of_policy)
    of_policy.update(OF, lambda logprobs, rows: np.zeros(len(rows)))
    for name, value in parameters(of_policy).items():
        factor = 0.95 if value.ndim - ("*" in name) >= 2 else 1.0
        np.testing.assert_allclose(value, factor * before[name], rtol=1e-6)


def test_clipping(folder) -> None:
    settings = {"learning_rate": 1.0, "betas": (0.0, 0.0), "eps": 1e8}  # step = 1e-8 g
    free = policy(folder, **settings)
    norm = free.update(OF, coefficients_of(OF)).gradient_norm
    assert norm > 1.0
    clipped = policy(folder, max_gradient_norm=norm / 4, **settings)
    assert clipped.update(OF, coefficients_of(OF)).gradient_norm == pytest.approx(norm)  # before clipping
    free, clipped = (
        sum(float((np.asarray(m, np.float64) ** 2).sum()) for m in p.learner.arrays()["exp_avg"].values()) ** 0.5
        for p in (free, clipped)
    )
    assert clipped == pytest.approx(free / 4, rel=1e-4)
    assert free == pytest.approx(norm, rel=1e-5)


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
    name, whole = "model.layers.*.mlp.up_proj.weight", of_policy.learner.step
    spoil = lambda total: whole(total | {name: total[name].at[1, 0, 0].set(np.nan)})
    monkeypatch.setattr(of_policy.learner, "step", spoil)
    named = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(FloatingPointError, match=f"gradients of 1 of 28 .* the first {named}; no step was taken"):
        of_policy.update(OF, coefficients_of(OF))
    assert step_difference(before, parameters(of_policy)) == 0.0
    assert int(of_policy.learner.arrays()["count"]) == 0


def test_logprobs_that_are_not_finite(folder) -> None:
    of_policy = policy(folder)
    norm = of_policy.learner.parameters["model.norm.weight"]
    of_policy.learner.parameters |= {"model.norm.weight": norm * np.float32(np.inf)}
    with pytest.raises(FloatingPointError, match=r"log-probabilities of .* responses are not finite"):
        of_policy.update(OF, coefficients_of(OF))


def test_results_of_the_wrong_shape_are_named(folder) -> None:
    of_policy = policy(folder)
    with pytest.raises(ValueError, match=r"coefficients returned shape \(2,\); expected \(13,\)"):
        of_policy.update(OF, lambda logprobs, rows: np.zeros(2))
    with pytest.raises(ValueError, match=r"scored has shape \(2,\); expected \(13,\)"):
        of_policy.update(OF, coefficients_of(OF), scored=np.zeros(2))


def test_no_program_of_a_step_holds_logits_of_a_batch(tmp_path, monkeypatch) -> None:
    """The update's own programs: nothing has more rows of the vocabulary's size than the head or one chunk."""
    vocabulary, chunk = 1031, 32  # a prime, so that only the vocabulary has this size
    monkeypatch.setitem(model.CHUNK_BYTES, "cpu", 4 * vocabulary * chunk)
    of_policy = policy(tiny_models.write_model("llama", tmp_path, vocab_size=vocabulary), micro_batch_responses=3)
    of_policy.update(OF, coefficients_of(OF))
    texts: dict[str, list[str]] = {}
    for key, program in of_policy.programs.used.items():
        texts.setdefault(key[0].__name__, []).append(program.as_text())
    assert {"forward", "backward", "accumulate", "score_rows"} <= set(texts)
    seen = 0
    for name, text in texts.items():
        for shape in arrays_with(vocabulary, "".join(text)):
            tokens = np.prod(shape) // vocabulary
            seen = max(seen, tokens)
            assert tokens <= max(of_policy.setup.spec.hidden, chunk), (name, shape)
    assert seen == chunk


def test_packed_rows_cost_less(folder) -> None:
    """FLOPs of the compiled forward and backward pass, as XLA counts them, for 4 prompts of 90 tokens x 8 responses."""
    draw = np.random.default_rng(0)
    prompts = [tuple(draw.integers(0, 96, 90).tolist()) for _ in range(4)]
    responses = [tuple(draw.integers(0, 96, 12).tolist()) for _ in range(32)]
    of = layout.Batch([prompts[i // 8] for i in range(32)], responses, [i // 8 for i in range(32)])
    flops = {}
    for kind in ("packed", "plain"):
        of_policy = policy(folder, layout=kind)
        of_policy.update(of, coefficients_of(of))
        programs = {k: p for k, p in of_policy.programs.used.items() if k[0] in (update.forward, update.backward)}
        shapes = {k[0].__name__: p.cost_analysis()["flops"] for k, p in programs.items()}
        flops[kind] = shapes["forward"] + shapes["backward"]
    print(f"FLOPs of a step: packed {flops['packed']:.3g}, plain {flops['plain']:.3g}")
    assert flops["packed"] < 0.5 * flops["plain"]


def test_few_programs_are_compiled_however_lengths_vary(folder) -> None:
    of_policy = policy(folder, micro_batch_responses=4)
    counts = []
    for seed in range(8):
        of = batch((4, 3, 4), seed=seed)
        counts.append(of_policy.update(of, coefficients_of(of)).details["compiled_programs"])
    assert counts[-1] <= 10
    assert counts[-1] == len(of_policy.programs)


def test_adapters_follow_the_seed(folder) -> None:
    a, b, c = (parameters(policy(folder, lora_rank=3, seed=seed)) for seed in (1, 1, 2))
    assert step_difference(a, b) == 0.0
    assert step_difference(a, c) > 0.1


def test_loading_and_stepping_change_no_global_setting(folder) -> None:
    before = dict(jax.config.values)
    of_policy = policy(folder, lora_rank=3)
    of_policy.update(OF, coefficients_of(OF))
    assert dict(jax.config.values) == before
