"""Prompts to tokens and responses to text, as every backend does it, with tokenizers in the styles of released models.

The reference for a chat is transformers' own rendering, and token ids looked up one by one.
"""

import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import chat_tokenizers
import pytest
import tiny_models
import trainer_backends

pytest.importorskip("transformers", reason="transformers is not installed")

from gvpo_core.training.config import ConfigError, ModelConfig
from gvpo_core.training.policy import Response, ResponseError, text
from gvpo_core.training.policy.hugging_face import generation_settings
from gvpo_core.training.rollout import stopped
from gvpo_core.training.sampling import Sampling, row_seed

MODEL = ModelConfig(path="of/this-test")
CHATS = chat_tokenizers.STYLES
QUESTION = [{"role": "user", "content": "Ünïcödé 你好 😀, 2 + 3?"}]


def encode(tokenizer, prompt):
    return list(text.encode(tokenizer, prompt, MODEL))


def rendered(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


@pytest.fixture(params=CHATS, ids=str)
def style(request):
    return CHATS[request.param]


def test_templated_text_has_the_tokens_of_its_messages(style):
    tokenizer = chat_tokenizers.make(style)
    templated = rendered(tokenizer, QUESTION, add_generation_prompt=True)
    chat = encode(tokenizer, QUESTION)
    assert encode(tokenizer, templated) == chat
    if style.bos:
        assert tokenizer(templated)["input_ids"][:2] == [tokenizer.bos_token_id] * 2  # what the tokenizer alone gives
        assert chat.count(tokenizer.bos_token_id) == 1


def test_a_text_that_begins_with_bos_by_hand_gets_no_second(style):
    if not style.bos:
        pytest.skip("the tokenizer has no BOS")
    tokenizer = chat_tokenizers.make(style)
    ids = encode(tokenizer, style.bos + "2 + 3?")
    assert ids == tokenizer.encode(style.bos + "2 + 3?", add_special_tokens=False)
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("bos", ["<s>", "</s>"], ids=["bos", "bos-is-eos"])
@pytest.mark.parametrize("first", ["user", "system"])
def test_templated_text_gets_no_bos_where_the_template_writes_none(bos, first):
    template = (
        "{% if messages[0].role != 'system' %}<|system|>\nBe brief.</s>\n{% endif %}{% for m in messages %}"
        "<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    tokenizer = chat_tokenizers.make(chat_tokenizers.Style(template, ("<s>", "</s>"), "</s>", "</s>", bos=bos))
    chat = [{"role": "system", "content": "Be kind."}, *QUESTION] if first == "system" else QUESTION
    templated = rendered(tokenizer, chat, add_generation_prompt=True)
    assert tokenizer(templated)["input_ids"][0] == tokenizer.bos_token_id  # what the tokenizer alone gives
    assert encode(tokenizer, templated) == encode(tokenizer, chat)
    assert encode(tokenizer, chat)[0] != tokenizer.bos_token_id
    assert encode(tokenizer, "2 + 3?")[0] == tokenizer.bos_token_id


def test_a_last_message_that_the_template_shortens_is_refused_in_one_line():
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}</s>{% endfor %}"
    tokenizer = chat_tokenizers.make(chat_tokenizers.Style(template, ("</s>",), "</s>", "</s>"))
    with pytest.raises(ValueError, match="leaves out a part of the last message") as refused:
        encode(tokenizer, [*QUESTION, {"role": "assistant", "content": "<think>two</think> 5"}])
    assert len(str(refused.value)) < 250 and "\n" not in str(refused.value)
    assert encode(tokenizer, [*QUESTION, {"role": "assistant", "content": "<think>two"}])


def test_plain_text_has_the_tokenizers_leading_tokens_once(style):
    tokenizer = chat_tokenizers.make(style)
    ids = encode(tokenizer, "2 + 3?")
    assert ids == ([tokenizer.bos_token_id] if style.bos else []) + tokenizer.encode("2 + 3?", add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "2 + 3?"


@pytest.mark.parametrize("first", [True, False], ids=["bos-eos", "eos"])
def test_a_tokenizer_that_adds_an_end_token_does_not_end_the_prompt(style, first):
    bos = (style.bos,) if style.bos and first else ()
    tokenizer = chat_tokenizers.make(style, first=bos, last=(style.eos,))
    assert tokenizer("2 + 3?")["input_ids"][-1] == tokenizer.eos_token_id
    plain = tokenizer.encode("2 + 3?", add_special_tokens=False)
    assert encode(tokenizer, "2 + 3?") == [tokenizer.convert_tokens_to_ids(t) for t in bos] + plain
    templated = rendered(tokenizer, QUESTION, add_generation_prompt=True)
    assert encode(tokenizer, templated) == encode(tokenizer, QUESTION)
    ended = "2 + 3?" + style.eos  # the user's own end token stays
    assert encode(tokenizer, ended)[-1] == tokenizer.eos_token_id


def test_several_leading_tokens_are_added_once():
    """GLM's tokenizer puts [gMASK]<sop> before a text, and its template writes both."""
    tokenizer = chat_tokenizers.make(CHATS["glm"], first=("[gMASK]", "<sop>"))
    mask, sop = tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>"])
    plain = tokenizer.encode("hi", add_special_tokens=False)
    assert [encode(tokenizer, begun + "hi") for begun in ("", "<sop>", "[gMASK]<sop>")] == [[mask, sop, *plain]] * 3


def test_an_empty_text_has_the_leading_tokens_alone(style):
    tokenizer = chat_tokenizers.make(style)
    assert encode(tokenizer, "") == ([tokenizer.bos_token_id] if style.bos else [])


@pytest.mark.parametrize("begun", ["<think>\n2", "The answer is", "The answer is ", "你"])
def test_a_last_assistant_message_is_left_open(style, begun):
    tokenizer = chat_tokenizers.make(style)
    messages = [*QUESTION, {"role": "assistant", "content": begun}]
    ids = encode(tokenizer, messages)
    want = rendered(tokenizer, messages, continue_final_message=True)
    assert ids == tokenizer.encode(want, add_special_tokens=False)
    assert tokenizer.decode(ids).endswith(begun.strip()) or tokenizer.decode(ids).endswith(begun)
    closing = tokenizer.convert_tokens_to_ids(style.closes) if style.closes else None
    assert closing is None or closing not in ids[-len(begun) :]


@pytest.mark.parametrize("content", ["", " \n", None])
def test_a_last_assistant_message_without_text_is_refused(style, content):
    """transformers strips the white space behind the turn's header too, which other tokens would follow.

    A message that calls tools and says nothing ended in an AttributeError of transformers.
    """
    call = {} if content is not None else {"tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    with pytest.raises(ValueError, match="has no text to continue; leave that message out"):
        encode(chat_tokenizers.make(style), [*QUESTION, {"role": "assistant", "content": content} | call])


def test_tool_and_system_messages_open_the_assistants_turn():
    tokenizer = chat_tokenizers.make(CHATS["qwen3"])
    for role in ("tool", "system", "user"):
        messages = [*QUESTION, {"role": role, "content": "5"}]
        want = rendered(tokenizer, messages, add_generation_prompt=True)
        assert want.endswith("<|im_start|>assistant\n")
        assert encode(tokenizer, messages) == tokenizer.encode(want, add_special_tokens=False)


def test_text_that_a_template_leaves_out_is_reported(caplog):
    turn = "<|{{ m.role }}|>{{ m.content }}</s>"
    opens = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    make = lambda template: chat_tokenizers.make(chat_tokenizers.Style(template, ("</s>",), "</s>", "</s>"))
    deaf = make("{% for m in messages %}{% if m.role != 'system' %}" + turn + "{% endif %}{% endfor %}" + opens)
    chat = [{"role": "system", "content": "Be brief."}, *QUESTION]
    text._warn_once.cache_clear()
    assert encode(deaf, QUESTION) and not caplog.records
    for _ in range(2):
        assert encode(deaf, chat) == encode(deaf, QUESTION)
    assert [r.message for r in caplog.records] == [
        "the chat template leaves out system messages: the model does not see them, nor data.system_prompt"
    ]
    parts = make("{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}</s>{% endfor %}" + opens)
    with pytest.raises(ValueError, match="leaves out the text of the user's message: it may want a list of parts"):
        encode(parts, QUESTION)
    assert encode(parts, [{"role": "user", "content": [{"type": "text", "text": "hi"}]}])
    caplog.clear()
    loud = make("{% for m in messages %}" + turn.replace("content", "content | upper") + "{% endfor %}" + opens)
    assert encode(loud, chat) and not caplog.records


def test_messages_without_a_template_are_refused():
    tokenizer = chat_tokenizers.make(CHATS["llama3"])
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="tokenizer of 'of/this-test' has no chat template"):
        encode(tokenizer, QUESTION)


def test_a_tokenizer_without_tokens_of_the_text_itself_is_refused():
    class Odd:
        def encode(self, given, add_special_tokens):
            return [1, 2] if add_special_tokens else [3]

    with pytest.raises(ConfigError, match="changes the tokens of a text when it adds special tokens"):
        encode(Odd(), "a")


def test_responses_end_where_the_template_closes_a_turn(style):
    tokenizer = chat_tokenizers.make(style)
    eos = tokenizer.eos_token_id
    closing = {tokenizer.convert_tokens_to_ids(style.closes)} if style.closes else set()
    assert text.turn_end(tokenizer) == next(iter(closing), None)
    assert text.end_tokens(None, tokenizer) == sorted({eos} | closing)
    assert text.end_tokens([7, eos], tokenizer) == sorted({7, eos} | closing)


def test_a_template_that_takes_no_answer_leaves_the_other_end_tokens():
    tokenizer = chat_tokenizers.make(CHATS["llama3"])
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert text.end_tokens(4, tokenizer) == sorted({4, tokenizer.eos_token_id})


def test_no_end_token_anywhere_is_reported(caplog):
    tokenizer = chat_tokenizers.make(CHATS["glm"])
    tokenizer.eos_token = None
    with caplog.at_level(logging.WARNING):
        assert text.end_tokens(None, tokenizer) == []
    assert "no end token" in caplog.text and "every response runs to rollout.max_tokens" in caplog.text
    assert text.describe_end_tokens(tokenizer, []).startswith("none")
    assert text.describe_end_tokens(tokenizer, [0, 4]) == "<|endoftext|>, <|assistant|>"


@pytest.mark.parametrize("given", ["</s>", [1, "</s>"], True, 1.5])
def test_an_end_token_that_is_not_an_id_is_refused(given):
    with pytest.raises(ConfigError, match=r"eos_token_id = .*; expected token ids"):
        text.end_tokens(given, chat_tokenizers.make(CHATS["llama3"]))


def test_a_response_keeps_special_tokens_that_do_not_end_it():
    tokenizer = chat_tokenizers.make(CHATS["qwen3"])
    said = "<think>2 + 3</think>5"
    ids = tokenizer.encode(said + "<|im_end|>", add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "2 + 35"  # what transformers leaves
    assert text.decode(tokenizer, ids, text.end_tokens(None, tokenizer)) == said
    padded = [*ids, tokenizer.pad_token_id, tokenizer.eos_token_id]
    assert text.decode(tokenizer, padded, text.end_tokens(None, tokenizer)) == said


def test_a_plain_response_reads_as_transformers_decodes_it(style):
    tokenizer = chat_tokenizers.make(style)
    said = "Ünïcödé 你好 😀, it is 5."
    ids = tokenizer.encode(said, add_special_tokens=False)
    assert text.decode(tokenizer, [*ids, tokenizer.eos_token_id], []) == tokenizer.decode(ids) == said


def test_an_export_names_every_end_token(tmp_path):
    for given, end, want in ((None, [1, 2], [1, 2]), (2, [2], 2), ([2, 9], [2], [2, 9]), (2, [1, 2], [1, 2])):
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": given, "temperature": 0.6}))
        assert generation_settings(tmp_path, end) == {"eos_token_id": want, "temperature": 0.6}


def test_the_letters_tokenizer_keeps_its_unknown_token():
    tokenizer = tiny_models.make_tokenizer()
    ids = tokenizer.encode("what? ", add_special_tokens=False)
    assert tokenizer.unk_token == "?"
    assert text.decode(tokenizer, [*ids, 0], [0]) == "what? "


@pytest.mark.parametrize("backend", trainer_backends.present(), ids=lambda backend: backend.name)
def test_every_backend_reads_and_ends_text_by_these_rules(backend, tmp_path):
    style = CHATS["llama3"]
    tokenizer = chat_tokenizers.make(style)
    folder = tiny_models.write_model("llama", tmp_path / "model", spread=0.05, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.eos_token_id}))
    policy = backend.policies.policy(folder)
    bos, eos, closing = tokenizer.convert_tokens_to_ids([style.bos, style.eos, style.closes])
    prompt = policy.encode(rendered(tokenizer, QUESTION, add_generation_prompt=True))
    assert prompt == policy.encode(QUESTION) and prompt.count(bos) == 1
    assert policy.describe().end_tokens == f"{style.eos}, {style.closes}"
    seeds = [row_seed(0, i) for i in range(256)]
    responses = policy.generate([prompt], [seeds], Sampling(max_tokens=12))[0]
    last = [r.tokens[-1] for r in responses]
    assert closing in last and all(closing not in r.tokens[:-1] for r in responses)
    assert all(r.finished == (r.tokens[-1] in (eos, closing)) for r in responses)
    start = tokenizer.convert_tokens_to_ids("<|start_header_id|>")
    assert policy.decode([start, *tokenizer.encode("hi", add_special_tokens=False), closing]) == "<|start_header_id|>hi"
    policy.export(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [eos, closing]


def test_a_finished_text_ends_with_the_token_that_closes_the_turn(style):
    tokenizer = chat_tokenizers.make(style)
    end = text.end_tokens(tokenizer.eos_token_id, tokenizer)
    said = style.closes or style.eos  # a template that closes no turn
    closes = tokenizer.convert_tokens_to_ids(said)
    plain = tokenizer.encode("5 apples", add_special_tokens=False)
    answers = ["5 apples", "5 apples", f"5 apples{said}", f"5 apples{said} \n", [*plain, closes], plain]
    finished = [None, False, None, True, None, None]
    encoded = text.encode_responses(tokenizer, QUESTION, answers, finished, end)
    whole, cut = ((*plain, closes), True), (tuple(plain), False)
    assert [(r.tokens, r.finished) for r in encoded] == [whole, cut, whole, whole, whole, cut]
    [after_text] = text.encode_responses(tokenizer, "2 + 3?", ["5 apples"], [True], end)
    assert after_text.tokens == (*plain, tokenizer.eos_token_id)


@pytest.mark.parametrize(
    ("answer", "finished", "said"),
    [
        ("five{end} six", None, "has the end token .* before its end"),
        ("five{end}", False, "finished is false, and its last token .* is an end token"),
        ([5, 6], True, "finished is true, and its last token 6 is no end token"),
        ([], None, "has no tokens"),
        ("", False, "has no tokens"),
    ],
    ids=["end-within", "end-and-cut", "ids-without-end", "no-ids", "nothing-cut"],
)
def test_recorded_responses_that_no_policy_draws(answer, finished, said):
    style = CHATS["llama3"]
    tokenizer = chat_tokenizers.make(style)
    end = text.end_tokens(tokenizer.eos_token_id, tokenizer)
    answer = answer.format(end=style.closes) if isinstance(answer, str) else answer
    with pytest.raises(ResponseError, match=said) as caught:
        text.encode_responses(tokenizer, QUESTION, ["fine", answer], [None, finished], end)
    assert caught.value.number == 1


def test_an_empty_answer_is_its_end_token():
    tokenizer = chat_tokenizers.make(CHATS["qwen3"])
    end = text.end_tokens(tokenizer.eos_token_id, tokenizer)
    [empty] = text.encode_responses(tokenizer, QUESTION, [""], [True], end)
    assert empty.tokens == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)


def test_arguments_of_the_settings_reach_the_chat_template():
    tokenizer = chat_tokenizers.make(CHATS[next(iter(CHATS))])
    tokenizer.chat_template += "{% if add_generation_prompt and thinking is false %}<no thoughts>{% endif %}"
    off = text.encode(tokenizer, QUESTION, replace(MODEL, template={"thinking": False}))
    assert list(off) == encode(tokenizer, QUESTION) + tokenizer.encode("<no thoughts>", add_special_tokens=False)


def test_a_stop_text_ends_a_response_at_a_token():
    """Of every tokenizer's tokens, the fewest whose text has the stop text in it."""
    for style in CHATS.values():
        tokenizer = chat_tokenizers.make(style)
        tokens = tuple(tokenizer.encode("The answer is </answer> 12 </answer>", add_special_tokens=False))
        policy = SimpleNamespace(decode=lambda ids, t=tokenizer: text.decode(t, ids))
        ended = stopped(policy, Response(tokens, False), ("</answer>",))
        assert ended.finished and ended.stopped and 0 < len(ended.tokens) < len(tokens)
        assert "</answer>" in policy.decode(ended.tokens) and "</answer>" not in policy.decode(ended.tokens[:-1])
