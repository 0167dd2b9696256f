"""`gvpo init` writes what `gvpo train` takes as it is, and replaces nothing."""

import importlib.util
import json
import tomllib

import pytest
import trainer_backends

from gvpo_core.training import cli
from gvpo_core.training.cli import init as module

pytestmark = pytest.mark.core

FILES = ["config.toml", "held_out.jsonl", "reward.py", "train.jsonl"]


def gvpo(capfd, *arguments) -> tuple[int, str, str]:
    status = cli.main([str(a) for a in arguments])
    return status, *capfd.readouterr()


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def reward_of(folder):
    spec = importlib.util.spec_from_file_location("reward_of_init", folder / "reward.py")
    written = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(written)
    return written.reward


# A minute of compilation with JAX.
BACKENDS = [
    pytest.param(backend, marks=pytest.mark.slow if backend.name == "jax" else ())
    for backend in trainer_backends.present()
]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_what_init_writes_trains_two_steps_on_a_tiny_model(backend, tmp_path, monkeypatch, capfd):
    import tiny_models

    model = tiny_models.write_model("llama", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    status, out, _ = gvpo(capfd, "init", "my runs", "--model", "model")
    assert status == 0
    assert out.endswith("Next:\n  cd 'my runs'\n  gvpo train config.toml\n")
    monkeypatch.chdir(tmp_path / "my runs")
    assert tomllib.loads((tmp_path / "my runs/config.toml").read_text())["model"]["path"] == str(model)
    assert gvpo(capfd, "train", "config.toml", "--run.backend", backend.name, "--run.steps", "2")[0] == 0
    records = rows(tmp_path / "my runs/runs/first/metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2]
    assert [r["eval/prompts"] for r in records if r["kind"] == "eval"] == [10, 10]
    assert all(r["responses/unscored"] == 0 for r in records if r["kind"] == "train")


def test_the_config_names_the_backend_that_is_installed(tmp_path, monkeypatch, capfd):
    for names, wanted in ((["torch", "jax"], "torch"), (["mlx"], "mlx"), ([], "auto")):

        def found(config, names=names):
            if not names:
                raise module.ConfigError("no backend is installed")
            return names[0]

        monkeypatch.setattr(module, "backend_of", found)
        folder = tmp_path / wanted
        status, out, _ = gvpo(capfd, "init", folder)
        assert status == 0
        config = tomllib.loads((folder / "config.toml").read_text())
        assert config["run"]["backend"] == wanted
        assert config["model"]["path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
        assert ('pip install "gvpo[torch]"' in out) == (wanted == "auto")


def test_ten_rows_to_train_and_ten_others_to_evaluate(tmp_path, capfd):
    assert gvpo(capfd, "init", tmp_path)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    train, held_out = (rows(tmp_path / name) for name in ("train.jsonl", "held_out.jsonl"))
    assert len(train) == len(held_out) == 10
    assert not {r["prompt"][0]["content"] for r in train} & {r["prompt"][0]["content"] for r in held_out}
    for row in train + held_out:
        a, b = (int(word.strip("?")) for word in row["prompt"][0]["content"].split() if word.strip("?").isdigit())
        assert int(row["answer"]) == a + b


def test_the_reward_takes_the_last_number_of_text_and_of_messages(tmp_path, capfd):
    assert gvpo(capfd, "init", tmp_path)[0] == 0
    reward = reward_of(tmp_path)
    answers = ["42", "42. No, 24", "23 + 19 = 42.", "142", "-42", "forty-two", ""]
    wanted = [1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert reward(completions=answers, answer=["42"] * 7) == wanted
    messages = [[{"role": "assistant", "content": text}] for text in answers]
    assert reward(completions=messages, answer=["42"] * 7) == wanted


@pytest.mark.parametrize(
    ("files", "chat"),
    [
        ({"tokenizer_config.json": '{"chat_template": "{{ messages }}"}'}, True),
        ({"chat_template.jinja": "{{ messages }}", "tokenizer_config.json": "{}"}, True),
        ({"tokenizer_config.json": "{}"}, False),
        ({"tokenizer_config.json": "no JSON"}, False),
        ({}, False),
    ],
)
def test_prompts_are_chat_messages_where_the_model_has_a_template(files, chat, tmp_path, capfd):
    model = tmp_path / "model"
    model.mkdir()
    for name, text in {"config.json": "{}", **files}.items():
        (model / name).write_text(text)
    assert gvpo(capfd, "init", tmp_path / "new", "--model", model)[0] == 0
    assert {isinstance(row["prompt"], list) for row in rows(tmp_path / "new/train.jsonl")} == {chat}


@pytest.mark.parametrize("there", [["reward.py"], ["config.toml", "train.jsonl"]])
def test_files_are_named_and_not_replaced(there, tmp_path, capfd):
    for name in there:
        (tmp_path / name).write_text("mine")
    status, _, err = gvpo(capfd, "init", tmp_path)
    assert status == 2
    assert all(str(tmp_path / name) in err for name in there) and "replaces no file" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == there
    assert all((tmp_path / name).read_text() == "mine" for name in there)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("./nowhere", "there is no such folder"),
        ("a/b/c", "there is no such folder"),
        ("/nowhere/model", "there is no such folder"),
        ("", "expected a folder or the hub name"),
        ("two\nlines", "expected a folder or the hub name"),
        ("empty", "the folder has no config.json"),
        ("file", "there is no such folder"),
    ],
)
def test_an_invalid_model_is_refused_before_anything_is_written(model, said, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    status, _, err = gvpo(capfd, "init", "new", "--model", model)
    assert status == 2
    assert err.startswith("gvpo: --model ") and said in err and err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    status, _, err = gvpo(capfd, "init", tmp_path / "file")
    assert status == 2 and err.startswith(f"gvpo: cannot write to {tmp_path / 'file'}: ")
    status, _, err = gvpo(capfd, "init", tmp_path / "file" / "below")
    assert status == 2 and "cannot write to" in err
