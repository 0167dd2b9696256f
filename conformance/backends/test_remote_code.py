"""Code that comes with a model: over every backend, not run without its flag, and recorded where it was."""

import contextlib
import json
from pathlib import Path

import pytest
import tiny_models
import trainer_backends
from trainer_runs import write_run

from gvpo_core.training import cli
from gvpo_core.training.config import ConfigError, ModelConfig
from gvpo_core.training.policy import hugging_face

PRESENT = trainer_backends.present()
if not PRESENT:
    pytest.skip("no backend of a language model is among the subjects", allow_module_level=True)

# How a folder asks the library that loads its model for code of its own: what config.json says besides, and the code.
ASKS = {
    "torch": (
        {
            "model_type": "own_llama",
            "architectures": ["OwnModel"],
            "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
        },
        """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
""",
    ),
    "mlx": ({"model_file": "own.py"}, "from mlx_lm.models.llama import Model, ModelArgs"),
}
TOKENIZER = """
from transformers import PreTrainedTokenizerFast

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(params=PRESENT, ids=lambda backend: backend.name)
def backend(request, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return request.param


def asking(folder: Path, config: dict, code: str, file: str = "config.json") -> Path:
    """A tiny model whose settings ask for the code in own.py, which leaves a mark beside the folder."""
    tiny_models.write_model("llama", folder)
    marked = f'from pathlib import Path\nPath("{folder.parent / "mark"}").write_text("ran")\n{code}\n'
    (folder / "own.py").write_text(marked)
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | config))
    return folder


def run(folder: Path, backend, model: Path, extra: str) -> int:
    return cli.main(["train", str(write_run(folder, backend, model, steps=1, extra="", model_extra=extra))])


def check_refused(folder: Path, backend, model: Path, capfd) -> None:
    assert run(folder, backend, model, "") == 2
    err = capfd.readouterr().err
    assert "trust_remote_code" in err and "Traceback" not in err
    assert not (folder / "mark").exists() and not (folder / "run").exists()


def check_recorded(folder: Path, backend, model: Path, capfd) -> None:
    assert run(folder, backend, model, "trust_remote_code = true") == 0, capfd.readouterr().err
    assert (folder / "mark").read_text() == "ran"
    assert "trust_remote_code = true" in (folder / "run" / "config.toml").read_text()
    assert "remote code" in capfd.readouterr().out
    assert "trust_remote_code = true" in (folder / "run" / "report.html").read_text()


def test_a_models_code_runs_with_the_flag_alone_and_is_recorded(backend, tmp_path, capfd):
    if backend.name in ASKS:
        model = asking(tmp_path / "model", *ASKS[backend.name])
        check_refused(tmp_path, backend, model, capfd)
        check_recorded(tmp_path, backend, model, capfd)
        return
    for i, (config, code) in enumerate(ASKS.values()):  # a backend whose models are all its own has no use for it
        model = asking(tmp_path / str(i) / "model", config, code)
        with contextlib.suppress(ConfigError):
            backend.policies.policy(model)
        assert not (model.parent / "mark").exists()


def test_a_tokenizers_code_runs_with_the_flag_alone_and_is_recorded(backend, tmp_path, capfd):
    settings = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    model = asking(tmp_path / "model", settings, TOKENIZER, "tokenizer_config.json")
    check_refused(tmp_path, backend, model, capfd)
    if backend.name in ASKS:
        check_recorded(tmp_path, backend, model, capfd)
    else:  # where each run compiles its programs anew
        backend.policies.policy(model, trust_remote_code=True)
        assert (tmp_path / "mark").read_text() == "ran"


def test_code_is_pinned_to_the_same_commit_as_the_weights():
    commit = "0a1b" * 10
    asked = hugging_face.source(ModelConfig(path="someone/model", revision=commit, trust_remote_code=True))
    assert asked["revision"] == asked["code_revision"] == commit
    assert "code_revision" not in hugging_face.source(ModelConfig(path="someone/model", revision=commit))
