"""Responses with context tokens through the trainer: recorded data, lengths, what is kept and what is refused."""

import numpy as np
import pytest
import tiny_models
from toy_run import config_of, policy, records, run, write_model

from gvpo_core.training.data import DataError
from gvpo_core.training.policy import Batch, Response
from gvpo_core.training.policy.table import TablePolicy
from gvpo_core.training.samplers import SamplerError

pytestmark = pytest.mark.core

IDS = [[[5, 6, 0, 9, 9, 7, 0], [8, 0], [5, 0, 1, 2]], [[3, 4, 4, 4, 0], [2, 1, 0]]]
MASKS = [[[1, 1, 1, 0, 0, 1, 1], None, [1, 1, 0, 0]], [[1, 0, 0, 1, 1], [1, 1, 1]]]
NO_TURNS = [[[5, 6, 4, 9, 9, 7, 0], [8, 0], [5, 4, 1, 2]], IDS[1]]  # responses that could be drawn at once
OWN = [5, 2, 2, 3, 3]  # tokens of each response
REWARDS = [[1.0, 0.0, 0.5], [0.0, 1.0]]


def rows(**changes) -> list[dict]:
    columns = {"responses": IDS, "response_mask": MASKS, "rewards": REWARDS} | changes
    prompts = [{"prompt": "ab"}, {"prompt": "cd"}]
    return [prompt | {name: of[i] for name, of in columns.items()} for i, prompt in enumerate(prompts)]


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model")


def log_pi(weights, prompt, response, mask) -> float:
    logs = weights - np.log(np.exp(weights).sum(1, keepdims=True))
    pairs = zip((prompt[-1], *response[:-1]), response, strict=True)
    return sum(logs[a, b] for (a, b), mine in zip(pairs, mask or [1] * len(response), strict=True) if mine)


def test_recorded_masks_reach_the_step_and_every_length_is_of_own_tokens(tmp_path, model) -> None:
    of_policy, batches = policy(model, updates=2), []
    update = of_policy.update
    of_policy.update = lambda batch, *given, **options: batches.append(batch) or update(batch, *given, **options)
    before = of_policy.weights.copy()
    config = config_of(tmp_path / "run", model, objective={"length_exponent": 0.5})
    run(config, rows(), of_policy)
    assert [m and list(map(int, m)) for m in batches[0].masks] == [*MASKS[0], MASKS[1][0], None], "all ones is None"
    first = records(tmp_path / "run")[0]
    right = [
        log_pi(before, prompt, ids, mask)
        for prompt, many, masks in zip(((1, 2), (3, 4)), IDS, MASKS, strict=True)
        for ids, mask in zip(many, masks, strict=True)
    ]
    assert first["length/mean"] == pytest.approx(np.mean(OWN)) and first["length/max"] == 5
    assert first["nll"] == pytest.approx(-sum(right) / sum(OWN), rel=1e-6)
    variance = first["loss/implicit_variance"]
    assert variance == pytest.approx(0, abs=1e-12)  # the policy is its reference at the first step
    # GVPO++'s f = |y|^-alpha takes own tokens: the second step's implicit rewards are weighed with it.
    assert first["loss"] == pytest.approx(np.mean([np.var([1, 0, 0.5], ddof=1), np.var([0, 1], ddof=1)]), rel=1e-6)


def test_length_weights_are_of_own_tokens(tmp_path, model) -> None:
    seen = []

    def objective(logprobs, ref_logprobs, old_logprobs, rewards, group_ids, *, lengths):
        seen.append(lengths.tolist())
        return np.zeros(len(logprobs))

    import gvpo_core.training.objective as objectives

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objectives, "find_function", lambda name: objective)
        run(config_of(tmp_path / "run", model, 1, objective={"name": "mine.py:f"}), rows())
    assert seen[0] == OWN


def test_a_run_fed_from_its_own_completions_takes_the_same_steps(tmp_path, model) -> None:
    first = run(config_of(tmp_path / "a", model), rows())
    written = records(tmp_path / "a", "completions")
    assert [c["tokens"] for c in written[:5]] == OWN
    assert written[0]["response_ids"] == IDS[0][0] and written[0]["response_mask"] == MASKS[0][0]
    assert "response_mask" not in written[1], "every token of it is the policy's own"
    second = run(config_of(tmp_path / "b", model, data={"train": str(tmp_path / "a/completions.jsonl")}), None)
    assert np.abs(first.weights - first.reference).max() > 1e-2
    np.testing.assert_array_equal(second.weights, first.weights)
    with_masks = run(config_of(tmp_path / "c", model), rows(responses=NO_TURNS))
    without = run(config_of(tmp_path / "d", model), rows(responses=NO_TURNS, response_mask=[None, None]))
    assert np.abs(with_masks.weights - without.weights).max() > 1e-3, "the masks matter"


def test_reference_scores_are_kept_by_mask(tmp_path, model) -> None:
    cache = {"reference_cache": str(tmp_path / "cache")}
    for name, masks in {"a": [None, None], "b": MASKS, "c": MASKS}.items():
        run(config_of(tmp_path / name, model, 1, data=cache), rows(responses=NO_TURNS, response_mask=masks))
    scored = [records(tmp_path / name)[0]["machine/reference_scored"] for name in "abc"]
    assert scored == [5, 5, 0], "the group with masks is another one; the same masks are the same group"
    assert [records(tmp_path / name)[0]["loss/implicit_variance"] for name in "bc"] == pytest.approx([0, 0], abs=1e-12)


WRONG = {
    "its mask has 2 entries for 7 tokens; expected equal numbers": [[[1, 1], None, None], [None, None]],
    "none of its 2 tokens is the policy's own; expected at least one": [[MASKS[0][0], [0, 0], None], [None, None]],
    "row 0 has 3 responses and 1 response_mask; expected equal numbers": [[None], [None, None]],
    "column 'response_mask', entry 1 is [1, 2]; expected a 0 or 1 for each token": [[None, [1, 2], None], None],
    "it has the end token 0 before its end": [[[1, 1, 1, 1, 0, 1, 1], None, None], [None, None]],
}


@pytest.mark.parametrize("message", WRONG)
def test_a_mask_that_does_not_fit_is_named(message: str, tmp_path, model) -> None:
    with pytest.raises(DataError) as error:
        run(config_of(tmp_path / "run", model), rows(response_mask=WRONG[message]))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_mask_of_a_text_is_refused(tmp_path, model) -> None:
    with pytest.raises(DataError, match="response 1 cannot be used: it is a text with a mask of tokens"):
        run(
            config_of(tmp_path / "run", model),
            rows(responses=[[[5, 0], "h", [6]], [[5], [6]]], response_mask=[[None, [1, 1], None], None]),
        )


def test_batches_check_their_masks_and_keep_them() -> None:
    of = Batch([(1,)] * 2, [(1, 2), (3,)], [0, 0], [(True, False), None])
    assert of.take([1, 0]).masks == [None, (True, False)] and Batch([(1,)], [(1,)], [0]).take([0]).masks is None
    with pytest.raises(ValueError, match="batch row 1: none of its 1 tokens is the policy's own"):
        Batch([(1,)] * 2, [(1, 2), (3,)], [0, 0], [None, (False,)])
    with pytest.raises(ValueError, match="2 responses and 1 masks"):
        Batch([(1,)] * 2, [(1, 2), (3,)], [0, 0], [None])


class TwoTurns:
    """A sampler whose responses hold tokens of a tool."""

    def __init__(self, mask: tuple[bool, ...]) -> None:
        self.mask = mask

    def generate(self, prompts, seeds, sampling):
        return [[Response((5, 9, 6, 0), True, mask=self.mask) for _ in of_prompt] for of_prompt in seeds]


def test_a_sampler_may_give_masks(tmp_path, model) -> None:
    rewards = {"length": lambda prompts, completions: [float(i) for i in range(len(completions))]}
    prompts = [{"prompt": "ab"}, {"prompt": "cd"}]
    config = config_of(tmp_path / "run", model, 1)
    run(config, prompts, rewards=rewards, sampler=TwoTurns((True, False, True, True)))
    assert records(tmp_path / "run")[0]["length/mean"] == 3
    assert records(tmp_path / "run", "completions")[0]["response_mask"] == [1, 0, 1, 1]
    with pytest.raises(SamplerError, match=r"the sampler gave the tokens .* as a response"):
        run(config_of(tmp_path / "bad", model, 1), prompts, rewards=rewards, sampler=TwoTurns((True, False, True)))


def test_a_table_has_no_context_tokens() -> None:
    table = TablePolicy({"a": {"x": 0.5, "y": 0.5}})
    with pytest.raises(ValueError, match="a table draws a response at once"):
        table.logprobs(Batch([(0,)], [(1, 0)], [0], [(True, False)]))


def test_mlx_lm_s_trainer_refuses_masks() -> None:
    pytest.importorskip("mlx_lm")
    from gvpo_mlx_lm.groups import load_groups

    with pytest.raises(DataError, match="train row 0 has a response_mask"):
        load_groups(rows(), tiny_models.make_tokenizer())
