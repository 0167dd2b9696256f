"""Episodes keep the tokens that the policy drew, and add what templates of several families put between its turns."""

import numpy as np
import pytest
import tool_templates

pytest.importorskip("transformers")

from gvpo_core.training.episodes import Chat, Transcript
from gvpo_core.training.episodes.calls import MOST_CALLS, parse_calls
from gvpo_core.training.episodes.transcript import RewrittenError
from gvpo_core.training.policy import Response, text
from gvpo_core.training.rewards.worker.tools import schema_of

PROMPT = [{"role": "system", "content": "Be short."}, {"role": "user", "content": " ab 12?"}]
HEARD = {
    "tool": [{"role": "tool", "name": "add", "content": "123 ab"}],
    "two tools": [{"role": "tool", "name": "add", "content": "1"}, {"role": "tool", "name": "add", "content": "hello"}],
    "user": [{"role": "user", "content": "and 12 3?"}],
}
KEEPING = ("qwen3", "smollm2", "llama31")


def add(a: int, b: list[float], c: str = "x") -> float:
    """Adds.

    Longer words.

    Args:
      a: the first.
      c (str): the last.
    """
    return a


def opened(name: str, history: str = "segments") -> tuple[Transcript, int]:
    """A transcript before the first turn, and the end token."""
    tokenizer = tool_templates.make(name)
    chat = Chat(tokenizer, [schema_of(add)], history=history)
    return Transcript(chat, PROMPT, chat.tokens(PROMPT)), tokenizer.convert_tokens_to_ids(
        tool_templates.TEMPLATES[name][2]
    )


def say(transcript: Transcript, ids: list[int], end: int) -> None:
    said = text.decode(transcript.chat.tokenizer, (*ids, end), [end])
    transcript.say(Response((*ids, end), True), said)


def hear(transcript: Transcript, messages) -> list[int]:
    heard = transcript.heard(messages)
    transcript.hear(messages, heard)
    return heard.tokens


@pytest.mark.parametrize("name", KEEPING)
def test_the_conversation_is_the_rendered_one_token_by_token(name: str) -> None:
    transcript, end = opened(name)
    ids = transcript.chat.ids
    for words, messages in zip(("hello 12", "ab", "1 2"), HEARD.values(), strict=True):
        say(transcript, ids(words), end)
        hear(transcript, messages)
        rendered = transcript.chat.text([*PROMPT, *transcript.messages])
        assert transcript.context == tuple(ids(rendered))
    assert transcript.mask is not None and len(transcript.mask) == len(transcript.tokens)
    own = [t for t, mine in zip(transcript.tokens, transcript.mask, strict=True) if mine]
    assert own == [*ids("hello 12"), end, *ids("ab"), end, *ids("1 2"), end]


@pytest.mark.parametrize("name", KEEPING)
def test_what_was_drawn_is_never_tokenized_again(name: str) -> None:
    transcript, end = opened(name)
    ids, drawn, draw = transcript.chat.ids, [], np.random.default_rng(0)
    one, two = ids("1")[0], ids("2")[0]
    assert ids("12") != [one, two], "the text has another tokenization"
    for messages in (*HEARD.values(), HEARD["tool"]):
        odd = [int(i) for i in draw.integers(5, 5 + 256, 6)]  # bytes that are no text
        turn = [*odd, one, two, one]
        say(transcript, turn, end)
        heard = hear(transcript, messages)
        drawn += [*turn, end, *heard]
        assert heard and heard[0] != end
    assert transcript.tokens == drawn
    again = ids(transcript.chat.text([*PROMPT, *transcript.messages]))
    assert list(transcript.context) != again, "another rendering would be other tokens"


@pytest.mark.parametrize("name", KEEPING)
def test_what_is_heard_is_independent_of_what_was_said(name: str) -> None:
    found = []
    for words in ("12", "hello, ab", " x", "a \n"):
        transcript, end = opened(name)
        say(transcript, transcript.chat.ids(words), end)
        found.append(hear(transcript, HEARD["user"]))
    assert all(tokens == found[0] for tokens in found), "also where the template trims what was said"


def test_a_turn_with_another_end_token_is_closed_as_the_template_does() -> None:
    transcript, end = opened("qwen3")
    eos = transcript.chat.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    transcript.say(Response((*transcript.chat.ids("12"), eos), True), "12")
    heard = hear(transcript, HEARD["user"])
    assert heard[0] == end and transcript.tokens[1] == eos and transcript.mask[:3] == (True, True, False)


def played(name: str, thought: str) -> tuple[Transcript, list[tuple[tuple[int, ...], list[int]]]]:
    """Three turns that begin with `thought`, and for each of them what the policy saw and drew."""
    transcript, end = opened(name)
    turns = []
    for number, messages in enumerate((HEARD["user"], [{"role": "user", "content": "b 12"}], None)):
        odd = [5 + 200 + number, *transcript.chat.ids("1"), *transcript.chat.ids("2")]  # not what a text tokenizes to
        drawn = [*transcript.chat.ids(thought), *odd]
        turns.append((transcript.context, [*drawn, end]))
        say(transcript, drawn, end)
        if messages:
            hear(transcript, messages)
    return transcript, turns


@pytest.mark.parametrize("name", ["qwen3", "drops"])
def test_a_template_that_drops_thoughts_gives_segments(name: str) -> None:
    transcript, turns = played(name, "<think>hello</think>")
    segments = transcript.segments
    assert len(segments) == 3
    for number, (segment, (context, drawn)) in enumerate(zip(segments, turns, strict=True)):
        assert segment.prompt == context and segment.response == tuple(drawn) and segment.mask is None
        chat, said = transcript.chat, [*PROMPT, *transcript.messages[: 2 * number]]
        assert segment.prompt == tuple(chat.ids(chat.text(said))), "as the template renders it at that turn"
        assert "think" not in chat.tokenizer.decode(segment.prompt)


@pytest.mark.parametrize("name", KEEPING)
def test_a_template_that_keeps_turns_gives_one_segment(name: str) -> None:
    transcript, turns = played(name, "" if name == "qwen3" else "<think>hello</think>")
    [segment] = transcript.segments
    assert segment.prompt == turns[0][0] and segment.mask.count(True) == sum(len(drawn) for _, drawn in turns)
    for context, drawn in turns:
        start = len(context) - len(segment.prompt)
        assert list(segment.response[start : start + len(drawn)]) == drawn
        assert all(segment.mask[start : start + len(drawn)])


def test_thoughts_before_a_tool_s_answer_stay_until_the_next_question() -> None:
    transcript, end = opened("qwen3")
    ids = transcript.chat.ids
    say(transcript, ids("<think>ab</think>1"), end)
    hear(transcript, HEARD["tool"])
    say(transcript, ids("2"), end)
    assert len(transcript.segments) == 1
    hear(transcript, HEARD["user"])
    assert len(transcript.segments) == 2 and transcript.mask is None and transcript.tokens == []


@pytest.mark.parametrize("name", ["qwen3", "drops"])
def test_history_error_and_keep_with_a_template_that_drops_thoughts(name: str) -> None:
    thought = "<think>12</think>ab"
    transcript, end = opened(name, "error")
    say(transcript, transcript.chat.ids(thought), end)
    if name == "qwen3":
        hear(transcript, HEARD["tool"])  # thoughts since the last question stay
        say(transcript, transcript.chat.ids("ab"), end)
    with pytest.raises(RewrittenError, match=r"renders earlier turns differently .* environment\.history = 'segments'"):
        transcript.heard(HEARD["user"])
    kept, end = opened(name, "keep")
    plain, _ = opened(name)
    for one, words in ((kept, thought), (plain, "ab")):
        say(one, one.chat.ids(words), end)
    assert hear(kept, HEARD["user"]) == hear(plain, HEARD["user"])
    ids = kept.chat.ids
    assert kept.tokens[: len(ids(thought)) + 1] == [*ids(thought), end]
    say(kept, ids("12"), end)
    again = hear(kept, HEARD["user"])
    assert again == ids("<|im_end|>\n<|im_start|>user\nand 12 3?<|im_end|>\n<|im_start|>assistant\n")[1:]


def test_a_template_that_does_not_show_tools_is_found() -> None:
    assert {name: opened(name)[0].chat.shows_tools() for name in tool_templates.TEMPLATES} == {
        "qwen3": True, "smollm2": False, "llama31": True, "drops": False,
    }  # fmt: skip


def test_a_schema_has_types_defaults_and_descriptions() -> None:
    function = schema_of(add)["function"]
    assert function["name"] == "add" and function["description"] == "Adds."
    assert function["parameters"] == {
        "type": "object",
        "properties": {
            "a": {"type": "integer", "description": "the first."},
            "b": {"type": "array", "items": {"type": "number"}},
            "c": {"type": "string", "description": "the last."},
        },
        "required": ["a", "b"],
    }


ADD = {"name": "add", "arguments": {"a": 1}}
CALLS = {
    '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>': ([ADD], 0),
    'Let me see. <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call> and': ([ADD], 0),
    '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>' * 2: ([ADD] * 2, 0),
    '{"name": "add", "parameters": {"a": 1}}': ([ADD], 0),
    '<|python_tag|>{"type": "function", "name": "add", "parameters": {"a": 1}}': ([ADD], 0),
    '{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}': ([ADD], 0),
    "The answer is 5.": ([], 0),
    '{"answer": 5}': ([], 0),
    '<tool_call>{"name": "add", "arguments": {"a": 1}': ([], 1),
    "<tool_call>add(1)</tool_call>": ([], 1),
    '<tool_call>{"name": "add", "arguments": [1]}</tool_call>': ([], 1),
    "<tool_call>" + "[" * 60_000 + "</tool_call>": ([], 1),
    "<tool_call>" + "x" * 70_000 + "</tool_call>": ([], 1),
    '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>' * (MOST_CALLS + 1): ([ADD] * MOST_CALLS, 1),
}


@pytest.mark.parametrize("said", CALLS, ids=lambda said: said[:40])
def test_calls_are_parsed_or_their_errors_named(said: str) -> None:
    parsed = parse_calls(said)
    assert (parsed.calls, len(parsed.errors)) == CALLS[said]
    assert all(len(error) <= 300 for error in parsed.errors)
