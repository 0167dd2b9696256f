"""A server that gives text alone: its text is tokenized here, and counted where it was sampled as other tokens."""

from collections import Counter
from dataclasses import replace

import pytest
import toy_run
from engine_server import Server
from sampler_runs import Copy, lines, run, short
from scripted_policy import ScriptedPolicy
from table_problem import PROMPTS, REFERENCE, table

from gvpo_core.training.config import ConfigError
from gvpo_core.training.policy import text
from gvpo_core.training.policy.table import TablePolicy
from gvpo_core.training.samplers import Engine, SamplerError, Text
from gvpo_core.training.sampling import Sampling

pytestmark = pytest.mark.core


def engine(server, **options):
    return Engine(server.url, "tiny", tokens="text", pause=0.001, **options)


def drawn(sampler, prompts, seeds, sampling):
    policy = TablePolicy(table(REFERENCE))
    sampler.refresh(policy, 0)
    return sampler.generate([policy.encode(prompt) for prompt in prompts], seeds, sampling)


def test_each_response_is_a_request_with_its_seed():
    with Server(text=True) as server:
        first, second = drawn(engine(server), PROMPTS[:2], [[5, 6, 2**31 + 7], [8]], Sampling(2))
        asked = sorted((body["prompt"], body["seed"]) for body in server.asked)
        sent = server.asked[0]
    assert asked == [("p0", 5), ("p0", 6), ("p0", 7), ("p1", 8)] and len(first) == 3 and len(second) == 1
    assert all(isinstance(r, Text) and r.finished for r in first)
    fields = {"max_tokens": 2, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert sent.items() >= fields.items() and "n" not in sent and "return_token_ids" not in sent


def test_fields_that_a_server_rejects_are_left_out_and_others_added():
    with Server(text=True) as server:
        drawn(engine(server, omit=["top_k", "min_p"], fields={"extra": {"a": [1]}}), PROMPTS[:1], [[5]], Sampling(2))
        (sent,) = server.asked
    assert not {"top_k", "min_p"} & set(sent) and sent["extra"] == {"a": [1]} and sent["top_p"] == 1.0


def test_a_run_takes_the_text_and_counts_what_was_sampled_as_other_tokens(tmp_path, capsys):
    with Server(text=True) as server:
        run(config := short(tmp_path, 3), engine(server))
    metrics = [m for m in lines(config, "metrics") if m["kind"] == "train"]
    responses = [c for c in lines(config, "completions") if c["kind"] == "train"]
    assert all(c["finished"] and c["tokens"] == 2 for c in responses)  # the end token is added
    counted = Counter(c["step"] for c in responses if c["response"] == "a")
    assert [m["sampler/retokenized"] for m in metrics] == [counted[1], counted[2], counted[3]] and sum(counted.values())
    assert not any("sampler/gap" in m for m in metrics) and [m["responses/lost"] for m in metrics] == [0, 0, 0]
    assert metrics[-1]["reward/mean"] != metrics[0]["reward/mean"]


def test_a_text_cut_by_the_limit_gets_no_end_token(tmp_path, capsys):
    config = short(tmp_path, 1)
    config = replace(config, rollout=replace(config.rollout, max_tokens=1))
    with Server(text=True) as server:
        run(config, engine(server))
    responses = [c for c in lines(config, "completions") if c["kind"] == "train"]
    assert {(c["finished"], c["tokens"]) for c in responses} == {(False, 1)}


@pytest.mark.parametrize(
    ("given", "lost"),
    [
        (Text("a", True), 0),
        (Text("nothing of the table", True), 3),
        (Text("a", True, tokens=40), 0),
    ],
)
def test_a_text_that_cannot_be_a_response_is_lost(given, lost, tmp_path, capsys):
    sampler = Copy()
    first = []
    sampler.told = lambda prompt, response: response if prompt in first else first.append(prompt) or given
    run(config := short(tmp_path, 1), sampler)
    (metrics,) = [m for m in lines(config, "metrics") if m["kind"] == "train"]
    assert metrics["responses/lost"] == lost


def test_texts_that_are_all_lost_end_the_run_with_the_reason(tmp_path, capsys):
    sampler = Copy()
    sampler.told = lambda prompt, response: Text("zz", True)
    with pytest.raises(SamplerError, match=r"none of 48 responses; a text cannot be a response: the table has no"):
        run(short(tmp_path, 1), sampler)


def test_a_longer_text_than_the_limit_is_lost_if_it_ends_and_cut_if_it_does_not(tmp_path, capsys):
    config = short(tmp_path, 1)
    config = replace(config, rollout=replace(config.rollout, max_tokens=1))
    sampler = Copy()
    sampler.told = lambda prompt, response: Text("a", response.tokens[0] > 2)
    run(config, sampler)
    responses = [c for c in lines(config, "completions") if c["kind"] == "train"]
    (metrics,) = [m for m in lines(config, "metrics") if m["kind"] == "train"]
    assert {(c["finished"], c["tokens"]) for c in responses} == {(False, 1)}
    assert metrics["responses/lost"] == 48 - len(responses) > 0


def test_an_engine_without_ids_names_the_way_to_take_its_text():
    with Server(text=True) as server, pytest.raises(SamplerError, match=r"no token ids .* engine\.tokens = 'text'"):
        prompt = TablePolicy(table(REFERENCE)).encode(PROMPTS[0])
        server.answer = lambda body: {"choices": [{"text": "a", "finish_reason": "stop"}]}
        Engine(server.url, "tiny").generate([prompt], [[1]], Sampling(2))


def test_text_without_a_policy_or_with_a_tolerance_is_refused():
    sampler = Engine("http://localhost:1", "tiny", tokens="text")
    with pytest.raises(SamplerError, match="needs refresh"):
        sampler.generate([(1,)], [[1]], Sampling(2))
    with pytest.raises(ConfigError, match="text has no log-probabilities to compare"):
        Engine("http://localhost:1", "tiny", tokens="text", gap_tolerance=0.1)


CHAT = [{"role": "system", "content": "be short"}, {"role": "user", "content": "how many?"}]


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_chat_endpoint_gets_the_messages_and_its_answer_is_tokenized_here(tmp_path, capsys, ahead):
    """The server applies its own template; fields that hosted servers reject are left out."""
    config = toy_run.config_of(tmp_path / "run", "scripted", 2, rollout={"max_tokens": 8, "ahead": ahead})
    policy = ScriptedPolicy(lambda text, u: "never")
    with Server() as server:
        sampler = Engine(server.url, "tiny", tokens="chat", omit=["top_k", "max_tokens"], fields={"a": 1})
        rewards = {"length": lambda completions: [float(len(str(c))) for c in completions]}
        toy_run.run(config, [{"prompt": CHAT}, {"prompt": CHAT}], policy, sampler=sampler, rewards=rewards)
        assert server.asked and all(body["messages"] == CHAT for body in server.asked)
        assert all(not {"prompt", "top_k", "max_tokens"} & set(b) and b["a"] == 1 for b in server.asked)
        assert len({body["seed"] for body in server.asked}) == len(server.asked)
    responses = [c for c in lines(config, "completions") if c["kind"] == "train"]
    assert {(c["response"], c["finished"]) for c in responses} == {("2", True)} and len(responses) == len(server.asked)


def test_a_text_prompt_for_a_chat_endpoint_is_named(tmp_path, capsys):
    with Server() as server, pytest.raises(SamplerError, match=r"'chat' takes prompts of chat messages, and .* 'p2'"):
        run(short(tmp_path, 1), Engine(server.url, "tiny", tokens="chat"))


class Words:
    """A tokenizer that puts token 1 before every text."""

    words = ("<eos>", "<s>", "one ", "two ", "zqxj")

    def encode(self, given, add_special_tokens=True):
        ids = [self.words.index(w) for w in (given.replace(" ", " |").split("|") if given != "zqxj" else ["zqxj"]) if w]
        return [1, *ids] if add_special_tokens else ids

    def decode(self, ids, skip_special_tokens=False):
        return "".join(self.words[i] for i in ids)


def test_the_text_of_a_prompt_leaves_out_what_the_server_puts_first():
    words = Words()
    for tokens in ((1, 2, 3), (1, 1, 2)):
        told = text.prompt_text(words, tokens)
        assert told == words.decode(tokens[1:])
        assert tokens[1] == 1 or tuple(words.encode(told)) == tokens
    assert text.prompt_text(words, (2, 3)) == "one two "
