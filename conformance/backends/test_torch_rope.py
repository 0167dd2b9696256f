"""RoPE that depends on the length of a row: a row's numbers are those that it has alone in a fresh model."""

import numpy as np
import pytest
import tiny_models
import torch_policies
from batches import coefficients_of, moved, step_difference
from required import require
from torch_policies import policy, reference_gradients

require(subject="torch")

import torch
from gvpo_torch import rope

from gvpo_core.training.config import ConfigError
from gvpo_core.training.policy import Batch, layout
from gvpo_core.training.policy.layout import RopeByLength, Row, rope_by_length
from gvpo_core.training.sampling import Sampling, row_seed

KINDS = ["dynamic", "longrope"]
ORIGINAL = 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: tiny_models.make_model(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def lengths(*totals: int) -> Batch:
    """Rows of one group of two for each length of prompt and response together, the first response a token shorter."""
    draw = np.random.default_rng(4)
    prompts, responses, groups = [], [], []
    for label, total in enumerate(totals):
        prompt = tuple(draw.integers(1, 96, 7).tolist())
        for size in (total - 8, total - 7):
            prompts.append(prompt)
            responses.append(tuple(draw.integers(1, 96, size).tolist()))
            groups.append(label)
    return Batch(prompts, responses, groups)


MIXED = lengths(10, 16, 17, 18, 30, 41)  # 15 to 18: about the original length


def alone(folder, of: Batch) -> np.ndarray:
    """By transformers alone, float32, each row in a fresh model."""
    from transformers import AutoModelForCausalLM

    found = []
    for prompt, response in zip(of.prompts, of.responses, strict=True):
        lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            logits = lm(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        found.append(float(logits.gather(1, torch.tensor(response)[:, None]).sum()))
    return np.asarray(found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_scores_beside_others_as_alone_in_a_fresh_model(kind: str, folders) -> None:
    of_policy = policy(folders[kind], reference=True)
    assert of_policy.scorer.rope == RopeByLength(kind, ORIGINAL)
    expected = alone(folders[kind], MIXED)
    np.testing.assert_allclose(of_policy.logprobs(MIXED), expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(of_policy.logprobs(MIXED, reference=True), expected, rtol=0, atol=1e-4)
    each = [of_policy.logprobs(MIXED.take([i]))[0] for i in reversed(range(len(MIXED)))]  # whatever came before
    np.testing.assert_allclose(each[::-1], expected, rtol=0, atol=1e-4)
    update = of_policy.update(MIXED, coefficients_of(MIXED))
    np.testing.assert_allclose(update.logprobs, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_that_of_rows_alone(kind: str, folders) -> None:
    factors = np.random.default_rng(3).normal(size=len(MIXED))
    exact = reference_gradients(folders[kind], MIXED, factors, afresh=True)
    settings = {"learning_rate": 1.0, "betas": (0.0, 0.0), "eps": 1e6}  # the step is the gradient, times 1e-6
    steps, update = moved(torch_policies, folders[kind], MIXED, lambda logprobs, rows: factors[rows], **settings)
    norm = np.sqrt(sum(float((g**2).sum()) for g in exact.values()))
    assert update.gradient_norm == pytest.approx(norm, rel=1e-4)
    assert all(np.isfinite(step).all() for step in steps.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", ["group", "score"])
def test_splitting_does_not_change_the_step(kind: str, strategy: str, folders) -> None:
    whole, _ = moved(torch_policies, folders[kind], MIXED, strategy=strategy)
    split, _ = moved(torch_policies, folders[kind], MIXED, strategy=strategy, micro_batch_tokens=60)
    assert step_difference(whole, split) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_response_is_drawn_as_without_a_cache_and_alone(kind: str, folders) -> None:
    from transformers import AutoModelForCausalLM

    prompts = [tuple(range(5, 9)), tuple(range(20, 32)), tuple(range(40, 62))]
    seeds = [[row_seed(2, i, j) for j in range(2)] for i in range(3)]
    sampling = Sampling(max_tokens=12, temperature=0.0)
    of_policy = policy(folders[kind])
    together = of_policy.generate(prompts, seeds, sampling)
    assert max(len(p) + len(r.tokens) for p, row in zip(prompts, together, strict=True) for r in row) > ORIGINAL + 2
    for prompt, row in zip(prompts, together, strict=True):
        for response in row:
            for t in range(0, len(response.tokens), 3):
                token = response.tokens[t]
                lm = AutoModelForCausalLM.from_pretrained(folders[kind], dtype=torch.float32).eval()
                with torch.no_grad():
                    logits = lm(input_ids=torch.tensor([prompt + response.tokens[:t]])).logits[0, -1]
                assert logits.max() - logits[token] < 1e-4
    drawn = of_policy.generate(prompts, seeds, Sampling(max_tokens=12))
    for prompt, row, own in zip(prompts, seeds, drawn, strict=True):
        for seed, response in zip(row, own, strict=True):
            assert of_policy.generate([prompt], [[seed]], Sampling(max_tokens=12)) == [[response]]


def test_rows_with_different_frequencies_share_no_micro_batch() -> None:
    rows = [Row((1,) * 4, (i,), n) for i, n in enumerate((40, 40, 30, 17, 16, 15, 9))]
    at_once = {kind: layout.micro_batches(rows, tokens=10**6, rope=RopeByLength(kind, ORIGINAL)) for kind in KINDS}
    lengths_of = lambda parts: [[row.length for row in part] for part in parts]
    assert lengths_of(at_once["dynamic"]) == [[40, 40], [30], [17], [16], [15, 9]]
    assert lengths_of(at_once["longrope"]) == [[40, 40, 30, 17, 16], [15, 9]]
    assert lengths_of(layout.micro_batches(rows, tokens=10**6)) == [[40, 40, 30, 17, 16, 15, 9]]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, None),
        ({"rope_parameters": None}, None),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 9}, ("dynamic", 9)),
        ({"rope_scaling": {"rope_type": "longrope"}, "original_max_position_embeddings": 7}, ("longrope", 7)),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "dynamic"}, "sliding_attention": {}}}
            | {"max_position_embeddings": 9},
            ("dynamic", 9),
        ),
        (
            {
                "rope_parameters": {
                    "a": {"rope_type": "longrope", "original_max_position_embeddings": 4},
                    "b": {"rope_type": "longrope", "original_max_position_embeddings": 8},
                }
            },
            ("dynamic", 4),
        ),
    ],
)
def test_rope_by_length_is_read_from_every_form_of_the_configuration(config, expected) -> None:
    assert rope_by_length(config) == (None if expected is None else RopeByLength(*expected))


def test_dynamic_rope_that_cannot_be_put_back_is_refused(folders) -> None:
    of_policy = policy(folders["dynamic"])
    with pytest.raises(ConfigError, match="Linear has dynamic RoPE of its own, which keeps the frequencies"):
        rope.by_length(torch.nn.Linear(2, 2), of_policy.scorer.config)
