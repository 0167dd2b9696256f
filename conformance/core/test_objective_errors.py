"""What cannot be is refused before anything is computed, with what was given and what was wanted."""

import math
import re

import numpy as np
import pytest
from cases import CASES
from settings import Setting

import gvpo_core as core

F, IDS = np.zeros(4), np.array([0, 0, 1, 1])

BAD = {
    "rewards of another shape": ({"rewards": np.zeros((4, 1))}, ValueError, "rewards has shape (4, 1); expected (4,)"),
    "a matrix": ({"logprobs": np.zeros((2, 2))}, ValueError, "logprobs has shape (2, 2); expected (N,)"),
    "no responses": (
        {k: np.zeros(0) for k in ("logprobs", "ref_logprobs", "rewards")} | {"group_ids": np.zeros(0, int)},
        ValueError,
        "logprobs has shape (0,); expected at least one response",
    ),
    "integer log-probabilities": ({"logprobs": IDS}, TypeError, "; expected a floating dtype"),
    "float ids": ({"group_ids": F}, TypeError, "; expected integral"),
    "integer mask": ({"valid": IDS}, TypeError, "; expected bool"),
    "mask of another length": ({"valid": np.ones(3, bool)}, ValueError, "valid has shape (3,); expected (4,)"),
    "negative beta": ({"beta": -0.1}, ValueError, "beta is -0.1; expected a finite number >= 0"),
    "NaN beta": ({"beta": math.nan}, ValueError, "beta is nan; expected a finite number >= 0"),
    "infinite beta": ({"beta": math.inf}, ValueError, "beta is inf; expected a finite number >= 0"),
    "a beta for each row": (
        {"beta": np.full(4, 0.3)},
        ValueError,
        "beta has shape (4,); expected a finite number >= 0",
    ),
    "complex beta": ({"beta": 1j}, TypeError, "beta is 1j; expected a finite number >= 0"),
    "complex array of beta": ({"beta": np.array(1j)}, TypeError, "; expected a finite number >= 0"),
    "beta as text": ({"beta": "0.1"}, TypeError, "beta is '0.1'; expected a finite number >= 0"),
    "no beta": ({"beta": None}, TypeError, "beta is None; expected a finite number >= 0"),
    "id out of range": ({"num_groups": 1}, ValueError, "group_ids span 0..1; expected 0..0 for num_groups = 1"),
    "negative id": ({"group_ids": IDS - 1}, ValueError, "group_ids span -1..0; expected 0..0"),
    "no groups": ({"num_groups": 0}, ValueError, "num_groups is 0; expected at least 1"),
    "number of groups as text": (
        {"num_groups": "2"},
        TypeError,
        "num_groups is '2'; expected a static int of at least 1",
    ),
    "number of groups as float": (
        {"num_groups": 2.0},
        TypeError,
        "num_groups is 2.0; expected a static int of at least 1",
    ),
    "no ids": ({"group_ids": None}, TypeError, "group_ids: got a NoneType; expected an array (numpy, torch, jax, mlx"),
}
FUNCTIONS = (core.gvpo_weights, core.gvpo_coefficients, core.gvpo_surrogate, core.gvpo_loss, core.gvpo_regret)


@pytest.mark.modes("eager")
@pytest.mark.dtypes("float32")
@pytest.mark.parametrize("bad", BAD, ids=lambda x: x.replace(" ", "-"))
def test_arguments(setting: Setting, bad: str) -> None:
    changed, error, message = BAD[bad]
    arrays = {"logprobs": F, "ref_logprobs": F, "rewards": F, "group_ids": IDS} | {
        k: v for k, v in changed.items() if isinstance(v, np.ndarray)
    }
    options = {k: v for k, v in changed.items() if not isinstance(v, np.ndarray)}
    given = {"beta": 0.3} | {name: setting.array(x) for name, x in arrays.items()} | options
    for function in (*FUNCTIONS, core.dpo_weights, core.dpo_loss):
        with pytest.raises(error, match=re.escape(message).replace(r">=\ 0", "(>= 0|> 0)")):
            function(**given)


@pytest.mark.core
def test_not_an_array() -> None:
    with pytest.raises(TypeError, match=r"rewards: got a list; expected an array \(numpy, torch, jax, mlx, ...\)"):
        core.gvpo_loss(F, F, [0, 1, 0, 1], IDS, beta=0.1)


@pytest.mark.core
def test_another_library() -> None:
    strict = pytest.importorskip("array_api_strict")
    with pytest.raises(TypeError, match=r"rewards is an array of array_api_strict; expected .*numpy, as logprobs"):
        core.gvpo_loss(F, F, strict.zeros(4), IDS, beta=0.1)


@pytest.mark.core
def test_regret_needs_beta() -> None:
    with pytest.raises(ValueError, match=r"beta is 0.0; expected a finite number > 0"):
        core.gvpo_regret(F, F, F, IDS, beta=0)


@pytest.mark.core
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: core.grpo_weights(F, IDS, ddof=2), "ddof is 2; expected 0 or 1"),
        (lambda: core.grpo_weights(F, IDS, eps=-1.0), "eps is -1.0; expected a finite number >= 0"),
        (lambda: core.rloo_weights(F, IDS, beta=0.1), "beta is 0.1 without logprobs and ref_logprobs"),
        (lambda: core.clipped_ratio_weights(F, F, F, clip=0.0), "clip is 0.0; expected a number > 0"),
        (lambda: core.objective_coefficients("grppo", F, F, F, F, IDS, beta=0.1), "did you mean 'grpo'?"),
        (lambda: core.objective_coefficients("ppo", F, F, F, F, IDS, beta=0.1), "objective is 'ppo'; expected one of"),
        (lambda: core.objective_coefficients("grpo", F, F, None, F, IDS, beta=0.1), "old_logprobs is None; grpo needs"),
        (lambda: core.objective_coefficients("tba", F, F, F, F, IDS, beta=0.1), "did you mean 'trajectory_balance'?"),
        (lambda: core.objective_coefficients("gspo", F, F, F, F, IDS, beta=0.1), "lengths is None; gspo needs the len"),
        (
            lambda: core.objective_coefficients("gspo", F, F, F, F, IDS, beta=0.1, lengths=0 * F),
            "lengths span 0.0..0.0 in counted rows; expected 1 token or more",
        ),
        (
            lambda: core.objective_coefficients("gspo", F, F, F, F, IDS, beta=0.1, lengths=F[:3]),
            "lengths has shape (3,); expected (4,), as logprobs",
        ),
        (
            lambda: core.objective_coefficients("maxrl", F, F, F, -F - 1, IDS, beta=0.1),
            "maxrl divides by their mean and expects rewards >= 0",
        ),
        (
            lambda: core.objective_coefficients("a_star_po", F, F, F, F, IDS, beta=0),
            "beta is 0.0; expected a finite number > 0",
        ),
        (lambda: core.dpo_loss(F, F, F, IDS, beta=0.0), "beta is 0.0; expected a finite number > 0"),
        (lambda: core.bradley_terry_loss(F, F[:3]), "rejected_rewards has shape (3,); expected (4,)"),
        (lambda: core.sequence_logprobs(F, F > 0), "token_logprobs has shape (4,); expected (N, T)"),
        (lambda: core.sequence_logprobs(F[:, None], F > 0), "mask has shape (4,); expected (4, 1)"),
    ],
)
def test_other_values(call, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


FACTORS = {
    "a weight of 0": (np.array([1.0, 0, 1, 1]), ValueError, "response_weights span 0.0..1.0 in counted rows; expected"),
    "a negative weight": (np.array([1.0, 1, -2, 1]), ValueError, "response_weights span -2.0..1.0 in counted rows"),
    "an infinite weight": (np.array([1.0, np.inf, 1, 1]), ValueError, "response_weights span 1.0..inf in counted rows"),
    "a NaN weight": (np.array([1.0, np.nan, 1, 1]), ValueError, "response_weights span nan..nan in counted rows"),
    "weights of another shape": (np.ones((4, 1)), ValueError, "response_weights has shape (4, 1); expected (4,)"),
    "weights as text": ("1", TypeError, "response_weights: got a str; expected an array"),
}


@pytest.mark.modes("eager")
@pytest.mark.dtypes("float32")
@pytest.mark.parametrize("bad", FACTORS, ids=lambda x: x.replace(" ", "-"))
def test_response_weights(setting: Setting, bad: str) -> None:
    value, error, message = FACTORS[bad]
    f, ids = setting.array(F), setting.array(IDS)
    value = setting.array(value) if isinstance(value, np.ndarray) else value
    for function in FUNCTIONS:
        with pytest.raises(error, match=re.escape(message)):
            function(f, f, f, ids, beta=0.3, response_weights=value)
    for name in core.OBJECTIVES:
        expected = (error, message) if name == "gvpo" else (ValueError, f"response_weights was given; {name} has none")
        with pytest.raises(expected[0], match=re.escape(expected[1])):
            core.objective_coefficients(name, f, f, f, f, ids, beta=0.3, response_weights=value)


SEVERAL = np.full(4, 0.2)
NUMBERS = {
    "clip as text": ("clip", "x", TypeError, "clip is 'x'; expected a number > 0"),
    "clip for each row": ("clip", SEVERAL, ValueError, "clip has shape (4,); expected a number > 0"),
    "NaN clip": ("clip", math.nan, ValueError, "clip is nan; expected a number > 0"),
    "eps as text": ("eps", "a", TypeError, "eps is 'a'; expected a finite number >= 0"),
    "eps for each row": ("eps", SEVERAL, ValueError, "eps has shape (4,); expected a finite number >= 0"),
    "infinite eps": ("eps", math.inf, ValueError, "eps is inf; expected a finite number >= 0"),
}


@pytest.mark.modes("eager")
@pytest.mark.dtypes("float32")
@pytest.mark.parametrize("bad", NUMBERS, ids=lambda x: x.replace(" ", "-"))
def test_numbers(setting: Setting, bad: str) -> None:
    name, value, error, message = NUMBERS[bad]
    f, ids = setting.array(F), setting.array(IDS)
    value = setting.array(value) if isinstance(value, np.ndarray) else value
    with pytest.raises(error, match=re.escape(message)):
        if name == "clip":
            core.clipped_ratio_weights(f, f, f, clip=value)
        else:
            core.grpo_weights(f, ids, eps=value)


@pytest.mark.modes("eager")
@pytest.mark.dtypes("float32")
def test_numbers_as_arrays_of_no_dimension(setting: Setting) -> None:
    f, ids, number = setting.array(np.array([0.0, 1, 3, 4])), setting.array(IDS), setting.array(np.array(0.25))
    for got, expected in (
        (core.gvpo_weights(f, f, f, ids, beta=number), core.gvpo_weights(f, f, f, ids, beta=0.25)),
        (core.grpo_weights(f, ids, eps=number), core.grpo_weights(f, ids, eps=0.25)),
        (core.clipped_ratio_weights(f, f, f, clip=number), core.clipped_ratio_weights(f, f, f, clip=0.25)),
    ):
        setting.check("number", got, setting.numpy(expected))


@pytest.mark.modes("eager")
@pytest.mark.dtypes("float32")
def test_masks(setting: Setting) -> None:
    tokens, mask = setting.array(np.zeros((2, 3))), np.ones((2, 3), bool)
    bad = {
        "mask: got a list; expected an array": (tokens, mask.tolist(), TypeError),
        "mask: got a NoneType; expected an array": (tokens, None, TypeError),
        "mask has shape (3, 2); expected (2, 3), as token_logprobs": (tokens, setting.array(mask.T), ValueError),
        "; expected bool": (tokens, setting.array(mask.astype(int)), TypeError),
        "token_logprobs: got a list; expected an array": ([[0.0]], setting.array(mask), TypeError),
        "; expected a floating dtype": (setting.array(mask), setting.array(mask), TypeError),
    }
    if setting.subject.name != "numpy":
        bad["mask is an array of"] = (tokens, mask, TypeError)
    if setting.subject.name == "torch":
        bad["mask is on meta; expected cpu, as token_logprobs"] = (tokens, setting.array(mask).to("meta"), ValueError)
    for message, (logprobs, given, error) in bad.items():
        with pytest.raises(error, match=re.escape(message)):
            core.sequence_logprobs(logprobs, given)
    none = core.sequence_logprobs(setting.array(np.zeros((0, 3))), setting.array(mask[:0]))
    assert tuple(none.shape) == (0,), "a process may have no rows"


@pytest.mark.modes("compiled")
@pytest.mark.dtypes("float32")
def test_compilation_needs_the_number_of_groups(setting: Setting) -> None:
    a = setting.arrays(CASES[0])
    function = setting.subject.compile(lambda *x: core.gvpo_loss(*x, beta=0.3).loss)
    with pytest.raises(Exception, match="num_groups is None under compilation; pass the number of groups"):
        function(a["logprobs"], a["ref_logprobs"], a["rewards"], a["group_ids"])


@pytest.mark.capability("values")
@pytest.mark.modes("eager")
def test_sequence_logprobs(setting: Setting) -> None:
    """A sum over the mask, in float32 or wider: 300 tokens of -1/8 are -37.5, which a 16-bit sum would miss."""
    tokens = np.full((3, 300), -0.125)
    mask = np.ones((3, 300), bool)
    mask[1, 100:] = False
    mask[2] = False
    tokens[1, 100:], tokens[2] = np.nan, -np.inf
    got = core.sequence_logprobs(setting.array(tokens), setting.array(mask))
    setting.check("sum", got, [-37.5, -12.5, 0.0])
