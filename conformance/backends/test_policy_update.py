"""The step of every backend: the same however the batch is split, in any order, and what it must refuse."""

import logging

import batches
import numpy as np
import pytest
import tiny_models
import trainer_backends
from batches import SMOOTH, batch, coefficients_of, step_difference
from places import DEVICE

PRESENT = trainer_backends.present()
if not PRESENT:
    pytest.skip("no backend of a language model is among the subjects", allow_module_level=True)

OF = batch((4, 3, 1, 5))
ROWS = np.arange(len(OF))
KINDS = {
    "full": {},
    "lora": {"lora_rank": 3, "learning_rate": 3.0},
    "dora": {"lora_rank": 3, "learning_rate": 3.0, "lora_kind": "dora"},
}
PAIRS = [(b, kind) for b in PRESENT for kind in KINDS if kind in ("full", *b.lora_kinds)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.write_model("llama-tied", tmp_path_factory.mktemp("llama"), attention_bias=True)


@pytest.fixture(scope="module")
def make(backend, folder):
    return lambda **settings: backend.policies.policy(folder, **settings)


@pytest.fixture(scope="module")
def parameters(backend):
    return backend.policies.parameters


@pytest.fixture(scope="module")
def moved(backend, folder):
    return lambda *given, **settings: batches.moved(backend.policies, folder, OF, *given, **settings)


@pytest.fixture(scope="module", params=PAIRS, ids=[f"{b.name}-{kind}" for b, kind in PAIRS])
def whole_step(request, folder):
    """How to take one step, of every kind of training, and what it is where nothing splits the batch."""
    backend, kind = request.param

    def take(*given, of=OF, **settings):
        return batches.moved(backend.policies, folder, of, *given, **(KINDS[kind] | settings))

    return take, *take()


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
    "plain": {"layout": "plain"},
    "plain-three": {"layout": "plain", "micro_batch_responses": 3},
    "checkpointing": {"gradient_checkpointing": True},
    "checkpointing-score": {"gradient_checkpointing": True, "strategy": "score", "micro_batch_tokens": 60},
}


@pytest.mark.slow_on("jax-lora", "jax-one", "jax-three")
@pytest.mark.parametrize("split", SPLITS)
def test_the_step_does_not_depend_on_the_split(split: str, whole_step) -> None:
    take, step, update = whole_step
    found, other = take(**SPLITS[split])
    assert max(float(np.abs(d).max()) for d in step.values()) > 1e-3
    assert step_difference(step, found) < 1e-5
    np.testing.assert_allclose(other.logprobs, update.logprobs, rtol=0, atol=1e-4)
    assert other.gradient_norm == pytest.approx(update.gradient_norm, rel=1e-5)


@pytest.mark.slow_on("jax-lora")
def test_nor_on_the_order_of_rows(whole_step) -> None:
    take, step, update = whole_step
    order = np.random.default_rng(3).permutation(len(OF))
    of, rewards = OF.take(order.tolist()), np.random.default_rng(5).normal(size=len(OF))[order]
    found, other = take(coefficients_of(of, rewards=rewards), of=of)
    assert step_difference(step, found) < 1e-5
    np.testing.assert_allclose(other.logprobs, update.logprobs[order], rtol=0, atol=1e-4)


@pytest.mark.slow_on("jax-lora")
def test_nor_on_scores_that_are_known(whole_step) -> None:
    take, step, update = whole_step
    found, other = take(scored=update.logprobs)
    assert step_difference(step, found) < 1e-5
    assert other.tokens == update.tokens  # no scoring pass


@pytest.mark.slow_on("jax-lora")
def test_weights_are_constants(whole_step) -> None:
    # The gradient for coefficients that depend on the log-probs is the one for the same numbers given as constants.
    take, step, update = whole_step
    constant = coefficients_of(OF)(update.logprobs, ROWS)
    assert step_difference(step, take(lambda logprobs, rows: constant[rows])[0]) < 1e-5


def test_strategy_group_scores_nothing_that_fits(moved) -> None:
    assert moved(strategy="score")[1].tokens == 2 * moved()[1].tokens


def test_packed_rows_save_the_prompt(moved) -> None:
    tokens = {name: moved(layout=name)[1].tokens for name in ("packed", "plain")}
    assert tokens["packed"] < 0.8 * tokens["plain"]


def test_adamw_itself_to_rounding(make, parameters) -> None:
    found = []
    for split in ("all", "three", "tokens-30"):
        of_policy = make(learning_rate=1e-5, **SPLITS[split])
        of_policy.update(OF, coefficients_of(OF))
        found.append(parameters(of_policy))
    for other in found[1:]:
        assert step_difference(found[0], other) < 1e-5


def test_update_returns_old_logprobs_and_raises_positive_responses(make) -> None:
    of_policy = make()
    signs = np.where(ROWS % 2, 1.0, -1.0)
    before = of_policy.logprobs(OF)
    update = of_policy.update(OF, lambda logprobs, rows: signs[rows])
    np.testing.assert_allclose(update.logprobs, before, rtol=0, atol=1e-4)
    assert np.abs(of_policy.logprobs(OF) - before).max() > 1e-2
    for _ in range(4):
        of_policy.update(OF, lambda logprobs, rows: signs[rows])
    assert ((of_policy.logprobs(OF) - before) * signs).mean() > 0.1


@pytest.mark.parametrize(("backend", "kind"), PAIRS, indirect=["backend"], ids=[f"{b.name}-{k}" for b, k in PAIRS])
def test_reference_is_the_initial_model(kind: str, make) -> None:
    of_policy = make(reference=True, **(SMOOTH | KINDS[kind]))
    first = of_policy.logprobs(OF, reference=True)
    near = 1e-4 if kind == "dora" else 1e-5  # a magnitude over a norm that are equal but for rounding
    np.testing.assert_allclose(first, of_policy.logprobs(OF), rtol=0, atol=near)
    of_policy.update(OF, coefficients_of(OF))
    np.testing.assert_array_equal(of_policy.logprobs(OF, reference=True), first)
    assert np.abs(of_policy.logprobs(OF) - first).max() > 1e-3


def test_a_reference_not_asked_for_is_an_error(make) -> None:
    with pytest.raises(RuntimeError, match=r"load\(..., reference=True\)"):
        make().logprobs(OF, reference=True)


@pytest.mark.slow_on("jax")
@pytest.mark.parametrize("settings", [{}, {"lora_rank": 3}], ids=["full", "lora"])
def test_bfloat16_runs_and_is_close(moved, settings) -> None:
    step, update = moved(**settings)
    found, other = moved(dtype="bfloat16", **settings)
    assert np.abs(other.logprobs - update.logprobs).mean() < 0.05 * np.abs(update.logprobs).mean()
    assert step_difference(step, found) < 0.2
    assert other.gradient_norm == pytest.approx(update.gradient_norm, rel=0.1)


def test_bfloat16_keeps_float32_parameters_and_a_reference_equal_to_the_policy(backend, make, parameters) -> None:
    of_policy = make(dtype="bfloat16", learning_rate=1e-6, reference=True)
    apart = np.abs(of_policy.logprobs(OF, reference=True) - of_policy.logprobs(OF)).max()
    assert apart < (0.2 if DEVICE == "gpu" else 1e-5)  # XLA's programs for GPUs round casts that it fuses elsewhere
    before = parameters(of_policy)
    assert backend.policies.dtypes(of_policy) == {"float32"}
    of_policy.update(OF, coefficients_of(OF))
    after = parameters(of_policy)
    changed = [np.mean(after[name] != before[name]) for name in after if "proj.weight" in name]
    assert min(changed) > 0.5  # a bfloat16 parameter of 0.3 cannot move by 1e-6


def test_auto_is_the_dtype_of_the_device(make, monkeypatch) -> None:
    """float32 on CPUs; the settings that a run compares stay as they were given."""
    assert make().describe().dtype == "float32"
    ranks = type(make()._ranks)
    plain = ranks.__init__

    def on_an_accelerator(self, *given) -> None:
        plain(self, *given)
        assert self.auto_dtype == ("float32" if DEVICE == "cpu" else "bfloat16")
        self.auto_dtype = "bfloat16"

    monkeypatch.setattr(ranks, "__init__", on_an_accelerator)
    of_policy = make(dtype="auto")
    assert of_policy.describe().dtype == "bfloat16" and of_policy.settings.model.dtype == "auto"
    np.testing.assert_array_equal(of_policy.logprobs(OF), make(dtype="bfloat16").logprobs(OF))
    assert np.abs(of_policy.logprobs(OF) - make(dtype="float32").logprobs(OF)).max() > 1e-4


def test_weight_decay_is_of_matrices_only(make, parameters) -> None:
    of_policy = make(learning_rate=0.1, weight_decay=0.5)
    before = parameters(of_policy)
    of_policy.update(OF, lambda logprobs, rows: np.zeros(len(rows)))
    for name, value in parameters(of_policy).items():
        factor = 0.95 if value.ndim >= 2 else 1.0
        np.testing.assert_allclose(value, factor * before[name], rtol=1e-6)


def test_clipping(backend, make) -> None:
    settings = {"learning_rate": 1.0, "betas": (0.0, 0.0), "eps": 1e8}  # step = 1e-8 g; the first moment is g
    free = make(**settings)
    norm = free.update(OF, coefficients_of(OF)).gradient_norm
    assert norm > 1.0
    clipped = make(max_gradient_norm=norm / 4, **settings)
    assert clipped.update(OF, coefficients_of(OF)).gradient_norm == pytest.approx(norm)  # before clipping
    of_free, of_clipped = (
        sum(float((m**2).sum()) for m in backend.policies.first_moments(p).values()) ** 0.5 for p in (free, clipped)
    )
    assert of_free == pytest.approx(norm, rel=1e-5)
    assert of_clipped == pytest.approx(of_free / 4, rel=1e-4)


def test_the_learning_rate_follows_the_schedule(make, parameters) -> None:
    of_policy = make(updates=4, learning_rate=0.008, warmup=2, schedule="linear")
    rates = [of_policy.update(OF, coefficients_of(OF)).learning_rate for _ in range(4)]
    assert rates == pytest.approx([0.004, 0.008, 0.008, 0.004])
    before = parameters(of_policy)
    assert of_policy.update(OF, coefficients_of(OF)).learning_rate == 0.0  # the run is over
    assert step_difference(before, parameters(of_policy)) == 0.0


def as_it_was(of_policy, before, make, parameters) -> None:
    """Nothing of a refused step is left: the next one is that of a fresh policy, to the bit."""
    assert step_difference(before, parameters(of_policy)) == 0.0
    fresh = make()
    for p in (of_policy, fresh):
        p.update(OF, coefficients_of(OF))
    assert step_difference(parameters(fresh), parameters(of_policy)) == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_coefficients_that_are_not_finite_leave_everything_as_it_was(bad: float, make, parameters) -> None:
    of_policy = make()
    before = parameters(of_policy)
    with pytest.raises(FloatingPointError, match=r"coefficients of 1 of .* responses are not finite.*no step"):
        of_policy.update(OF, lambda logprobs, rows: np.where(np.arange(len(rows)) == 1, bad, 0.0))
    as_it_was(of_policy, before, make, parameters)


def test_gradients_that_are_not_finite_name_their_parameter(backend, make, parameters) -> None:
    of_policy = make()
    before = parameters(of_policy)
    name = "model.layers.1.mlp.up_proj.weight"
    named = f"gradients of 1 of {len(before)} parameters are not finite, the first {name}; no step was taken"
    with backend.policies.spoiled_gradient(of_policy, name), pytest.raises(FloatingPointError, match=named):
        of_policy.update(OF, coefficients_of(OF))
    assert not any(m.any() for m in backend.policies.first_moments(of_policy).values())
    as_it_was(of_policy, before, make, parameters)


def test_logprobs_that_are_not_finite(backend, make) -> None:
    of_policy = make()
    backend.policies.fill(of_policy, "model.norm.weight", np.inf)
    with pytest.raises(FloatingPointError, match=r"log-probabilities of .* responses are not finite"):
        of_policy.update(OF, coefficients_of(OF))


def test_results_of_the_wrong_shape_are_named(make) -> None:
    of_policy = make()
    with pytest.raises(ValueError, match=r"coefficients returned shape \(2,\); expected \(13,\)"):
        of_policy.update(OF, lambda logprobs, rows: np.zeros(2))
    with pytest.raises(ValueError, match=r"scored has shape \(2,\); expected \(13,\)"):
        of_policy.update(OF, coefficients_of(OF), scored=np.zeros(2))


def test_loading_and_stepping_change_no_global_setting(backend, make, caplog) -> None:
    before = backend.policies.global_settings()
    with caplog.at_level(logging.INFO, f"gvpo.{backend.name}"):
        of_policy = make(lora_rank=3, seed=9)
        of_policy.update(OF, coefficients_of(OF))
    assert backend.policies.global_settings() == before
    facts = of_policy.describe()
    assert f"{facts.architecture}: packed rows (every layer of llama is full attention)" in caplog.text


def test_adapters_follow_the_seed(make, parameters) -> None:
    a, b, c = (parameters(make(lora_rank=3, seed=seed)) for seed in (1, 1, 2))
    assert step_difference(a, b) == 0.0
    assert step_difference(a, c) > 0.1


def test_peak_memory_is_reported(moved) -> None:
    step, update = moved()
    assert update.peak_memory > 3 * 4 * sum(d.size for d in step.values())  # parameters and both moments


def test_one_rank_gathers_its_own(make) -> None:
    of_policy = make()
    assert (of_policy.rank, of_policy.world_size) == (0, 1)
    values = np.arange(6.0).reshape(3, 2) + 1e-12
    np.testing.assert_array_equal(of_policy.gather(values), values)
