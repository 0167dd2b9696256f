"""The reward `reward_model`: scores equal transformers' own of each row alone, whatever is padding."""

import json

import pytest
import tiny_models
import weights_of_models
from required import require

require(subject="torch")

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from gvpo_core.training.config import RewardConfig
from gvpo_core.training.rewards import RewardError, load_rewards
from gvpo_core.training.rewards.scores import call_rewards
from gvpo_core.training.rewards.worker import reward_model as rewarding
from gvpo_core.training.rewards.worker.cache import cache_of

CHAT = [{"role": "user", "content": "say a"}]
PROMPTS = ["say b:", "say b:", CHAT, CHAT, "q:", [*CHAT, {"role": "assistant", "content": "a, "}]]
TEXTS = ["ab", "cd", "yes", "no no", "a longer answer", "and b"]
COMPLETIONS = [
    text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
    for prompt, text in zip(PROMPTS, TEXTS, strict=True)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    config = AutoConfig.for_model(
        "llama", **tiny_models.SMALL, num_labels=1, initializer_range=0.3, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tiny_models.make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def fresh():
    cache_of.cache_clear()
    rewarding._loaded.cache_clear()


def alone(folder) -> list[float]:
    """transformers' score of each row, in a batch of one, in float64."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()
    model.config.pad_token_id = None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0, "an end token looks like padding here"
    scores = []
    for prompt, text in zip(PROMPTS, TEXTS, strict=True):
        if isinstance(prompt, str):
            ids = [*tokenizer(prompt + text)["input_ids"], 0]
        else:
            last = prompt[-1]["content"] + text if prompt[-1]["role"] == "assistant" else text
            messages = [*(m for m in prompt if m["role"] == "user"), {"role": "assistant", "content": last}]
            ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert ids[-1] == 0
        with torch.no_grad():
            scores.append(float(model(torch.tensor([ids])).logits[0, 0]))
    return scores


@pytest.mark.parametrize("batch_tokens", [1, 40, 16384])
def test_scores_are_those_of_each_row_alone(folder, batch_tokens):
    got = rewarding.reward_model(PROMPTS, COMPLETIONS, path=str(folder), batch_tokens=batch_tokens)
    assert len({*got}) == len(got) and got == pytest.approx(alone(folder), abs=1e-5)


def test_a_text_is_scored_once(folder, tmp_path, monkeypatch):
    rows = []
    plain = rewarding.Classifier.score
    monkeypatch.setattr(rewarding.Classifier, "score", lambda self, of: rows.extend(of) or plain(self, of))
    cache = str(tmp_path / "scores.jsonl")
    first = rewarding.reward_model(PROMPTS * 2, COMPLETIONS * 2, path=str(folder), cache=cache)
    assert len(rows) == len(PROMPTS) and first[: len(PROMPTS)] == first[len(PROMPTS) :]
    cache_of.cache_clear()
    assert rewarding.reward_model(PROMPTS, COMPLETIONS, path=str(folder), cache=cache) == first[: len(PROMPTS)]
    assert len(rows) == len(PROMPTS)
    rewarding.reward_model(PROMPTS[:1], COMPLETIONS[:1], path=str(folder), cache=cache, dtype="bfloat16")
    assert len(rows) == len(PROMPTS) + 1, "another precision is another score"


def test_a_response_beyond_the_context_has_no_score(folder, capsys):
    got = rewarding.reward_model(["q:", "q:"], ["a" * 200, "a"], path=str(folder))
    assert got[0] is None and got[1] is not None
    assert "1 of 2 responses with their prompts exceed 128 tokens" in capsys.readouterr().out


@pytest.mark.slow
def test_it_runs_in_its_process_and_loads_before_any_time_limit(folder):
    options = {"path": str(folder)}
    config = RewardConfig(function="reward_model", options=options, workers=1, memory=0)
    rewards = load_rewards({"rm": config}, None)
    try:
        assert list(call_rewards(rewards, PROMPTS, TEXTS, {"path": ["of the data"] * 6}).parts["rm"]) == pytest.approx(
            alone(folder), abs=1e-5
        )
    finally:
        for reward in rewards:
            reward.call.close()


@pytest.mark.slow
def test_a_model_that_is_missing_is_named_with_the_settings():
    config = RewardConfig(function="reward_model", options={"path": "nowhere/at-all"}, workers=1, memory=0)
    with pytest.raises((RewardError, ValueError), match="'nowhere/at-all'"):
        load_rewards({"rm": config}, None)
    with pytest.raises((RewardError, ValueError), match=r"options\.path is missing; the reward needs it"):
        load_rewards({"rm": RewardConfig(function="reward_model", isolation="thread")}, None)


def test_models_that_cannot_be_rewards_are_named(folder, tmp_path):
    def refusal(**options):
        with pytest.raises(LookupError) as error:
            rewarding._load(options)
        return str(error.value)

    assert "options.dtype = 'int4'; expected float32, bfloat16 or float16" in refusal(path=str(folder), dtype="int4")
    causal = tiny_models.write_model("llama", tmp_path / "causal", num_labels=1)
    assert "its files lack score.weight, so its scores would be random" in refusal(path=str(causal))
    two = tmp_path / "two"
    two.mkdir()
    for path in folder.iterdir():
        (two / path.name).write_bytes(path.read_bytes())
    config = json.loads((two / "config.json").read_text())
    config["id2label"], config["label2id"] = {"0": "a", "1": "b"}, {"a": 0, "b": 1}
    (two / "config.json").write_text(json.dumps(config))
    assert "the model has 2 outputs; expected 1, a score" in refusal(path=str(two))


@pytest.mark.parametrize("kind", weights_of_models.UNSAFE)
def test_weights_that_are_unsafe_or_quantised_are_refused(kind, folder, tmp_path):
    """A pickle was read, integers were taken as they are, and an adapter was loaded on top of the model."""
    made = weights_of_models.unsafe(kind, folder, tmp_path)
    with pytest.raises(LookupError, match=r"options\.path = .*" + weights_of_models.UNSAFE[kind]):
        rewarding._load({"path": str(made)})
