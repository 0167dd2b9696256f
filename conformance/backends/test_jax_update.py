"""What only gvpo_jax's step has: programs, what they hold and cost, and how few they are."""

import numpy as np
import pytest
import tiny_models
from batches import batch, coefficients_of
from jax_policies import policy
from required import require

require(subject="jax")

from gvpo_jax import model, update
from hlo import arrays_with

from gvpo_core.training.policy import layout

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


def test_few_programs_are_compiled_however_lengths_vary(folder) -> None:
    of_policy = policy(folder, micro_batch_responses=4)
    counts = []
    for seed in range(8):
        of = batch((4, 3, 4), seed=seed)
        counts.append(of_policy.update(of, coefficients_of(of)).details["compiled_programs"])
    assert counts[-1] <= 8
    assert counts[-1] == len(of_policy.programs)


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
