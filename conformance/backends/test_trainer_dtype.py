"""A run keeps its dtype: model.dtype = "auto" on a device that would choose another is refused, over every backend."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
import tiny_models
import trainer_backends
from places import DEVICE
from trainer_runs import write_run

from gvpo_core.training import cli
from gvpo_core.training.policy import load

PRESENT = trainer_backends.present()
if not PRESENT:
    pytest.skip("no backend of a language model is among the subjects", allow_module_level=True)
if DEVICE != "cpu":
    pytest.skip("elsewhere auto is bfloat16 already", allow_module_level=True)
AUTO = ('dtype = "float32"', 'dtype = "auto"')


@pytest.fixture(scope="module")
def run(backend, tmp_path_factory) -> Path:
    """A config with dtype = "auto" whose run took one step in float32, the choice of a CPU."""
    folder = tmp_path_factory.mktemp("run")
    model = tiny_models.write_model("llama", tmp_path_factory.mktemp("model"))
    config = write_run(folder, backend, model, steps=1, extra="", model_extra="")
    config.write_text(config.read_text().replace(*AUTO))
    assert cli.main(["train", str(config)]) == 0
    assert known(folder)["policy"]["dtype"] == "float32" and known(folder)["dtype"] == {"model": "float32"}
    return folder


@pytest.fixture
def copied(run, tmp_path) -> Path:
    """The run in a folder of its own, which `gvpo train` continues."""
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    config = tmp_path / "config.toml"
    config.write_text(config.read_text().replace(str(run / "run"), str(tmp_path / "run")))
    return config


@pytest.fixture
def accelerator(backend, monkeypatch) -> None:
    """Makes "auto" stand for bfloat16, as on CUDA and TPUs."""
    ranks = importlib.import_module(f"gvpo_{backend.name}.ranks").Ranks
    plain = ranks.__init__

    def on_an_accelerator(self, *given) -> None:
        plain(self, *given)
        self.auto_dtype = "bfloat16"

    monkeypatch.setattr(ranks, "__init__", on_an_accelerator)


def known(folder: Path) -> dict:
    return json.loads((folder / "run" / "environment.json").read_text())


def goes_on(config: Path, *options: str) -> bool:
    """Whether the run takes a second step. A refused start leaves every file as it was."""
    folder = config.parent / "run"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "run.log"}
    status = cli.main(["train", str(config), "--run.steps", "2", *options])
    if status != 0:
        assert status == 2 and all(path.read_bytes() == content for path, content in before.items())
    return status == 0


@pytest.mark.slow_on("jax")
def test_another_dtype_is_refused_with_the_setting_that_continues(copied, accelerator, capfd):
    assert not goes_on(copied)
    said = capfd.readouterr().err
    assert "model.dtype: float32 -> bfloat16 (--model.dtype float32 continues as before)" in said
    assert goes_on(copied, "--model.dtype", "float32")
    assert known(copied.parent)["dtype"] == {"model": "float32"}


@pytest.mark.slow_on("jax", "torch")
def test_a_written_dtype_is_compared_as_well(copied, capfd):
    assert not goes_on(copied, "--model.dtype", "bfloat16")
    assert "model.dtype: float32 -> bfloat16" in capfd.readouterr().err
    assert goes_on(copied, "--model.dtype", "float32")


@pytest.mark.slow_on("jax")
def test_allowed_changes_continue_in_the_other_dtype(copied, accelerator):
    assert goes_on(copied, "--run.allow_changes", "True")
    now = known(copied.parent)
    assert now["dtype"] == {"model": "bfloat16"} and any("model.dtype: " in x for x in now["starts"][-1]["changed"])


@pytest.mark.parametrize("recorded", ["policy", "nothing"])
def test_a_run_that_wrote_its_dtype_resumes_where_auto_is_the_same(recorded, copied, capfd):
    """Before "auto" was the default, a saved config said float32."""
    saved, environment = copied.parent / "run" / "config.toml", copied.parent / "run" / "environment.json"
    saved.write_text(saved.read_text().replace(*AUTO[::-1], 1))
    facts = {name: value for name, value in known(copied.parent).items() if name != "dtype"}
    environment.write_text(json.dumps(facts if recorded == "policy" else {}))
    assert 'dtype = "float32"' in saved.read_text()
    if recorded == "nothing":  # nobody knows what auto stood for: the settings differ
        assert not goes_on(copied) and "model.dtype: 'float32' -> 'auto'" in capfd.readouterr().err
        assert goes_on(copied, "--model.dtype", "float32")
    else:
        assert goes_on(copied)


def test_eval_and_export_use_the_dtype_of_the_run(copied, accelerator, monkeypatch, tmp_path, capfd):
    made: list[str] = []
    plain = load.load_policy

    def noted(config, **more):
        policy = plain(config, **more)
        made.append(policy.describe().dtype)
        return policy

    monkeypatch.setattr(load, "load_policy", noted)
    folder = str(copied.parent / "run")
    assert cli.main(["eval", folder]) == 0 and cli.main(["export", folder, str(tmp_path / "exported")]) == 0
    assert made == ["float32", "float32"]
