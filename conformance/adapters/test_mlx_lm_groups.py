"""Offline groups for mlx-lm: what a row becomes, and what is refused."""

import os

import pytest
import tiny_models
from required import require

if (asked := os.environ.get("GVPO_SUBJECTS")) and "mlx_lm" not in asked.split(","):
    pytest.skip("GVPO_SUBJECTS does not name mlx_lm: nox -s 'conformance(mlx)' runs these", allow_module_level=True)
require("mlx_lm", "mlx.core", subject="mlx_lm")

from gvpo_mlx_lm import load_groups

from gvpo_core.training.data import DataError

END = 0


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_models.make_tokenizer()


def row(**changes):
    return {"prompt": "ab", "responses": ["c", "dd"], "rewards": [1, 0.5]} | changes


def test_texts_get_the_end_token_where_they_are_finished(tokenizer):
    (group,) = load_groups(
        [row(responses=["c", "dd", [7, 8]], rewards=[1, 2, 3], finished=[True, False, True])], tokenizer
    )
    ids = {c: tokenizer.convert_tokens_to_ids(c) for c in "abcd"}
    assert group.prompt == (ids["a"], ids["b"])
    assert group.responses == ((ids["c"], END), (ids["d"], ids["d"]), (7, 8))
    assert group.rewards == (1.0, 2.0, 3.0)


def test_chat_messages_go_through_the_template(tokenizer):
    (group,) = load_groups([row(prompt=[{"role": "user", "content": "a"}])], tokenizer)
    assert tokenizer.decode(group.prompt) == "<|user|>a<|end|><|assistant|>"


CLOSING = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}CLOSE{% endfor %}"


@pytest.mark.parametrize(
    ("close", "end"), [("<|system|>\n", 3), (" <|system|>", 3), ("<|end|>", END), ("\n", END), ("", END)]
)
def test_a_finished_answer_ends_as_the_template_closes_a_turn(close, end):
    """Gemma's template closes a turn with <end_of_turn>, and its tokenizer's end token is <eos>."""
    tokenizer = tiny_models.make_tokenizer()
    assert tokenizer.convert_tokens_to_ids("<|system|>") == 3
    tokenizer.chat_template = CLOSING.replace("CLOSE", close)
    chat = row(prompt=[{"role": "user", "content": "a"}], responses=["c", "d", [7, 8]], rewards=[1, 2, 3])
    (group,) = load_groups([chat | {"finished": [True, False, True]}], tokenizer)
    assert [len(response) for response in group.responses] == [2, 1, 2]
    assert group.responses[0][-1] == end
    assert group.responses[2] == (7, 8)
    (text,) = load_groups([row()], tokenizer)
    assert text.responses[0][-1] == END


def test_a_template_that_takes_no_answer_is_refused():
    tokenizer = tiny_models.make_tokenizer()
    tokenizer.chat_template = (
        "{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}{{ messages[0].content }}"
    )
    with pytest.raises(DataError, match=r"does not take an answer after the prompt \(one turn\).* as token ids"):
        load_groups([row(prompt=[{"role": "user", "content": "a"}])], tokenizer)


def test_unscored_responses_leave_their_group(tokenizer):
    rows = [row(), row(responses=["a", "b", ""], rewards=[None, 1.0, float("nan")])]
    assert [group.rewards for group in load_groups(rows, tokenizer)] == [(1.0, 0.5)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": [1.0]}, "2 responses and 1 rewards; expected as many"),
        ({"finished": [True]}, "2 responses and 1 finished"),
        ({"responses": "dd"}, "column 'responses' is a str; expected a list"),
        ({"responses": [1, 2]}, "response 0 is a int; expected text or a list of token ids"),
        ({"responses": ["a", []]}, "response 1 has no tokens"),
        ({"rewards": [1.0, "high"]}, "reward 1 is a str; expected a number or None"),
        ({"rewards": [1.0, float("inf")]}, "reward 1 is inf; expected a finite number"),
        ({"prompt": 3}, "column 'prompt' is a int; expected text or chat messages"),
        ({"prompt": ""}, "the prompt is empty once tokenized"),
        ({"prompt": "a" * 40}, r"40 \+ 2 tokens, more than max_seq_length = 41"),
        ({"rewards": [None, 1.0]}, "none of 1 groups has two scored responses"),
    ],
)
def test_a_bad_row_is_named(changes, message, tokenizer):
    with pytest.raises(DataError, match=message):
        load_groups([row(**changes)], tokenizer, max_seq_length=41)


def test_a_missing_column_is_named(tokenizer):
    with pytest.raises(DataError, match="train row 1 has no column 'rewards'; it has prompt, responses"):
        load_groups([row(), {"prompt": "a", "responses": ["b", "c"]}], tokenizer)
