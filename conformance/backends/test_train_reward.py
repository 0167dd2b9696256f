"""`gvpo train-reward`: Eq. 4 on pairs, exact, to a folder that the reward `reward_model` and transformers load."""

import json
import math
import os
import random
import re
import resource
import signal
import time
from pathlib import Path

import power_loss
import pytest
import tiny_models
import weights_of_models
from required import require

require(subject="torch")

import torch
from gvpo_torch.reward_model import Pair, RewardModel, micro_batches, train
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from gvpo_core.training import cli
from gvpo_core.training.cli import train_reward as cli_train_reward
from gvpo_core.training.cli.train_reward import read_preferences, split
from gvpo_core.training.config import ConfigError, ModelConfig, OptimizerConfig
from gvpo_core.training.rewards.worker import reward_model as rewarding
from gvpo_core.training.rows import DataError

PAIRS = [
    Pair((5, 6, 7, 0), (5, 6, 8, 9, 10, 0)),
    Pair((20, 21, 0), (20, 0), 0.5),
    Pair((30, 31, 32, 33, 34, 35, 0), (30, 36, 0), 1.5),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tiny_models.write_model("llama", tmp_path_factory.mktemp("base"), spread=0.2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0, "the last token of each row looks like padding"
    return folder


def model_of(folder: Path, **settings) -> RewardModel:
    return RewardModel(ModelConfig(path=str(folder), device="cpu", **settings))


def scored(model, rows: list[tuple[int, ...]]) -> torch.Tensor:
    """Of each row alone, by transformers' own forward pass, in the model's dtype."""
    model.config.pad_token_id = -1
    return torch.stack([model(input_ids=torch.tensor([row])).logits[0, 0] for row in rows])


def with_head(model: RewardModel) -> RewardModel:
    torch.manual_seed(3)
    torch.nn.init.normal_(model.model.score.weight)
    return model


def test_a_new_output_layer_gives_every_row_the_score_0(folder):
    model = model_of(folder)
    assert model.scores([p.chosen for p in PAIRS]).tolist() == [0.0, 0.0, 0.0]
    assert model.evaluate(PAIRS, 1000) == (pytest.approx(math.log(2)), 0.5)


@pytest.mark.parametrize("tokens", [10_000, 9, 1])
def test_the_gradient_is_that_of_eq_4_in_float64(folder, tokens):
    """Rows alone, without padding, in plain loops; however the pairs are split. The last token of every row is the
    padding token, whose embedding got no gradient from transformers' `padding_idx`."""
    model = with_head(model_of(folder))
    loss = model.backward(PAIRS, tokens)
    reference = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float64).eval()
    assert reference.model.embed_tokens.padding_idx == 0
    reference.model.embed_tokens.padding_idx = None
    reference.load_state_dict({name: value.double() for name, value in model.model.state_dict().items()})
    chosen, rejected = (scored(reference, [getattr(p, side) for p in PAIRS]) for side in ("chosen", "rejected"))
    total: torch.Tensor = sum(
        torch.log1p(torch.exp(-(c - r - p.margin))) for c, r, p in zip(chosen, rejected, PAIRS, strict=True)
    ) / len(PAIRS)
    total.backward()
    assert loss == pytest.approx(float(total.detach()), rel=1e-5)
    wanted = dict(reference.named_parameters())
    for name, p in model.model.named_parameters():
        torch.testing.assert_close(p.grad.double(), wanted[name].grad, rtol=2e-4, atol=2e-6, msg=name)


def test_dynamic_rope_leaves_out_rows_beyond_the_original_length(folder, tmp_path):
    """A row's score would depend on the rows beside it, and on those before."""
    rope = {"rope_type": "dynamic", "rope_theta": 700.0, "factor": 4.0}
    assert model_of(folder).context == 128
    assert model_of(tiny_models.changed(folder, tmp_path, rope_parameters=rope)).context == 128


@pytest.mark.parametrize("kind", weights_of_models.UNSAFE)
def test_weights_that_are_unsafe_or_quantised_are_refused(kind, folder, tmp_path):
    made = weights_of_models.unsafe(kind, folder, tmp_path)
    with pytest.raises(ConfigError, match=weights_of_models.UNSAFE[kind]):
        model_of(made)


def test_micro_batches_hold_all_pairs_once_within_the_tokens():
    random.seed(1)
    pairs = [Pair((1,) * random.randint(1, 40), (1,) * random.randint(1, 40)) for _ in range(50)]
    made = list(micro_batches(pairs, 200))
    assert sorted(id(p) for part in made for p in part) == sorted(map(id, pairs))
    assert all(2 * len(part) * max(p.width for p in part) <= 200 or len(part) == 1 for part in made)


def test_steps_are_deterministic_and_lower_the_loss(folder):
    def run() -> tuple[list[float], torch.Tensor]:
        model = model_of(folder)
        optimizer = OptimizerConfig(learning_rate=3e-3, schedule="linear", warmup=2)
        losses = [loss for _, loss, _ in train(model, PAIRS, optimizer, batch=2, epochs=15)]
        return losses, model.model.score.weight.detach().clone()

    (losses, head), (again, other) = run(), run()
    assert losses == again and torch.equal(head, other) and len(losses) == 30
    assert max(losses[-4:]) < 0.3 < min(losses[:2]), "two steps an epoch, the loss of each before it"


def preferences(path: Path, count: int) -> Path:
    """The better answer has more of the letter a."""
    random.seed(0)
    with path.open("w") as file:
        for i in range(count):
            word = "".join(random.choice("bcde") for _ in range(4))
            better, worse = f"{word} aaa"[: 5 + i % 3 + 1], f"{word} bbb"[: 5 + i % 2 + 1]
            row = {"prompt": [{"role": "user", "content": f"say {i}"}], "chosen": better, "rejected": worse}
            file.write(json.dumps(row) + "\n")
    return path


def test_the_command_trains_a_reward_that_transformers_and_runs_load(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = preferences(tmp_path / "pairs.jsonl", 60)
    command = ["train-reward", str(data), "judge", "--model", str(folder), "--device", "cpu", "--batch", "10"]
    assert cli.main([*command, "--epochs", "6", "--learning-rate", "3e-3", "--held-out-share", "0.2"]) == 0
    said = capsys.readouterr().out
    assert "pairs            48 training, 12 held-out, 0 too long or equal" in said
    assert "before           50 % of 12 held-out pairs in the right order" in said, "a new output layer knows nothing"
    assert "after            100 % of 12 held-out pairs in the right order" in said
    assert 'function = "reward_model"\noptions = { path = "judge" }' in said
    prompt = [{"role": "user", "content": "say 7"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("bcde aaa", "bcde bbb", "eee")]
    rewards = rewarding.reward_model([prompt] * 3, answers, path=str(tmp_path / "judge"))
    assert rewards[0] > rewards[1]
    own = AutoModelForSequenceClassification.from_pretrained("judge", dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained("judge")
    rows = [tokenizer.apply_chat_template([*prompt, *answer], tokenize=True, return_dict=False) for answer in answers]
    torch.testing.assert_close(torch.tensor(rewards).double(), scored(own, rows).detach(), rtol=1e-4, atol=1e-4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["judge", "pairs.jsonl"], "nothing half-written stays"


def test_scored_groups_give_a_pair_for_each_two_rewards_that_differ(tmp_path):
    rows = [
        {"prompt": "p", "responses": ["a", "b", "c", "d"], "rewards": [1.0, 0.0, 1.0, None]},
        {"prompt": "q", "responses": ["e", "f"], "rewards": [0.5, 0.5]},
    ]
    path = tmp_path / "groups.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_preferences(str(path), "the data", "prompt", "")
    assert [(p.chosen, p.rejected, p.difference) for p in found] == [("a", "b", 1.0), ("c", "b", 1.0)]


def test_held_out_pairs_are_of_other_prompts(tmp_path):
    rows = [{"prompt": f"p{i % 10}", "chosen": f"a{i}", "rejected": "b"} for i in range(40)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rest, kept = split(read_preferences(str(path), "the data", "prompt", ""), 0.3, 0)
    assert {p.prompt for p in rest} & {p.prompt for p in kept} == set()
    assert len({p.prompt for p in kept}) == 3 and len(rest) + len(kept) == 40


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"prompt": "p", "answer": "a"}], [], "the data holds no preferences: its columns are prompt, answer"),
        ([{"prompt": "p", "responses": ["a"]}], [], "the data holds no preferences"),
        ([{"prompt": "p", "responses": ["a", "b"], "rewards": [1, 1]}], [], "no two responses .* different rewards"),
        ([{"prompt": "p", "responses": [[1], [2]], "rewards": [1, 0]}], [], "row 0 has responses as token ids"),
        ([{"prompt": "p", "chosen": "a", "rejected": "b"}], ["--batch", "0"], "--batch 0: expected at least 1"),
        ([{"prompt": "p", "chosen": "a", "rejected": "b"}], ["--max-tokens", "2"], "no pair has at most 2 tokens"),
        ([{"prompt": "p", "chosen": "a", "rejected": "b"}], ["--held-out-share", "0.9"], "leaves none to train on"),
    ],
)
def test_what_cannot_be_trained_on_is_one_line(folder, tmp_path, capsys, rows, options, message):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    command = ["train-reward", str(path), str(out), "--model", str(folder), "--device", "cpu", *options]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and "Traceback" not in error
    assert not out.exists()


def test_a_hub_dataset_is_asked_for_with_its_subset_and_splits(folder, tmp_path, capsys, monkeypatch):
    asked = []

    def load_rows(source, name, **options):
        asked.append((source, options))
        return [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(2)]

    monkeypatch.setattr(cli_train_reward, "load_rows", load_rows)
    command = ["train-reward", "me/pairs", str(tmp_path / "out"), "--model", str(folder), "--device", "cpu"]
    command += ["--subset", "en", "--split", "train_prefs", "--held-out", "me/pairs", "--held-out-split", "test_prefs"]
    assert cli.main(command) == 0
    assert asked == [
        ("me/pairs", {"split": "train_prefs", "subset": "en"}),
        ("me/pairs", {"split": "test_prefs", "subset": "en"}),
    ]


def test_models_and_folders_that_do_not_fit_are_named(folder, tmp_path, capsys):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}) + "\n")
    out = tmp_path / "out"
    out.mkdir()
    assert cli.main(["train-reward", str(path), str(out), "--model", str(folder)]) == 2
    assert f"{out} exists; give a new folder" in capsys.readouterr().err
    assert cli.main(["train-reward", str(path), str(tmp_path / "new"), "--model", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_model_whose_rows_depend_on_each_other_is_refused(folder, monkeypatch):
    model = model_of(folder)
    scores = model.scores
    monkeypatch.setattr(model, "scores", lambda rows: scores(rows) + 0.1 * len(max(rows, key=len)))
    with pytest.raises(ConfigError, match="depends on the rows beside it"):
        model.check([(5, 6, 0), (5, 6, 7, 8, 0)])


def test_a_row_of_the_data_that_is_wrong_is_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": 3}) + "\n")
    with pytest.raises(DataError, match="the data row 0, column 'rejected' is a int"):
        read_preferences(str(path), "the data", "prompt", "")


def test_a_saved_model_outlives_a_power_loss_and_holds_nothing_of_a_killed_save(folder, tmp_path):
    (tmp_path / "disk" / "new" / ".partial-out").mkdir(parents=True)
    (tmp_path / "disk" / "new" / ".partial-out" / "model-00001-of-00002.safetensors").write_bytes(b"cut")
    disk = power_loss.Disk(tmp_path / "disk")
    with disk.recording():
        model_of(folder).save(tmp_path / "disk" / "new" / "out")
    there = power_loss.files_of(tmp_path / "disk")
    assert "new/out/model.safetensors" in there and "new/out/model-00001-of-00002.safetensors" not in there
    for states in disk.states.values():
        assert sorted(name for name, content in there.items() if states[-1].get(name, "lost") != content) == []


def command(folder: Path, tmp_path: Path, out: Path) -> list[str]:
    """`gvpo train-reward` on 8 pairs."""
    data = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"p{i}", "chosen": "aa", "rejected": "b"} for i in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["train-reward", str(data), str(out), "--model", str(folder), "--device", "cpu"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGXCPU", "SIGINT"])
def test_a_signal_while_the_model_is_written_leaves_nothing(name, folder, tmp_path, capsys, monkeypatch):
    """The handlers and the signals are real."""
    out, number, written = tmp_path / "new" / "out", getattr(signal, name), []

    def cut_short(model, directory, **options):
        Path(directory).mkdir()
        (Path(directory) / "model-00001-of-00002.safetensors").write_bytes(b"half")
        written.extend(Path(directory).iterdir())
        os.kill(os.getpid(), number)
        time.sleep(30)

    default = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
    before = signal.signal(number, default)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(PreTrainedModel, "save_pretrained", cut_short)
            if name == "SIGINT":
                assert cli.main(command(folder, tmp_path, out)) == 130
            else:
                with pytest.raises(SystemExit) as ended:
                    cli.main(command(folder, tmp_path, out))
                assert ended.value.code == 128 + number
        assert signal.getsignal(number) is default
    finally:
        signal.signal(number, before)
    assert written and not list((tmp_path / "new").iterdir())
    assert cli.main(command(folder, tmp_path, out)) == 0 and (out / "model.safetensors").exists()


def test_a_limit_on_file_sizes_is_one_line_and_leaves_nothing(folder, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        assert cli.main(command(folder, tmp_path, out)) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err
    assert "a file may not grow this large here: check ulimit -f" in said and "Traceback" not in said
    assert not list((tmp_path / "new").iterdir())


def test_a_place_that_cannot_be_written_is_named_before_the_model_loads(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli_train_reward, "read_preferences", lambda *_: pytest.fail("the data was read"))
    (tmp_path / "file").write_text("")
    assert cli.main(command(folder, tmp_path, tmp_path / "file" / "out")) == 2
    file = tmp_path / "file"
    assert capsys.readouterr().err == f"gvpo: cannot write {file / 'out'}: {file}: File exists; give another folder\n"
