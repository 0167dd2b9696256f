"""Built-in rewards: numbers are compared as numbers, gold answers are read whole, and what is missing is not scored."""

import numpy as np
import pytest
from math_golds import GOLDS, UNREADABLE

from gvpo_core.training.config import RewardConfig
from gvpo_core.training.rewards import close_rewards, load_rewards, score
from gvpo_core.training.rewards.builtin import exact_match, math_verify, regex_match

pytestmark = pytest.mark.core


def boxed(answer: str) -> str:
    return f"Let me see. So the answer is $\\boxed{{{answer}}}$."


@pytest.fixture
def library():
    pytest.importorskip("math_verify", reason="the rewards extra is not installed")


@pytest.mark.slow
def test_gold_answers_accept_other_notations_and_no_wrong_answer(library):
    """Read by math-verify as they stand, 65 right and 31 wrong answers to 104 of these golds are accepted."""
    missed = [(g, r) for g, right, _ in GOLDS for r in right if math_verify([boxed(r)], answer=[g]) != [1.0]]
    accepted = [(g, w) for g, _, wrong in GOLDS for w in wrong if math_verify([boxed(w)], answer=[g]) == [1.0]]
    assert not accepted
    assert missed == [(r"e^{i\pi/4}", r"\frac{\sqrt2}{2}+\frac{\sqrt2}{2}i")]


@pytest.mark.parametrize("gold", UNREADABLE)
def test_a_gold_answer_that_cannot_be_read_is_not_scored(gold, library):
    assert math_verify([boxed("5"), boxed("0")], answer=[gold, gold]) == [None, None]


@pytest.mark.parametrize(
    ("response", "gold", "wanted"),
    [
        (r"2\pi", "2", 0), (r"2\pi", r"2\pi", 1), (r"The answer is 2\pi.", "2", 0), ("The answer is 2x", "2", 0),
        ("it is 2", "2", 1), (r"so $x = 2\pi$", "2", 0), (r"so \(x = 2\pi\)", r"2\pi", 1), (r"\boxed{2\pi}", "2", 0),
        (r"\boxed{3}, no wait, \boxed{4}", "4", 1), (r"\boxed{3}, no wait, \boxed{4}", "3", 0),
        (r"\boxed{1} and \boxed{2}", "1,2", 1), (r"\boxed{1} and \boxed{2}", "1", 0), ("**5**", "5", 1),
        ("Answer: 5", "5", 1), ("The final answer is $5$. I hope it is correct.", "5", 1), ("#### 72", "72", 1),
        ("<answer>72</answer>", "72", 1), ("x = 3 and y = 4", "x=3, y=4", 1), ("The answer is (C).", "C", 1),
        ("I think A.\nAnswer: C", "C", 1), ("The answer is B.", "C", 0), ("It costs 5 dollars.", "5", 1), ("", "5", 0),
        (r"\boxed{", "5", 0), ("The answer is Evelyn.", r"\text{Evelyn}", 1), ("The answer is -5", "5", 0),
        ("The answer is \u22125", "-5", 1), ("The answer is 2√3", "2", 0), ("The answer is 3i", "3", 0),
        ("answer: sqrt(2)", r"\sqrt{2}", 1), ("The answer is 1/(n+1).", r"\frac{1}{n+1}", 1), ("= 5!", "120", 1),
        ("<think>it is 71</think> 72", "72", 1), ("<think>it is 72</think> 71", "72", 0),
        (r"<think>\boxed{72}</think> so $71$", "72", 0), (r"\boxed{x^2}", "x²", 1), (r"\boxed{2x}", "x²", 0),
        (r"\boxed{10^{-3}}", "10⁻³", 1), ("so $2ab$", "2", 0), (r"so $5\text{ cm}$", "5", 1), ("so it is 5 cm", "5", 1),
        ("From 1 p.m. on, so at 3 p.m.", "3 p.m.", 1),
        ("The answer is 3 p.m.", "3:00 PM", 1), ("It leaves at 3 p.m. and arrives at 4 p.m.", "3 p.m.", 0),
        (rf"\boxed{{0.\overline{{{'3' * 5000}}}}}", "5", 0), (rf"\boxed{{0.{'3' * 5000}(3)}}", "1/3", 1),
        (rf"\boxed{{0.{'3' * 5000}...}}", "1/3", 1), (rf"\boxed{{5{' ' * 5000}!}}", "1/3", 0),
        (rf"\boxed{{5{chr(10) * 5000}!}}", "1/3", 0),
        (f"It is 0.{'3' * 5000}", "5", 0), (f"It is 0.{'3' * 5000}", "1/4", 0), (f"It is {'3' * 5000}.5", "0.25", 0),
        ("The answer is H2O.", "H2O", 1), ("The answer is HO2.", "H2O", 0), (r"so $x_1$", "x1", 1),
        ("**Answer:** 5", "5", 1), ("**Answer:** \u22125", "5", 0), ("**Answer: 3/4**", "0.75", 1),
        ("2**10", "1024", 1), ("The answer is 2 ** 10", "1024", 1), ("The answer is \u20135", "5", 0),
        (r"It is \$1,234.50.", "1234.5", 1),
        ("The answer is 12.5 percent.", "12.5%", 1), ("The answer is 5 m/s.", "5 km/h", 0), ("so $100 m$", "100 cm", 0),
        ("The answer is 1.5 million.", "1500000", 1), ("**Answer:** 1 ≤ x ≤ 2", "[1,2]", 1),
        ("so $1001_3$", "1001_2", 0),
        ("The answer is [1,inf).", r"[1,\infty)", 1), ("It was May 5th, 2020.", "2020-05-05", 1), ("so 5 3", "15", 0),
    ],
)  # fmt: skip
def test_the_final_answer_of_a_response_is_read_whole(response, gold, wanted, library):
    assert math_verify([response], answer=[gold]) == [wanted]


@pytest.mark.parametrize(
    ("response", "answer", "wanted"),
    [
        ("5.0", "5", 1), ("5", 5.0, 1), ("1,234", "1234", 1), ("1234.50", "1,234.5", 1), ("-1,000", -1000, 1),
        ("\u22125", "-5", 1), ("1e3", "1000", 1), ("1e-07", 1e-7, 1), ("+5", "5", 1), (".5", "0.5", 1),
        ("5.01", "5", 0), ("-5", "5", 0), ("12,34", "1234", 0), ("007", "7", 0), ("007", "007", 1), ("7", "007", 0),
        ("yes", "yes", 1), (" yes\n", "yes", 1), ("Yes", "yes", 0), ("", "", 1), ("nan", "nan", 1), ("True", True, 1),
        ("0.1", 0.1, 1), ("10000000000000000000001", "10000000000000000000000", 0), ("5", None, None),
        ("nan", float("nan"), None), ("5.0", np.int64(5), 1), ("[1, 2]", [1, 2], 1),
    ],
)  # fmt: skip
def test_exact_match_compares_numbers_as_numbers(response, answer, wanted):
    assert exact_match([response], answer=[answer]) == [wanted]


@pytest.mark.parametrize(
    ("response", "answer", "wanted"),
    [
        ("so 1,234", "1234", 1), ("so 1,234", "234", 0), ("it is 5.0", "5", 1), ("it is .5", "5", 0),
        ("it is .5", "0.5", 1), ("3 + 4 = 7.", 7, 1), ("-1,000.5!", "-1000.5", 1), ("none", "7", 0), ("7", None, None),
        ("6.02e23", "23", 0), ("6.02e23", "6.02e23", 1), ("3,4", "4", 1),
        ("it is \u22125", "-5", 1), ("it is \u22125", "5", 0), ("it is \u20135", -5, 1), ("it is \u20135", "5", 0),
        ("so 3-5", "5", 1), ("so 3-5", "-5", 0), ("x=-5", "-5", 1), ("-.5", "-0.5", 1), ("1e-3", "0.001", 1),
    ],
)  # fmt: skip
def test_regex_match_compares_numbers_as_numbers(response, answer, wanted):
    assert regex_match([response], answer=[answer]) == [wanted]


COLUMNS = ("pattern", "column", "prompts", "completions", "self", "function", "answer", "completion_ids", "image")


@pytest.mark.parametrize("isolation", ["process", "thread", "given"])
def test_built_ins_take_the_one_column_that_they_need(isolation):
    """A column called like an argument does not collide, and one that no process can get does not matter."""
    columns = {name: [object(), object()] for name in COLUMNS} | {"gold": ["1", None], "completion_ids": [[1], [1]]}
    for name, function in (("exact_match", exact_match), ("regex_match", regex_match)):
        config = RewardConfig(
            name, options={"column": "gold"}, isolation="thread" if isolation == "given" else isolation
        )
        loaded = load_rewards({"r": config}, {"r": function} if isolation == "given" else None)
        try:
            got = score(loaded, ["p", "q"], ["1", "2"], columns)
        finally:
            close_rewards(loaded)
        np.testing.assert_array_equal(got.total, [1.0, np.nan])


@pytest.mark.parametrize("column", ["pattern", "column", "self", "prompts", "completions"])
def test_the_answer_may_stand_in_a_column_of_any_name(column):
    loaded = load_rewards({"r": RewardConfig("regex_match", options={"column": column, "pattern": r"\d"})})
    try:
        np.testing.assert_array_equal(score(loaded, ["p", "q"], ["1", "2"], {column: ["1", "3"]}).total, [1.0, 0.0])
    finally:
        close_rewards(loaded)
