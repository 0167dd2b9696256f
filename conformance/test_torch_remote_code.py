"""Code that comes with a model: not run without its flag, and recorded where it was."""

import json
import shutil

import pytest
import tiny_models
from required import require

require(subject="torch")

from test_trainer import write_run
from trainer_backends import BACKENDS

from gvpo_core.training import cli, hugging_face
from gvpo_core.training.config import ModelConfig

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path("MARK").write_text("ran")

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A folder whose config.json asks for code of its own."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tiny_models.write_model("llama", tmp_path / "model")
    (folder / "own.py").write_text(CODE.replace("MARK", str(tmp_path / "mark")))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own_llama", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def run(tmp_path, model, extra):
    config = write_run(tmp_path, BACKENDS["torch"], model, steps=1, extra="", model_extra=extra)
    return cli.main(["train", str(config)])


def test_without_the_flag_it_does_not_run(tmp_path, model, capfd):
    assert run(tmp_path, model, "") == 2
    err = capfd.readouterr().err
    assert "trust_remote_code" in err and "Traceback" not in err
    assert not (tmp_path / "mark").exists() and not (tmp_path / "run").exists()


def test_with_the_flag_it_runs_and_is_recorded(tmp_path, model, capfd):
    assert run(tmp_path, model, "trust_remote_code = true") == 0, capfd.readouterr().err
    assert (tmp_path / "mark").read_text() == "ran"
    assert "trust_remote_code = true" in (tmp_path / "run" / "config.toml").read_text()
    assert "remote code" in capfd.readouterr().out
    assert "trust_remote_code = true" in (tmp_path / "run" / "report.html").read_text()
    shutil.rmtree(tmp_path / "run")


def test_code_is_pinned_to_the_same_commit_as_the_weights():
    commit = "0a1b" * 10
    asked = hugging_face.source(ModelConfig(path="someone/model", revision=commit, trust_remote_code=True))
    assert asked["revision"] == asked["code_revision"] == commit
    assert "code_revision" not in hugging_face.source(ModelConfig(path="someone/model", revision=commit))
