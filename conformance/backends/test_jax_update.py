"""What only gvpo_jax's step has: programs, what they hold and cost, and how few they are."""

import numpy as np
import pytest
import tiny_models
from batches import SMOOTH, batch, coefficients_of, step_difference
from jax_policies import policy
from required import require

require(subject="jax")

from gvpo_jax import learner, model, update
from hlo import arrays_with

from gvpo_core.training.policy import base, layout

OF = batch((4, 3, 1, 5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("llama")
    return tiny_models.write_model("llama-tied", made, attention_bias=True)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_few_programs_are_compiled_however_lengths_vary(folder) -> None:
    of_policy = policy(folder, micro_batch_responses=4)
    counts = []
    for seed in range(8):
        of = batch((4, 3, 4), seed=seed)
        counts.append(of_policy.update(of, coefficients_of(of)).details["compiled_programs"])
    assert counts[-1] <= 8
    assert counts[-1] == len(of_policy.programs)


def test_with_checkpointing_no_group_is_scored_first(folder, monkeypatch) -> None:
    """The layers' inputs of several micro-batches are held, of so many tokens; what is beyond them is scored first."""
    rounds, plain = [], learner.Learner.grouped
    monkeypatch.setattr(
        learner.Learner,
        "grouped",
        lambda self, total, micro, *given: rounds.append(len(micro)) or plain(self, total, micro, *given),
    )
    monkeypatch.setattr(base, "HELD_MICRO_BATCHES", 3)
    settings = SMOOTH | {"micro_batch_tokens": 32, "layout": "plain", "gradient_checkpointing": True}
    steps, computed = {}, {}
    for strategy in ("group", "score"):
        of_policy = policy(folder, **settings, strategy=strategy)
        before = {name: np.asarray(value) for name, value in of_policy.learner.trained.items()}
        done = of_policy.update(OF, coefficients_of(OF))
        moved = {name: np.asarray(value) - before[name] for name, value in of_policy.learner.trained.items()}
        steps[strategy], computed[strategy] = moved, done.tokens
    assert max(rounds) == 3, "no group took several micro-batches"
    assert step_difference(steps["score"], steps["group"]) < 1e-5
    assert computed["group"] < 0.7 * computed["score"]
    assert not policy(folder).defers, "activations would be held"


@pytest.mark.slow
def test_shapes_are_restored_so_that_a_run_resumes_bit_for_bit(folder, tmp_path) -> None:
    """A shape that another step chose first pads, and so rounds, in its own way."""
    before, after = batch((4,), seed=1), batch((4, 3, 4), seed=2)
    whole = policy(folder, micro_batch_tokens=256)
    whole.update(after, coefficients_of(after))
    alone = whole._splitting.shapes.copy()
    whole.reset()
    assert whole._splitting.shapes == []
    whole.update(before, coefficients_of(before))
    whole.save(tmp_path)
    resumed = policy(folder, micro_batch_tokens=256)
    resumed.restore(tmp_path)
    for of_policy in (whole, resumed):
        of_policy.update(after, coefficients_of(after))
    assert resumed._splitting.shapes == whole._splitting.shapes != alone
    for name, value in whole.learner.trained.items():
        np.testing.assert_array_equal(resumed.learner.trained[name], value)
