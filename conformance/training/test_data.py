"""Prompts: where they come from, their order, and the message of each mistake."""

import json
from dataclasses import replace

import pytest

from gvpo_core.training.config import DataConfig
from gvpo_core.training.data import DataError, Prompts, encode_prompts, load_rows
from gvpo_core.training.policy.hugging_face import context

pytestmark = pytest.mark.core


class Words:
    """A policy that encodes words; all that this file needs of one."""

    def encode(self, prompt):
        text = prompt if isinstance(prompt, str) else " ".join(m["content"] for m in prompt)
        return tuple(len(word) for word in text.split())

    def describe(self):
        return {"shape": {"vocabulary": 20}, "context": 9}


def encode(rows, max_tokens=0, **settings):
    return encode_prompts(Words(), rows, replace(DataConfig(), **settings), max_tokens=max_tokens)


def test_rows_from_jsonl_and_iterables(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "é one"}\n\n{"prompt": "two", "answer": 3}\n')
    assert load_rows(file) == [{"prompt": "é one"}, {"prompt": "two", "answer": 3}]
    assert load_rows(iter([{"prompt": "x"}])) == [{"prompt": "x"}]


def test_rows_from_parquet_and_datasets(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = [{"prompt": "one", "answer": 1}, {"prompt": "two", "answer": 2}]
    made = datasets.Dataset.from_list(rows)
    made.to_parquet(tmp_path / "a.parquet")
    made.save_to_disk(tmp_path / "saved")
    assert load_rows(tmp_path / "a.parquet") == rows
    assert load_rows(tmp_path / "saved") == rows
    assert load_rows(made) == rows
    datasets.DatasetDict(train=made).save_to_disk(tmp_path / "split")
    with pytest.raises(DataError, match="holds the splits train"):
        load_rows(tmp_path / "split")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "", "has no rows; expected at least one prompt"),
        ("bad.jsonl", '{"prompt": "a"}\n{oops}\n', r"bad.jsonl:2: not JSON"),
        ("list.jsonl", "[1]\n", r"list.jsonl:1: a list; expected a JSON object"),
        ("data.csv", "prompt\n", "expected .jsonl, .parquet or a folder"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_rows(tmp_path / name, "data.train")


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(DataError, match=r"data.train = .*nowhere.jsonl': there is no such file"):
        load_rows(tmp_path / "nowhere.jsonl", "data.train")
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        load_rows(tmp_path / "b.jsonl")
    with pytest.raises(DataError, match="has no rows"):
        load_rows([])


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
    with_own = [{"role": "system", "content": "own"}, *chat]
    got = encode([{"prompt": chat}, {"prompt": with_own}, {"prompt": "text"}], system_prompt="be brief")
    assert got.prompts == [[{"role": "system", "content": "be brief"}, *chat], with_own, "text"]
    assert json.dumps(chat) == '[{"role": "user", "content": "hi"}]'  # the user's rows are not changed


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


def test_dpo_with_preference_pairs_says_what_to_do() -> None:
    from gvpo_core.training import Config, ObjectiveConfig
    from gvpo_core.training.data import training_rows

    pairs = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    config = Config(objective=ObjectiveConfig(name="dpo"))
    with pytest.raises(DataError, match=r"train_rows has the columns 'chosen' and 'rejected', .*TRL's DPOTrainer"):
        training_rows(config, pairs)
    with pytest.raises(DataError, match="train_rows has the columns 'chosen'"):
        training_rows(config, [{"chosen": [{"role": "user", "content": "a"}], "rejected": []}])
    assert training_rows(Config(), pairs) == pairs, "other objectives pass the columns to the rewards"
    assert training_rows(config, [{"prompt": "a", "chosen": "b"}])
