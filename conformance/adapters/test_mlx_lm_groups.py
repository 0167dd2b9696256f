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
        [row(responses=["c", "dd", [7, 8]], rewards=[1, 2, 3], finished=[True, False, None])], tokenizer
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
    (group,) = load_groups([chat | {"finished": [True, False, None]}], tokenizer)
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
    with pytest.raises(DataError, match=r"does not take an answer after the prompt \(one turn\).* the prompt as text"):
        load_groups([row(prompt=[{"role": "user", "content": "a"}])], tokenizer)


def test_unscored_responses_leave_their_group(tokenizer):
    rows = [row(), row(responses=["a", "b", ""], rewards=[None, 1.0, float("nan")])]
    assert [group.rewards for group in load_groups(rows, tokenizer)] == [(1.0, 0.5)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": [1.0]}, "2 responses and 1 rewards; expected equal numbers"),
        ({"finished": [True]}, "2 responses and 1 finished"),
        ({"finished": ["false", "true"]}, "column 'finished', entry 0 is 'false'; expected true, false or null"),
        ({"responses": "dd"}, r"column 'responses' is a str \('dd'\); expected a list"),
        ({"responses": [1, 2]}, r"column 'responses', entry 0 is a int \(1\); expected text, token ids or messages"),
        ({"responses": ["a", []]}, "response 1 cannot be used: it has no tokens"),
        ({"responses": ["a<|end|>b", "c"]}, "response 0 cannot be used: it has the end token 0 before its end"),
        ({"responses": [[7, 8], [9]], "finished": [True, None]}, "finished is true, and its last token 8 is no end"),
        ({"response_mask": [[0], [1, 1]]}, "response_mask for tokens that the policy did not sample"),
        ({"response_mask": 5}, "column 'response_mask' is a int"),
        ({"response_ids": [[7]]}, "2 responses and 1 response_ids"),
        ({"rewards": [1.0, "high"]}, r"column 'rewards', entry 1 is a str \('high'\); expected a number"),
        ({"rewards": [1.0, float("inf")]}, "column 'rewards', entry 1 is inf; expected a finite number"),
        ({"rewards": [1.0, 10**400]}, "column 'rewards', entry 1 is inf; expected a finite number"),
        ({"rewards": [1.0, 1e39]}, r"column 'rewards', entry 1 is 1e\+39; expected a number within"),
        ({"prompt": 3}, r"column 'prompt' is a int \(3\); expected text or a list of chat messages"),
        ({"prompt": [{"content": "a"}]}, "needs a text role and a text content"),
        ({"prompt": ""}, "the prompt is empty once tokenized"),
        ({"prompt": "a" * 40}, r"40 \+ 2 tokens, more than max_seq_length = 41"),
        ({"rewards": [None, 1.0]}, "none of 1 groups has two scored responses"),
    ],
)
def test_a_bad_row_is_named(changes, message, tokenizer):
    with pytest.raises(DataError, match=message):
        load_groups([row(**changes)], tokenizer, max_seq_length=41)


def test_token_ids_beside_text_are_what_is_trained_on(tokenizer):
    """`gvpo collect` writes them, where a text does not tokenize back to what the policy drew."""
    known = {"prompt_ids": [7, 8, 9], "response_ids": [[10, END], None]}
    (group,) = load_groups([row(**known)], tokenizer)
    d = tokenizer.convert_tokens_to_ids("d")
    assert group.prompt == (7, 8, 9)
    assert group.responses == ((10, END), (d, d, END))


def test_an_end_token_in_the_text_is_not_doubled(tokenizer):
    (group,) = load_groups([row(responses=["c<|end|>", "dd"])], tokenizer)
    assert [response.count(END) for response in group.responses] == [1, 1]


def test_messages_and_parts_are_read_as_gvpo_train_reads_them(tokenizer):
    asked = [{"role": "user", "content": [{"type": "text", "text": "a"}], "name": None}]
    answers = [[{"role": "assistant", "content": text}] for text in ("c", "dd")]
    (group,) = load_groups([row(prompt=asked, responses=answers, response_mask=[[1, 1], None])], tokenizer)
    assert tokenizer.decode(group.prompt) == "<|user|>a<|end|><|assistant|>"
    assert [tokenizer.decode(response) for response in group.responses] == ["c<|end|>", "dd<|end|>"]


def test_a_missing_column_is_named(tokenizer):
    with pytest.raises(DataError, match="train row 1 has no column 'rewards'; it has prompt, responses"):
        load_groups([row(), {"prompt": "a", "responses": ["b", "c"]}], tokenizer)
