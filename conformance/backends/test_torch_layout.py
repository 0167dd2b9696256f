"""Rows and micro-batches: what is planned, and that packed rows are exact where they are used and only there."""

import numpy as np
import pytest
import tiny_models
from batches import batch, coefficients_of
from hypothesis import given, settings
from hypothesis import strategies as st
from required import require
from torch_policies import policy
from trees import alike, inputs_of

require(subject="torch")

import torch
from gvpo_torch import model

from gvpo_core.training.config import ConfigError
from gvpo_core.training.policy import Batch, layout


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(name: str):
        if name not in made:
            made[name] = tiny_models.make_model(name, tmp_path_factory.mktemp(name))
        return made[name]

    return folder


groups = st.lists(st.integers(1, 9), min_size=1, max_size=6).map(tuple)


@settings(deadline=None, max_examples=60)
@given(groups, st.integers(1, 200), st.integers(0, 9), st.booleans(), st.sampled_from([0, 1, 64]))
def test_every_response_has_one_place_and_budgets_hold(sizes, tokens, responses, packed, hidden) -> None:
    of = batch(sizes)
    rows = layout.plan_rows(of, packed=packed, tokens=tokens, responses=responses, hidden_size=hidden)
    assert sorted(i for row in rows for i in row.responses) == list(range(len(of)))
    for row in rows:
        assert row.length == len(row.prompt) + inputs_of(of, row.responses)
        assert {(of.prompts[i]) for i in row.responses} == {row.prompt}
        assert len({of.groups[i] for i in row.responses}) == 1
        assert row.length <= tokens or len(row.responses) == 1
        assert len(row.responses) <= ((responses or 99) if packed else 1)
    micro = layout.micro_batches(rows, tokens=tokens, responses=responses)
    assert sorted(map(str, rows)) == sorted(str(row) for part in micro for row in part)
    for part in micro:
        assert len(part) * max(row.length for row in part) <= tokens or len(part) == 1
        assert not responses or sum(len(row.responses) for row in part) <= responses


@settings(deadline=None, max_examples=60)
@given(groups, st.integers(1, 300), st.integers(0, 12), st.booleans())
def test_whole_groups_stay_whole(sizes, tokens, responses, packed) -> None:
    of = batch(sizes)
    micro, rest = layout.whole_groups(of, packed=packed, tokens=tokens, responses=responses)
    placed = [{of.groups[i] for row in part for i in row.responses} for part in micro]
    left = {of.groups[i] for i in rest}
    assert sorted(label for part in placed for label in part) == sorted(set(of.groups) - left)
    assert sorted([*rest, *(i for part in micro for row in part for i in row.responses)]) == list(range(len(of)))
    for part in micro:
        assert len(part) * max(row.length for row in part) <= tokens
        assert not responses or sum(len(row.responses) for row in part) <= responses


def test_arrays_by_hand() -> None:
    of = Batch([(5, 6), (5, 6), (9,)], [(1, 2, 0), (3,), (4, 4)], [0, 0, 1])
    arrays = layout.arrays(of, layout.plan_rows(of, packed=True, tokens=100))
    assert arrays.ids.tolist() == [[5, 6, 1, 2], [9, 4, 0, 0]]
    assert arrays.positions.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert arrays.segments.tolist() == [[0, 0, 1, 1], [0, 1, -1, -1]]
    assert arrays.last.tolist() == [[1, 1, 1, 1], [1, 1, -1, -1]]
    assert arrays.predict.tolist() == [1, 2, 3, 1, 4, 5]  # token 1 predicts the first token of both responses
    assert arrays.targets.tolist() == [1, 2, 0, 3, 4, 4]
    assert arrays.responses.tolist() == [0, 1, 2]
    assert arrays.sums(np.arange(6.0)).tolist() == [3.0, 3.0, 9.0]


def test_prompts_and_labels_both_separate_rows() -> None:
    same = Batch([(5, 6)] * 4, [(1, 2)] * 4, [0, 0, 1, 1])
    assert len(layout.plan_rows(same, packed=True, tokens=100)) == 2
    mixed = Batch([(5, 6), (5, 7)], [(1, 2)] * 2, [0, 0])
    assert len(layout.plan_rows(mixed, packed=True, tokens=100)) == 2


def test_long_responses_are_not_all_put_in_one_row() -> None:
    # 8 responses of 1,000 tokens after 200: attention over 8,200 tokens costs more than the prompt again.
    of = Batch([(1,) * 200] * 8, [(i, *(2,) * 999) for i in range(8)], [0] * 8)
    short = Batch([(1,) * 200] * 8, [(i, *(2,) * 9) for i in range(8)], [0] * 8)
    assert len(layout.plan_rows(of, packed=True, tokens=10**6, hidden_size=4096)) > 1
    assert len(layout.plan_rows(short, packed=True, tokens=10**6, hidden_size=4096)) == 1


def by_layout(of_policy, of: Batch, packed: bool) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Token log-probs of each response, and gradients of a weighted sum of them."""
    scorer = of_policy.scorer
    scorer.zero_grad(set_to_none=True)
    arrays = layout.arrays(of, layout.plan_rows(of, packed=packed, tokens=10**6))
    values = model.score(scorer, arrays, torch.device("cpu"))
    weights = np.random.default_rng(2).normal(size=len(of))[arrays.responses]
    values.backward(torch.from_numpy(arrays.spread(weights)).float())
    gradients = {name: p.grad.numpy().copy() for name, p in scorer.named_parameters()}
    return arrays.split(values.detach().numpy()), gradients


@pytest.mark.parametrize("of", [batch((5, 3, 1), longest=20), alike((9, 3, 1), longest=20)], ids=["unlike", "alike"])
@pytest.mark.parametrize("name", tiny_models.FULL_ATTENTION)
def test_packed_rows_are_exact(name: str, of: Batch, folders) -> None:
    of_policy = policy(folders(name))
    assert of_policy.packed, of_policy.layout_reason
    packed, packed_gradients = by_layout(of_policy, of, True)
    plain, gradients = by_layout(of_policy, of, False)
    np.testing.assert_allclose(np.concatenate(packed), np.concatenate(plain), rtol=0, atol=1e-4)
    for parameter, gradient in gradients.items():
        scale = max(1.0, float(np.abs(gradient).max()))
        np.testing.assert_allclose(packed_gradients[parameter], gradient, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("name", tiny_models.OTHERS)
def test_other_models_take_plain_rows_and_say_why(name: str, folders) -> None:
    of_policy = policy(folders(name))
    assert not of_policy.packed
    assert of_policy.describe().layout_reason
    with pytest.raises(ConfigError, match=r"model.layout is packed, which is not exact for \w+: .+ Use auto or plain"):
        policy(folders(name), layout="packed")


@pytest.mark.parametrize("name", ["mistral-window", "qwen2-window", "gemma3_text", "gpt_oss", "qwen3_next"])
def test_packing_those_would_have_been_wrong(name: str, folders) -> None:
    of_policy = policy(folders(name))
    of = batch((5, 3, 1), longest=20)
    packed, plain = (np.concatenate(by_layout(of_policy, of, kind)[0]) for kind in (True, False))
    assert np.abs(packed - plain).max() > 0.05


@pytest.mark.parametrize("name", [*tiny_models.FULL_ATTENTION, *tiny_models.OTHERS])
def test_logprobs_are_the_models_own(name: str, folders) -> None:
    of_policy = policy(folders(name))
    of = batch((4, 2, 1), longest=20)
    own = []
    with torch.no_grad():
        for prompt, response in zip(of.prompts, of.responses, strict=True):
            ids = torch.tensor([prompt + response])
            logits = of_policy.scorer.base(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            logits = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            own.append(float(logits.gather(1, torch.tensor(response)[:, None]).sum()))
    np.testing.assert_allclose(of_policy.logprobs(of), own, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["packed", "plain"])
def test_no_response_sees_another_nor_padding(kind: str, folders) -> None:
    of_policy = policy(folders("llama"), layout=kind)
    of = batch((4, 4), longest=12)
    before = of_policy.logprobs(of)
    for changed in range(len(of)):
        responses = list(of.responses)
        responses[changed] = (*(95 - t for t in responses[changed]), 3, 4)
        after = of_policy.logprobs(Batch(of.prompts, responses, of.groups))
        others = np.arange(len(of)) != changed
        np.testing.assert_allclose(after[others], before[others], rtol=0, atol=1e-5)
        assert abs(after[changed] - before[changed]) > 1e-3


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "mamba"}, "packing is not verified for model type mamba"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window = 4096"),
        ({"model_type": "qwen3", "layer_types": ["full_attention", "chunked_attention"]}, "layers of type chunked"),
        ({"model_type": "phi3", "rope_parameters": {"rope_type": "longrope"}}, "rope_type longrope depends on"),
        ({"model_type": "llama", "rope_scaling": {"type": "dynamic"}}, "rope_type dynamic depends on"),
    ],
)
def test_configurations_that_go_plain(config, reason: str) -> None:
    packed, why = layout.packing(config)
    assert not packed
    assert reason in why


def test_packed_updates_equal_plain_ones(folders) -> None:
    of = batch((4, 3, 2))
    found = []
    for kind in ("packed", "plain"):
        of_policy = policy(folders("llama"), layout=kind, learning_rate=1.0, betas=(0.0, 0.0), eps=1e6)
        found.append((of_policy, of_policy.update(of, coefficients_of(of))))
    assert found[0][1].tokens < found[1][1].tokens
    np.testing.assert_allclose(found[0][1].logprobs, found[1][1].logprobs, atol=1e-4)
    assert found[0][1].gradient_norm == pytest.approx(found[1][1].gradient_norm, rel=1e-4)
