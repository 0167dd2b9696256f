"""Prompts: what the model reads of a row, their order, and the message of each mistake."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from gvpo_core.training.config import DataConfig
from gvpo_core.training.data import DataError, Prompts, checked_prompt, encode_prompts
from gvpo_core.training.policy import PolicyFacts
from gvpo_core.training.policy.hugging_face import context

pytestmark = pytest.mark.core


class Words:
    """A policy that encodes words; all that this file needs of one."""

    def encode(self, prompt):
        text = prompt if isinstance(prompt, str) else " ".join(m.get("content", "") for m in prompt)
        return tuple(len(word) for word in text.split())

    def describe(self):
        return PolicyFacts(backend="words", vocabulary=20, context=9)


def encode(rows, max_tokens=0, **settings):
    return encode_prompts(Words(), rows, replace(DataConfig(), **settings), max_tokens=max_tokens)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"promt": "a"}, r"data.train row 1 has no column 'prompt'; it has promt; did you mean data.prompt = 'promt'"),
        ({"prompt": 3}, r"data.train row 1, column 'prompt' is a int \(3\); expected text or a list of chat messages"),
        ({"prompt": []}, "expected text or a list of chat messages"),
        ({"prompt": [{"role": "user"}]}, "needs a text role and a text content"),
        ({"prompt": ""}, "is empty once tokenized"),
        ({"prompt": "one two three four"}, r"row 1: the prompt has 4 tokens, more than data.max_prompt_tokens = 3"),
    ],
)
def test_rows_that_cannot_be_prompts(row, message):
    with pytest.raises(DataError, match=message):
        encode([{"prompt": "fine"}, row], max_prompt_tokens=3)


def test_long_prompts_can_be_dropped_but_not_all():
    got = encode([{"prompt": "a b c d"}, {"prompt": "a", "answer": 1}], max_prompt_tokens=3, too_long="drop")
    assert (list(got.prompts), got.dropped, list(got.columns)) == (["a"], 1, [{"answer": 1}])
    with pytest.raises(DataError, match="all 1 prompts are longer"):
        encode([{"prompt": "a b c d"}], max_prompt_tokens=3, too_long="drop")


def test_a_system_prompt_goes_before_chats_that_have_none():
    chat = [{"role": "user", "content": "hi"}]
    own = [
        [{"role": role, "content": text}, *chat]
        for role, text in (("system", "own"), ("system", ""), ("developer", "x"))
    ]
    got = encode([{"prompt": chat}, *({"prompt": p} for p in own)], system_prompt="be brief")
    assert got.prompts == [[{"role": "system", "content": "be brief"}, *chat], *own]
    assert json.dumps(chat) == '[{"role": "user", "content": "hi"}]'  # the user's rows are not changed


def test_a_system_prompt_with_text_prompts_is_refused():
    said = r"row 1, column 'prompt' is text, and data.system_prompt is for chat messages"
    with pytest.raises(DataError, match=said):
        encode([{"prompt": [{"role": "user", "content": "hi"}]}, {"prompt": "text"}], system_prompt="be brief")


def test_contents_of_text_parts_are_their_text():
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two", "image": None}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": "x"}]
    assert encode([{"prompt": chat}]).prompts == [
        [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "x"}]
    ]
    assert chat[0]["content"] is parts


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ({"type": "image"}, "of type 'image'"),
        ({"type": "image_url", "image_url": {"url": "x"}}, "of type 'image_url'"),
        ({"type": "text"}, "of type 'text'"),
        ({"text": "no type"}, "{'text': 'no type'}"),
        ("bare", "'bare'"),
    ],
)
def test_a_content_part_that_is_not_text_is_named(part, named):
    chat = [{"role": "user", "content": [{"type": "text", "text": "look:"}, part]}]
    with pytest.raises(DataError, match=re.escape(f"row 0, column 'prompt': a content part {named}; expected text")):
        encode([{"prompt": chat}])


def test_tool_messages_pass_and_keys_without_a_value_are_left_out():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    chat = [
        {"role": "user", "content": "2 + 3?", "tool_calls": None, "name": None},
        call,
        {"role": "tool", "content": "5", "name": "add"},
    ]
    assert checked_prompt(chat, "here", "") == [
        {"role": "user", "content": "2 + 3?"},
        {"role": "assistant", "tool_calls": call["tool_calls"]},
        {"role": "tool", "content": "5", "name": "add"},
    ]
    with pytest.raises(DataError, match="needs a text role and a text content"):
        checked_prompt([{"role": "assistant", "content": None}], "here", "")


def test_messages_in_arrays_are_messages():
    chat = np.array([{"role": "user", "content": np.array([{"type": "text", "text": "hi"}])}])
    assert encode([{"prompt": chat}]).prompts == [[{"role": "user", "content": "hi"}]]


def test_prompts_know_their_row_of_the_data_where_others_are_dropped():
    rows = [{"prompt": p} for p in ("a b c d", "a", "a b c d", "b")]
    got = encode(rows, max_prompt_tokens=3, too_long="drop")
    assert [got.row(i) for i in range(len(got))] == [1, 3]
    assert Prompts(["a"], [(1,)], [{}]).row(0) == 0


def test_every_epoch_sees_every_prompt_once_in_an_order_of_its_own():
    prompts = Prompts(list("abcdefg"), [(1,)] * 7, [{}] * 7)
    seen = [row for step in range(7) for row in prompts.batch(step, 3, seed=1, shuffle=True)]
    epochs = [seen[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert prompts.batch(4, 3, seed=1, shuffle=True) == seen[12:15]  # no state: a resumed run asks for step 4 alone
    assert prompts.batch(2, 3, seed=1, shuffle=False) == [6, 0, 1]
    assert [prompts.batch(s, 7, seed=2, shuffle=True) for s in (0, 1)] != epochs[:2]


def test_a_token_that_the_model_does_not_have_is_named():
    assert encode([{"prompt": "x" * 19}]).tokens == [(19,)]
    with pytest.raises(DataError, match=r"row 1, column 'prompt' has the token id 20, .* vocabulary ends at 19"):
        encode([{"prompt": "x"}, {"prompt": "a " + "x" * 20}])


def test_a_prompt_and_its_response_are_within_the_models_context():
    rows = [{"prompt": "a b c"}, {"prompt": "a b c d"}]
    assert len(encode(rows, max_tokens=5)) == 2
    said = r"data.train row 1: the prompt's 4 tokens and rollout.max_tokens = 6 are more than the 9 positions"
    with pytest.raises(DataError, match=said):
        encode(rows, max_tokens=6)
    assert len(encode(rows, max_tokens=6, max_prompt_tokens=3, too_long="drop")) == 1


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"max_position_embeddings": 64}, 64),
        ({"n_positions": 64}, 64),
        ({"max_position_embeddings": 64, "rope_scaling": {"type": "linear", "factor": 2.5}}, 160),
        ({"max_position_embeddings": 64, "rope_parameters": {"rope_type": "default"}}, 64),
        ({"max_position_embeddings": 64, "rope_parameters": {"sliding": {}, "full": {"factor": 8.0}}}, 512),
        ({"max_position_embeddings": 64, "rope_scaling": None}, 64),
        ({}, None),
    ],
)
def test_the_context_of_a_config(config, positions):
    assert context(config) == positions
