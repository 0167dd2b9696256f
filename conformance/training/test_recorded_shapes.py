"""The shapes in which people store scored responses, each read as it is meant or refused by row and column."""

import numpy as np
import pytest

from gvpo_core.training.data import DataError, column_names
from gvpo_core.training.recorded import recorded_rows, shape_of

pytestmark = pytest.mark.core

ASK = {"role": "user", "content": "2 + 3?"}
SYSTEM = {"role": "system", "content": "Be brief."}


def says(content):
    return {"role": "assistant", "content": content}


def read(rows):
    shape = shape_of(column_names(rows))
    assert shape is not None
    return recorded_rows(rows, shape)


def only(row):
    [found] = read([row]).rows
    return found.prompt, list(found.responses), found.rewards


SHAPES = {
    "groups": ({"prompt": "q", "responses": ["a", [1, 2]], "rewards": [1, 0.5]}, "q", ["a", [1, 2]], [1.0, 0.5]),
    "groups-chat": (
        {"prompt": [ASK], "responses": [[says("5")], says("6")], "rewards": [True, False]},
        [ASK],
        ["5", "6"],
        [1.0, 0.0],
    ),
    "arrays": (
        {"prompt": "q", "responses": np.array(["a", "b"], object), "rewards": np.array([1.0, 2.0])},
        "q",
        ["a", "b"],
        [1.0, 2.0],
    ),
    "trl-text": ({"prompt": "q", "chosen": "a", "rejected": "b"}, "q", ["a", "b"], [1.0, 0.0]),
    "trl-chat": (
        {"prompt": [SYSTEM, ASK], "chosen": [says("5")], "rejected": [says("6")]},
        [SYSTEM, ASK],
        ["5", "6"],
        [1.0, 0.0],
    ),
    "trl-implicit-chat": ({"chosen": [ASK, says("5")], "rejected": [ASK, says("6")]}, [ASK], ["5", "6"], [1.0, 0.0]),
    "trl-implicit-text": (
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},
        "The sky is",
        [" blue.", " black."],
        [1.0, 0.0],
    ),
    "ultrafeedback-binarized": (
        {
            "prompt": "2 + 3?",
            "chosen": [ASK, says("5")],
            "rejected": [ASK, says("6")],
            "score_chosen": 8.5,
            "score_rejected": 4,
        },
        [ASK],
        ["5", "6"],
        [8.5, 4.0],
    ),
    "ultrafeedback": (
        {
            "instruction": "q",
            "completions": [{"response": "a", "overall_score": 7.5}, {"response": "b", "overall_score": None}],
        },
        "q",
        ["a", "b"],
        [7.5, None],
    ),
    "ultrafeedback-columns": (
        {"instruction": "q", "completions": {"response": ["a", "b"], "overall_score": [7.5, 3.0]}},
        "q",
        ["a", "b"],
        [7.5, 3.0],
    ),
    "margin": ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": 2.5}, "q", ["a", "b"], [2.5, 0.0]),
    "prompt-and-message": (
        {"prompt": "2 + 3?", "chosen": [says("5")], "rejected": [says("6")]},
        [ASK],
        ["5", "6"],
        [1.0, 0.0],
    ),
    "demonstrations": ({"prompt": "q", "responses": ["a", "b"]}, "q", ["a", "b"], [1.0, 1.0]),
    "completion": ({"prompt": [ASK], "completion": [says("5")]}, [ASK], ["5"], [1.0]),
    "none": ({"prompt": "q", "responses": [], "rewards": []}, "q", [], []),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_read(name):
    row, prompt, responses, rewards = SHAPES[name]
    found = only(row)
    assert found[0] == prompt
    assert found[1] == responses
    np.testing.assert_array_equal(found[2], [np.nan if r is None else r for r in rewards])


def test_labels_of_one_prompt_are_a_group():
    rows = [
        {"prompt": "q", "completion": "a", "label": True},
        {"prompt": "other", "completion": "c", "label": False},
        {"prompt": "q", "completion": "b", "label": False},
    ]
    found = read(rows)
    assert [(r.prompt, list(r.responses), r.rewards, r.row) for r in found.rows] == [
        ("q", ["a", "b"], [1.0, 0.0], 0),
        ("other", ["c"], [0.0], 1),
    ]


def test_labels_say_which_responses_were_cut_and_which_tokens_are_the_policys():
    rows = [
        {"prompt": "q", "completion": [5, 6], "label": True, "finished": False, "response_mask": [1, 0]},
        {"prompt": "q", "completion": [7], "label": False},
        {"prompt": "q", "completion": "b", "label": False, "finished": True, "response_mask": None},
    ]
    [found] = read(rows).rows
    assert found.finished == [False, None, True] and found.masks == [(True, False), None, None]
    assert found.columns == {}
    [plain] = read([{"prompt": "q", "completion": "a", "label": True}]).rows
    assert not plain.masks and not plain.later


def test_a_single_completion_says_that_it_was_cut():
    [found] = read([{"prompt": "q", "completion": "a", "finished": False}]).rows
    assert found.finished == [False]
    [masked] = read([{"prompt": "q", "completion": [5, 6], "response_mask": [1, 0]}]).rows
    assert masked.masks == [(True, False)]


def test_other_columns_stay_for_the_rewards():
    [row] = read([{"prompt": "q", "responses": ["a"], "rewards": [1], "finished": [True], "answer": "5"}]).rows
    assert row.columns == {"answer": "5"} and row.finished == [True]


GOOD = {"prompt": "q", "responses": ["a", "b"], "rewards": [1, 0]}
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "q"}, "data.train row 1 has no value in the column 'responses', and other rows have recorded"),
        (GOOD | {"rewards": None}, "row 1 has no value in the column 'rewards'"),
        (GOOD | {"responses": "ab"}, "row 1, column 'responses' is a str .*; expected a list"),
        (GOOD | {"rewards": [1]}, "row 1 has 2 responses and 1 rewards; expected equal numbers"),
        (GOOD | {"rewards": [1, "0"]}, "row 1, column 'rewards', entry 1 is a str .*; expected a number, or null"),
        (GOOD | {"rewards": [1, 10**400]}, "row 1, column 'rewards', entry 1 is inf; expected a finite number"),
        (GOOD | {"rewards": [1, -1e308]}, r"entry 1 is -1e\+308; expected a number within 3.4e\+38"),
        (GOOD | {"rewards": [1, float("inf")]}, "row 1, column 'rewards', entry 1 is inf; expected a finite number"),
        (GOOD | {"reward_parts": [{"r": 1}]}, r"column 'reward_parts' is \[\{'r': 1\}\]; expected 2 tables"),
        (GOOD | {"reward_parts": [{"r": 1}, 5]}, r"column 'reward_parts' is .*; expected 2 tables"),
        (GOOD | {"reward_parts": "ab"}, "column 'reward_parts' is a str"),
        (GOOD | {"reward_parts": [{"r": 1}, {"r": "x"}]}, "column 'reward_parts', entry 1, 'r' is a str"),
        (GOOD | {"finished": [True]}, "row 1 has 2 responses and 1 finished"),
        (GOOD | {"finished": [True, 1]}, "row 1, column 'finished', entry 1 is 1; expected true, false or null"),
        (GOOD | {"responses": ["a", None]}, "row 1, column 'responses', entry 1 is a NoneType"),
        (GOOD | {"responses": ["a", 5]}, "row 1, column 'responses', entry 1 is a int"),
        (GOOD | {"responses": ["a", [1, "x"]]}, "row 1, column 'responses', entry 1 is a list"),
        (GOOD | {"prompt": None}, "row 1 has no column 'prompt'"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used_is_named(row, said):
    with pytest.raises(DataError, match=said):
        read([GOOD, row])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({**PAIR, "margin": 0}, "column 'margin' is 0; expected a number above 0"),
        ({**PAIR, "score_chosen": "x", "score_rejected": 1}, "column 'score_chosen' is a str"),
        ({**PAIR, "chosen": [ASK, says("5")]}, "column 'chosen' does not answer the prompt 'q'"),
        ({"chosen": [ASK, says("5")], "rejected": [SYSTEM, ASK, says("6")]}, "column 'rejected' answers another conv"),
        ({"chosen": [ASK], "rejected": [ASK]}, "column 'chosen' ends with a message of role 'user'"),
        ({"chosen": "blue", "rejected": "black"}, "has no prompt, and its responses do not begin alike"),
        ({"prompt": [SYSTEM], "chosen": [ASK, says("5")], "rejected": [ASK, says("6")]}, "begins with other messages"),
        ({"prompt": "q", "completions": [{"text": "a"}]}, "column 'completions', entry 0 has no response"),
        ({"prompt": "q", "completions": [{"response": "a"}]}, "entry 0 has no score; expected one of score"),
        ({"prompt": "q", "completion": "a", "label": "yes"}, "column 'label' is 'yes'; expected true or false"),
        ({"prompt": "q", "completion": "a", "label": 1, "finished": 1}, "column 'finished', entry 0 is 1; expected tr"),
        ({"prompt": "q", "completion": "a", "label": 1, "finished": [True, True]}, "has 1 responses and 2 finished"),
        ({"prompt": "q", "completion": [5], "label": 1, "response_mask": 1}, "column 'response_mask' is a int"),
        ({"prompt": "q", "completion": [5], "label": 1, "response_mask": [2]}, "'response_mask', entry 0 is .*; expec"),
        ({**PAIR, "response_ids": [[1], [2]]}, "column 'response_ids': token ids beside text are used only in rows"),
        ({"prompt": "q", "completion": "a", "label": 1, "prompt_ids": [3]}, "column 'prompt_ids': token ids beside"),
        ({"prompt": "q", "responses": ["a"], "response_ids": [[1]]}, "column 'response_ids': token ids beside"),
    ],
)
def test_pairs_and_completions_that_cannot_be_used_are_named(row, said):
    with pytest.raises(DataError, match=f"data.train row 0.*{said}") as caught:
        read([row])
    assert "\n" not in str(caught.value)


def test_plain_prompts_have_no_shape():
    assert shape_of(["prompt", "answer"]) is None
    assert shape_of(["prompt", "chosen"]) is None
